"""FLUX.1 from one .safetensors file in the original layout: the transformer, maybe with autoencoder and text encoders.

What the file lacks is read from the folder that it lies in, which is then laid out like a diffusers folder, as the
published ones are. The tokenizer of T5 is never in a file.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel, T5TokenizerFast

from ..process.flow_schedule import FlowSchedule
from . import shipped
from .diffusers_folder import checked_and_filled, empty_network, latent_factor, load_parts
from .files import EXPECTED, refused
from .kind import FLUX_GUIDANCE
from .names import below_text_model, native_names
from .scheduler import flow_schedule_in
from .shipped import clip_tokenizer, read_config
from .unsupported import of_weights
from .weights import Weights

_IMAGE = "img_in.weight"  # (width, inputs for each patch)
# Where the other networks are in a file that has them.
_OTHERS = {
    "vae": "vae.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
}
_NETWORKS = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}

# The original names of layers -> diffusers'; a layer that diffusers split has one name for each part, in order of rows.
_OUTSIDE: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    **{
        f"{native}.{layer}_layer": (f"time_text_embed.{name}_embedder.linear_{number}",)
        for native, name in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text"))
        for layer, number in (("in", 1), ("out", 2))
    },
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "linear2": ("proj_out",),
}
_BLOCKS = {"double_blocks": ("transformer_blocks", _DOUBLE), "single_blocks": ("single_transformer_blocks", _SINGLE)}


def load_file(path: Path, dtype: torch.dtype) -> tuple[dict[str, Any], FlowSchedule]:
    """The components of the model in `path`, named as in a diffusers folder, and its noise schedule.

    Raises:
        ValueError: the file is damaged or of another model, or neither it nor its folder has a component.
    """
    weights, configs = _opened(path)
    lacking = {name: cls for name, cls in _NETWORKS.items() if name in _OTHERS and not _has(weights, name)}
    lacking["tokenizer_2"] = T5TokenizerFast
    if absent := [name for name in lacking if not (path.parent / name).is_dir()]:
        raise ValueError(
            f"{path} has no {' and no '.join(absent)}, and there is none beside it; expected the file to lie in a "
            "diffusers folder of FLUX.1, whose own transformer is not needed: move it into a download of "
            "black-forest-labs/FLUX.1-dev or FLUX.1-schnell"
        )
    networks = {name: empty_network(configs / name, cls) for name, cls in _NETWORKS.items() if name not in lacking}
    found = {name: _inside(weights, name, network, dtype) for name, network in networks.items()}
    parts = {name: checked_and_filled(network, found[name], dtype, path) for name, network in networks.items()}
    parts |= load_parts(path.parent, lacking, dtype) | {"tokenizer": clip_tokenizer(configs)}
    return parts, flow_schedule_in(configs)


def outline_file(path: Path) -> tuple[FlowSchedule, int]:
    """The noise schedule of the model in `path`, and its pixels for each element of a latent."""
    _, configs = _opened(path)
    return flow_schedule_in(configs), latent_factor(configs)


def _opened(path: Path) -> tuple[Weights, Path]:
    """The weights in `path`, and the configurations of its model."""
    weights = Weights([path])
    weights.rename(native_names(weights.names, _IMAGE))
    if other := of_weights(weights.names):  # which has the blocks of FLUX.1
        raise refused(path, other)
    weights.check_numbers()
    configs = shipped.CONFIGS / ("flux-dev" if FLUX_GUIDANCE in weights.names else "flux-schnell")
    taken = weights.shape(_IMAGE)[-1] if _IMAGE in weights.names else None
    known = read_config(configs, "transformer/config.json")["in_channels"]
    if taken not in (None, known):
        raise ValueError(
            f"the transformer in {path} takes {taken} inputs for each patch, not {known} (Fill, Depth, Canny); "
            f"{EXPECTED}; choose FLUX.1 dev or schnell"
        )
    return weights, configs


def _has(weights: Weights, name: str) -> bool:
    return any(known.startswith(_OTHERS[name]) for known in weights.names)


def _inside(weights: Weights, part: str, network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in the file of a part, under the names of `network`."""
    if part == "transformer":
        native: dict[str, Tensor] = {}
        for prefix in ("double_blocks.", "single_blocks.", *_OUTSIDE):
            native |= weights.read(prefix, dtype)
        return to_diffusers(native, network.config.num_attention_heads * network.config.attention_head_dim)
    prefix = _OTHERS[part]
    found = weights.read(prefix, dtype)
    if part == "vae":
        return convert_ldm_vae_checkpoint(found, network.config)
    rename = below_text_model(network)
    return {rename(name.removeprefix(prefix)): weight for name, weight in found.items()}


def to_diffusers(native: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """The transformer's weights under diffusers' names; those of unknown names are left out.

    width: of the transformer, and so the rows of each part of a split layer but the last.
    """
    found = {}
    for name, weight in native.items():
        layer, kind = name.rsplit(".", 1)
        table, place = _OUTSIDE, ""
        if block := re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", layer):
            blocks, table = _BLOCKS[block[1]]
            place, layer = f"{blocks}.{block[2]}.", block[3]
        parts = table.get(layer, ())
        rows = [width] * (len(parts) - 1)
        pieces = weight.split([*rows, len(weight) - sum(rows)]) if len(parts) > 1 else [weight]
        for part, piece in zip(parts, pieces, strict=False):
            found[f"{place}{part}.{'weight' if kind == 'scale' else kind}"] = piece
    for name in ("norm_out.linear.weight", "norm_out.linear.bias"):  # shift before scale there, and after it here
        if name in found:
            found[name] = torch.cat(found[name].chunk(2)[::-1])
    return found
