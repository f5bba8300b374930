"""A fully trained model as patches on a MODEL, whose weights they take towards the trained ones."""

from typing import Any

import comfy.model_patcher
import comfy.utils
from torch import Tensor

from .baked import NETWORK


def apply_model(model: comfy.model_patcher.ModelPatcher, weights: dict[str, Tensor], strength: float, what: str) -> Any:
    """The MODEL patched so that each weight is (1 - strength) times its own and strength times the one in `weights`,
    which have diffusers' names.

    Raises:
        ValueError: they are not those of this MODEL's network, or it is no U-Net.
    """
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    if not names:
        raise ValueError(
            f"got {what}, which trained all weights, for a MODEL that is no U-Net; expected one of a U-Net: load the "
            "run's file by Load Diffusion Model instead, which knows Stable Diffusion 3 but not the Shapes Model"
        )
    shapes = {name: tuple(weight.shape) for name, weight in model.model.diffusion_model.named_parameters()}
    patches = {}
    for name, weight in weights.items():
        native = names.get(name, "")
        if shapes.get(native) != tuple(weight.shape):
            raise ValueError(
                f"got the weights of {what}, which do not fit this MODEL: {name} is of shape {tuple(weight.shape)}, "
                f"here it is {shapes.get(native, 'missing')}; expected those of a run on this kind of model: connect "
                "the MODEL that the Train node uses"
            )
        patches[f"{NETWORK}.{native}"] = (weight,)
    patched = model.clone()
    patched.add_patches(patches, strength, 1 - strength)
    return patched
