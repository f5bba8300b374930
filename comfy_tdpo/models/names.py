"""Renaming weights whose names in a file differ from those of the network or of the original layout."""

import re
from collections.abc import Callable, Collection

from torch import nn

Rename = Callable[[str], str]

# A weight that every U-Net in the original layout has, and the name of its moving average (EMA).
_PLAIN = "model.diffusion_model.input_blocks.0.0.weight"
_EMA = "model_ema.diffusion_modelinput_blocks00weight"
# A weight that every transformer of SD 3 in the original layout has.
OF_SD3 = "joint_blocks.0.x_block.attn.qkv.weight"

# The parts of a U-Net's names, longer ones first. Only a block's number can have two digits, and a digit follows it.
_PART = re.compile(
    r"input_blocks|middle_block|output_blocks|time_embed|transformer_blocks|in_layers|out_layers|emb_layers"
    r"|skip_connection|attn[12]|to_[qkv]|to_out|proj_in|proj_out|proj|norm[123]?|conv|weight|bias|net|out|op|ff"
    r"|(?<=put_blocks)\d+(?=\d)|\d"
)

# A weight that every network in diffusers' layout has, by the network's class.
_ANCHORS = {
    "UNet2DConditionModel": "time_embedding.linear_1.weight",
    "AutoencoderKL": "decoder.conv_in.weight",
    "CLIPTextModel": "embeddings.token_embedding.weight",
    "CLIPTextModelWithProjection": "embeddings.token_embedding.weight",
    "SD3Transformer2DModel": "context_embedder.weight",
    "FluxTransformer2DModel": "context_embedder.weight",
    "T5EncoderModel": "encoder.final_layer_norm.weight",
    "ZImageTransformer2DModel": "cap_embedder.1.weight",
    "Qwen3Model": "embed_tokens.weight",
}

# diffusers' names, until 2023, for the attention layers of an autoencoder.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def ldm_names(names: Collection[str]) -> Rename:
    """Rename a checkpoint's weights to the original layout, without a prefix that a program added to all names.

    If the file has only the U-Net's averaged weights (EMA), they get the names of the plain weights.
    """
    plain = {_uncompiled(name) for name in names}
    prefix = prefix_of(plain, _PLAIN)
    averaged = prefix + _PLAIN not in plain
    if averaged:
        prefix = prefix_of(plain, _EMA)

    def rename(name: str) -> str:
        name = _uncompiled(name).removeprefix(prefix)
        return _without_ema(name) if averaged else name

    return rename


def native_names(names: Collection[str], anchor: str) -> Rename:
    """Remove the prefix that a program added to the names of a network, all of which have a weight `anchor`."""
    prefix = prefix_of({_uncompiled(name) for name in names}, anchor)
    return lambda name: _uncompiled(name).removeprefix(prefix)


def folder_names(names: Collection[str], network: nn.Module) -> Rename:
    """Rename the weights in a diffusers folder, from any version of diffusers, to those of `network`."""
    prefix = prefix_of({_uncompiled(name) for name in names}, _ANCHORS[type(network).__name__])
    below = below_text_model(network)

    def rename(name: str) -> str:
        name = below(_uncompiled(name).removeprefix(prefix))
        return re.sub(r"(?<=\.attentions\.\d\.)(query|key|value|proj_attn)(?=\.)", lambda m: _OLD_ATTENTION[m[1]], name)

    return rename


def below_text_model(network: nn.Module) -> Rename:
    """Add or remove the level "text_model" of CLIP's text model, above all but a projection: transformers 5 dropped it
    from the model without one, and some old merges never had it."""
    level = "text_model." if hasattr(network, "text_model") else ""
    if "CLIP" not in type(network).__name__:
        return lambda name: name
    return lambda name: name if name.startswith("text_projection.") else level + name.removeprefix("text_model.")


def prefix_of(names: Collection[str], anchor: str) -> str:
    """The prefix of the only name that ends with `anchor`; empty if there is no such name, or more than one."""
    if anchor in names:
        return ""
    found = [name.removesuffix(anchor) for name in names if name.endswith(f".{anchor}")]
    return found[0] if len(found) == 1 else ""


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _without_ema(name: str) -> str:
    """The plain weight's name for an averaged weight, whose own name has no dots."""
    flat = name.removeprefix("model_ema.diffusion_model")
    parts = _PART.findall(flat)
    if flat == name or "".join(parts) != flat:
        return name
    return ".".join(("model.diffusion_model", *parts))
