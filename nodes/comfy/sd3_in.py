"""Converts a MODEL of Stable Diffusion 3 or 3.5 to what the trainer uses; models_in does so with the others."""

import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from comfy_tdpo.models.files import SUPPORTED
from comfy_tdpo.models.unsupported import LARGE_LAYERS, SD35_LARGE
from comfy_tdpo.process.flow_schedule import PATCH, FlowSchedule

from .baked import baked_weights

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


def diffusers_transformer(
    model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype = torch.float32
) -> SD3Transformer2DModel:
    """The transformer of a MODEL for diffusers, in `dtype` on the CPU, with the LoRAs applied to it baked in.

    Raises:
        ValueError: the MODEL has other blocks, or a weight is not finite.
    """
    config = transformer_config(model)
    places = comfy.utils.mmdit_to_diffusers(model.model.model_config.unet_config)
    with torch.inference_mode(False), torch.no_grad():
        weights = baked_weights(model, dtype)
        with torch.device("meta"):  # skips initialising weights that are replaced anyway
            network = SD3Transformer2DModel(**config)
        found = {name: _taken(weights, places[name]) for name in network.state_dict()}
        network.load_state_dict(found, assign=True)
    return network.eval()


def _taken(weights: dict[str, Tensor], place: str | tuple) -> Tensor:
    """The weight at a `place` of ComfyUI's map: a name, or a name, what to cut out of it, and what to make of it."""
    if isinstance(place, str):
        return weights[place]
    name, cut, *made = place
    weight = weights[name].narrow(*cut).clone() if cut else weights[name]
    return made[0](weight) if made else weight


def flow_schedule_of(model: comfy.model_patcher.ModelPatcher) -> FlowSchedule:
    """The noise levels of a MODEL, whose shift a node may have changed."""
    sampling = model.get_model_object("model_sampling")
    bases = {base.__name__ for base in type(sampling).__mro__}
    if not {"CONST", "ModelSamplingDiscreteFlow"} <= bases:
        raise ValueError(
            f"got a MODEL of Stable Diffusion 3 with other noise levels ({', '.join(sorted(bases))}); expected those "
            "of flow matching: disconnect the node that changes its sampling, or use ModelSamplingSD3"
        )
    return FlowSchedule(float(sampling.shift), int(sampling.multiplier))
