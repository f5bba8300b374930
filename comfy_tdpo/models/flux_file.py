"""FLUX.1 from one .safetensors file in the original layout: the transformer, and in some text encoders and an
autoencoder."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from . import shipped
from .files import EXPECTED, refused
from .kind import FLUX_GUIDANCE
from .model_file import Layout, ModelFile, Part, autoencoder, text_encoder
from .names import native_names
from .shipped import read_config
from .unsupported import of_weights
from .weights import Weights

_IMAGE = "img_in.weight"  # (width, inputs for each patch)

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


def _transformer(weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    return to_diffusers(weights, network.config.num_attention_heads * network.config.attention_head_dim)


LAYOUT = Layout(
    family="FLUX.1",
    classes={
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "text_encoder_2": T5EncoderModel,
        "tokenizer_2": T5TokenizerFast,
    },
    parts={
        "transformer": Part((*(f"{blocks}." for blocks in _BLOCKS), *_OUTSIDE), _transformer),
        "vae": Part(("vae.",), autoencoder),
        "text_encoder": Part(("text_encoders.clip_l.transformer.",), text_encoder),
        "text_encoder_2": Part(("text_encoders.t5xxl.transformer.",), text_encoder),
    },
    downloads="black-forest-labs/FLUX.1-dev or black-forest-labs/FLUX.1-schnell",
)


def open_file(path: Path) -> ModelFile:
    """The model in `path`; raises ValueError if names and shapes of weights tell that it is another."""
    weights = Weights([path])
    weights.rename(native_names(weights.names, _IMAGE))
    if other := of_weights(weights.names):  # which has the blocks of FLUX.1
        raise refused(path, other)
    weights.check_numbers()
    configs = shipped.CONFIGS / ("flux-dev" if FLUX_GUIDANCE in weights.names else "flux-schnell")
    known = read_config(configs, "transformer/config.json")["in_channels"]
    taken = weights.shape(_IMAGE)[-1] if _IMAGE in weights.names else known
    check_inputs(path, taken, known)
    return ModelFile(LAYOUT, weights, configs)


def check_inputs(source: Path, taken: int, known: int) -> None:
    """Raise ValueError if the transformer in `source` takes more inputs for each patch than the `known` of a latent."""
    if taken != known:
        raise ValueError(
            f"the transformer in {source} takes {taken} inputs for each patch, not {known} (Fill, Depth, Canny); "
            f"{EXPECTED}; choose FLUX.1 dev or schnell"
        )
