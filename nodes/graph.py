"""What a graph's wires carry, copied for a training; called from ComfyUI's executor."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.policy import DiffusionPolicy

from ..trainer.assemble import DTYPES, assemble, policy_settings
from ..trainer.config import TrainConfig
from ..trainer.job import TrainingFactory
from . import embedded, native
from .configure import Wanted


@dataclass(frozen=True)
class Wires:
    """MODEL, CLIP and VAE as they come in."""

    model: Any
    clip: Any
    vae: Any

    def wanted(self, **inputs: Any) -> Wanted:
        """What is asked for of this MODEL.

        Raises:
            ValueError: a wire carries nothing, or a MODEL that cannot be trained.
        """
        for name, part in (("CLIP", self.clip), ("VAE", self.vae)):
            if part is None:
                raise ValueError(
                    f"got no {name}, as the checkpoint has none; expected one: load it from a file of its own"
                )
        native.diffusers_config(self.model)
        return Wanted(model=native.model_name(self.model), shapes=embedded.is_shapes(self.model), **inputs)

    def factory(self, config: TrainConfig, prompts: list[str], device: torch.device) -> TrainingFactory:
        """What makes the Training, on copies of all that is in the wires.

        Raises:
            ValueError: the three do not belong together.
        """
        encode, decode = native.EncodedPrompts(self.clip, prompts, device), native.ComfyDecoder(self.vae, self.model)
        expected = native.diffusers_config(self.model)["cross_attention_dim"]
        if encode.width != expected:
            raise ValueError(
                f"got a CLIP whose embeddings are {encode.width} wide; expected {expected}: use that of the MODEL's "
                "checkpoint"
            )
        unet = native.diffusers_unet(self.model, DTYPES[config.precision])
        make_policy = partial(_policy, unet, native.scheduler_of(self.model), encode, decode)
        return lambda run, stop, watch: assemble(run.config, run, stop, watch, make_policy, cpu=device.type == "cpu")


def _policy(unet, scheduler, encode, decode, config: TrainConfig, device: torch.device) -> DiffusionPolicy:
    settings = policy_settings(config, device)
    return DiffusionPolicy(StableDiffusion(unet, scheduler, encode, decode.to(device), config.model), **settings)
