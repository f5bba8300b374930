"""Converts a MODEL of FLUX.1 to what the trainer uses."""

import math

import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from diffusers import FluxTransformer2DModel

from comfy_tdpo.models.flux import Flux
from comfy_tdpo.models.kind import FLUX_DEV, FLUX_SCHNELL
from comfy_tdpo.process.flow_schedule import PATCH, FlowSchedule

from .encoded import EncodedPrompts
from .native import Native, converted, flow_schedule_of

CHANNELS = 16  # of a latent
# What relatives of FLUX.1 have otherwise, and FLUX.1's value; some versions of ComfyUI do not write all of them down.
_OTHERS = {
    "image_model": "flux",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": PATCH,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "yak_mlp": False,
    "txt_norm": False,
}


def is_flux(model: comfy.model_patcher.ModelPatcher) -> bool:
    return isinstance(model.model.model_config, comfy.supported_models.Flux)


def transformer_config(model: comfy.model_patcher.ModelPatcher) -> dict:
    """The configuration for diffusers of the transformer in a MODEL."""
    config = model.model.model_config.unet_config
    other = next((name for name, value in _OTHERS.items() if config.get(name, value) != value), None)
    if other or config.get("vec_in_dim") is None:
        kind, other = type(model.model.model_config).__name__, other or "vec_in_dim"
        raise ValueError(
            f"got a MODEL of the family {kind} with {other} {config.get(other)}, unlike FLUX.1 dev and schnell (Fill, "
            "Depth and Canny take more channels); expected one of these: load another"
        )
    return {
        "in_channels": config["in_channels"] * PATCH**2,
        "num_layers": config["depth"],
        "num_single_layers": config["depth_single_blocks"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "num_attention_heads": config["num_heads"],
        "joint_attention_dim": config["context_in_dim"],
        "pooled_projection_dim": config["vec_in_dim"],
        "guidance_embeds": config["guidance_embed"],
        "axes_dims_rope": tuple(config["axes_dim"]),
    }


def diffusers_transformer(
    model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype = torch.float32
) -> FluxTransformer2DModel:
    """The transformer of a MODEL for diffusers, in `dtype` on the CPU, with the LoRAs applied to it baked in.

    Raises:
        ValueError: the MODEL is a relative of FLUX.1, or a weight is not finite.
    """
    places = comfy.utils.flux_to_diffusers(model.model.model_config.unet_config)
    return converted(model, dtype, FluxTransformer2DModel, transformer_config(model), places)


def flow_schedule(model: comfy.model_patcher.ModelPatcher) -> FlowSchedule:
    """The noise levels of a MODEL, whose shift a node may have changed. It is the same for images of any size."""
    sampling = model.get_model_object("model_sampling")
    if {"CONST", "ModelSamplingFlux"} <= {base.__name__ for base in type(sampling).__mro__}:
        return FlowSchedule(math.exp(sampling.shift))
    return flow_schedule_of(model, "FLUX.1", "ModelSamplingFlux")


def widths(model: comfy.model_patcher.ModelPatcher) -> tuple[int, int | None]:
    config = transformer_config(model)
    return config["joint_attention_dim"], config["pooled_projection_dim"]


def _preset(model: comfy.model_patcher.ModelPatcher) -> str:
    return FLUX_DEV if model.model.model_config.unet_config["guidance_embed"] else FLUX_SCHNELL


NATIVE = Native(
    recognizes=is_flux,
    preset=_preset,
    widths=widths,
    network=diffusers_transformer,
    schedule=flow_schedule,
    encode=lambda model, clip, texts, device: EncodedPrompts(clip, texts, device, pooled=True, joint=True, t5=True),
    kind=Flux,
)
