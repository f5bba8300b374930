"""The names of weights, where a file has others than the network or the original layout."""

import re
from collections.abc import Callable, Collection

from torch import nn

Rename = Callable[[str], str]

# A weight that every U-Net in the original layout has, and the same when averaged (EMA).
_PLAIN = "model.diffusion_model.input_blocks.0.0.weight"
_EMA = "model_ema.diffusion_modelinput_blocks00weight"

# The parts of a U-Net's names, longer ones first. Only a block's number can have two digits, and one digit follows it.
_PART = re.compile(
    r"input_blocks|middle_block|output_blocks|time_embed|transformer_blocks|in_layers|out_layers|emb_layers"
    r"|skip_connection|attn[12]|to_[qkv]|to_out|proj_in|proj_out|proj|norm[123]?|conv|weight|bias|net|out|op|ff"
    r"|(?<=put_blocks)\d+(?=\d)|\d"
)

# A weight that every network of diffusers' layout has, by the network's class.
_ANCHORS = {
    "UNet2DConditionModel": "time_embedding.linear_1.weight",
    "AutoencoderKL": "decoder.conv_in.weight",
    "CLIPTextModel": "embeddings.token_embedding.weight",
}

# What diffusers called an autoencoder's attention until 2023.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def ldm_names(names: Collection[str]) -> Rename:
    """From a checkpoint's names to those of the original layout, without a prefix that some program put before all.

    Where the file has the U-Net's averaged weights (EMA) only, they get the names of the U-Net's own.
    """
    plain = {_uncompiled(name) for name in names}
    prefix = _prefix(plain, _PLAIN)
    averaged = prefix + _PLAIN not in plain
    if averaged:
        prefix = _prefix(plain, _EMA)

    def rename(name: str) -> str:
        name = _uncompiled(name).removeprefix(prefix)
        return _without_ema(name) if averaged else name

    return rename


def folder_names(names: Collection[str], network: nn.Module) -> Rename:
    """From the names in a diffusers folder, of any age, to those of `network`."""
    prefix = _prefix({_uncompiled(name) for name in names}, _ANCHORS[type(network).__name__])
    below = below_text_model(network)

    def rename(name: str) -> str:
        name = below(_uncompiled(name).removeprefix(prefix))
        return re.sub(r"(?<=\.attentions\.\d\.)(query|key|value|proj_attn)(?=\.)", lambda m: _OLD_ATTENTION[m[1]], name)

    return rename


def below_text_model(network: nn.Module) -> Rename:
    """transformers 5 dropped the level "text_model" of CLIP's text model, and some old merges never had it."""
    level = "text_model." if hasattr(network, "text_model") else ""
    if "CLIP" not in type(network).__name__:
        return lambda name: name
    return lambda name: level + name.removeprefix("text_model.")


def _prefix(names: Collection[str], anchor: str) -> str:
    """The prefix of the one name that ends with `anchor`; empty where none does, or more than one."""
    if anchor in names:
        return ""
    found = [name.removesuffix(anchor) for name in names if name.endswith(f".{anchor}")]
    return found[0] if len(found) == 1 else ""


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _without_ema(name: str) -> str:
    """An averaged weight's name, which has lost its dots, as that of the weight itself."""
    flat = name.removeprefix("model_ema.diffusion_model")
    parts = _PART.findall(flat)
    if flat == name or "".join(parts) != flat:
        return name
    return ".".join(("model.diffusion_model", *parts))
