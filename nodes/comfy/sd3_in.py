"""Converts a MODEL of Stable Diffusion 3 or 3.5 to what the trainer uses."""

import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from diffusers import SD3Transformer2DModel

from comfy_tdpo.models.files import SUPPORTED
from comfy_tdpo.models.kind import SD3
from comfy_tdpo.models.stable_diffusion_3 import StableDiffusion3
from comfy_tdpo.models.unsupported import LARGE_LAYERS, SD35_LARGE
from comfy_tdpo.process.flow_schedule import PATCH, FlowSchedule

from .encoded import EncodedPrompts
from .native import Native, converted, flow_schedule_of

HEAD = 64  # width of a head of attention; ComfyUI has as many heads as layers
# What ComfyUI may find in a file that diffusers' transformer has not, and the value without it.
_OTHERS = {"context_processor_layers": None, "pos_embed_scaling_factor": None, "patch_size": PATCH}


def is_sd3(model: comfy.model_patcher.ModelPatcher) -> bool:
    return isinstance(model.model.model_config, comfy.supported_models.SD3)


def transformer_config(model: comfy.model_patcher.ModelPatcher) -> dict:
    """The configuration for diffusers of the transformer in a MODEL."""
    config = model.model.model_config.unet_config
    norm = config.get("qk_norm")
    known = all(config.get(name, value) == value for name, value in _OTHERS.items()) and norm in (None, "rms")
    if (
        not known
        or not config.get("pos_embed_max_size")
        or config.get("num_blocks", config["depth"]) != config["depth"]
    ):
        raise ValueError(
            "got a MODEL of the family SD3 with other blocks than Stable Diffusion 3 and 3.5 medium; expected one of "
            "these: load another"
        )
    if config["depth"] >= LARGE_LAYERS:
        raise ValueError(
            f"got a MODEL of {SD35_LARGE.name}; expected {SUPPORTED} for text to image: nearest to it is "
            f"{SD35_LARGE.nearest}"
        )
    text = config["context_embedder_config"]["params"]
    return {
        "patch_size": PATCH,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "num_layers": config["depth"],
        "num_attention_heads": config["depth"],
        "attention_head_dim": HEAD,
        "joint_attention_dim": text["in_features"],
        "caption_projection_dim": text["out_features"],
        "pooled_projection_dim": config["adm_in_channels"],
        "pos_embed_max_size": config["pos_embed_max_size"],
        "dual_attention_layers": tuple(config.get("x_block_self_attn_layers", ())),
        "qk_norm": "rms_norm" if norm else None,
    }


def widths(model: comfy.model_patcher.ModelPatcher) -> tuple[int, int]:
    """How wide the embeddings and the pooled embeddings are that the transformer takes."""
    config = transformer_config(model)
    return config["joint_attention_dim"], config["pooled_projection_dim"]


def diffusers_transformer(
    model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype = torch.float32
) -> SD3Transformer2DModel:
    """The transformer of a MODEL for diffusers, in `dtype` on the CPU, with the LoRAs applied to it baked in.

    Raises:
        ValueError: the MODEL has other blocks, or a weight is not finite.
    """
    places = comfy.utils.mmdit_to_diffusers(model.model.model_config.unet_config)
    return converted(model, dtype, SD3Transformer2DModel, transformer_config(model), places)


def flow_schedule(model: comfy.model_patcher.ModelPatcher) -> FlowSchedule:
    """The noise levels of a MODEL, whose shift a node may have changed."""
    return flow_schedule_of(model, "Stable Diffusion 3", "ModelSamplingSD3")


NATIVE = Native(
    recognizes=is_sd3,
    preset=lambda model: SD3,
    widths=widths,
    network=diffusers_transformer,
    schedule=flow_schedule,
    encode=lambda model, clip, texts, device: EncodedPrompts(clip, texts, device, pooled=True, joint=True, t5=True),
    kind=StableDiffusion3,
)
