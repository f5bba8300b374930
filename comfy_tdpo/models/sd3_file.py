"""Stable Diffusion 3 and 3.5 medium from one .safetensors file in the original layout.

Published files hold the transformer, most of them the autoencoder, and all, some or none of the text encoders. What a
file lacks is read from the folder that it lies in, if that is a diffusers folder of the same model, as in the published
repositories. T5 may be missing in both. CLIP's tokenizers come with this package; T5's has to lie in that folder too.

Deliberate deviation from diffusers' `from_single_file`: every weight must be present, except the projection of CLIP-L,
which published files lack. It is the identity then, as in the original code, in diffusers and in ComfyUI.
"""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import Tensor, nn

from ..process.flow_schedule import PATCH
from . import shipped
from .diffusers_folder import checked_and_filled, empty_network, load_tokenizer, load_weights
from .files import EXPECTED, naming, refused
from .names import OF_SD3, below_text_model, native_names
from .shipped import clip_tokenizer
from .unsupported import LARGE_LAYERS, SD35_LARGE
from .weights import Weights

HEAD = 64  # width of a head of attention
_CLIP_TOKENIZERS = ("tokenizer", "tokenizer_2")
# What the names of the transformer's weights begin with.
_TRANSFORMER = (
    *("joint_blocks.", "x_embedder.", "context_embedder.", "t_embedder.", "y_embedder.", "pos_embed", "final_layer."),
)
# What else a file may hold: its name in a diffusers folder -> what the names of its weights begin with, and what it is.
_PARTS = {
    "vae": ("first_stage_model.", "autoencoder"),
    "text_encoder": ("text_encoders.clip_l.transformer.", "text encoder CLIP-L"),
    "text_encoder_2": ("text_encoders.clip_g.transformer.", "text encoder CLIP-bigG"),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.", "text encoder T5-XXL"),
}
_T5 = "text_encoder_3"
# Weights whose shapes tell the sizes of the transformer -> how many dimensions they have.
_SIZES = {"x_embedder.proj.weight": 4, "context_embedder.weight": 2, "y_embedder.mlp.0.weight": 2, "pos_embed": 3}


def configs() -> Path:
    return shipped.CONFIGS / "sd3"


def load_file(path: Path, classes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The networks and tokenizers of the model in `path`, by their names in a diffusers folder, of these `classes`.

    Raises ValueError if a part is missing in the file and beside it, or if the file holds another model.
    """
    weights = _opened(path)
    transformer, places = empty_transformer(weights), _places(path, weights.names)
    networks = {name: empty_network(place or configs() / name, classes[name]) for name, place in places.items()}
    parts: dict[str, Any] = {name: clip_tokenizer(configs(), name) for name in _CLIP_TOKENIZERS}
    if _T5 in networks:
        parts["tokenizer_3"] = load_tokenizer(path.parent / "tokenizer_3", classes["tokenizer_3"], networks[_T5])
    for name, network in ({"transformer": transformer} | networks).items():
        if place := places.get(name):
            parts[name] = load_weights(network, place, dtype)
        else:
            parts[name] = checked_and_filled(network, _inside(weights, name, network, dtype), dtype, path)
    return parts


def check(path: Path) -> None:
    """Raise ValueError like `load_file`, as far as names and shapes of weights tell."""
    weights = _opened(path)
    empty_transformer(weights)
    _places(path, weights.names)


def _opened(path: Path) -> Weights:
    """The weights in `path`, those of the transformer under names without a prefix."""
    weights = Weights([path])
    weights.rename(native_names(weights.names, OF_SD3))
    weights.check_numbers()
    return weights


def _places(path: Path, names: set[str]) -> dict[str, Path | None]:
    """Where each part but the transformer is: in the folder of this name beside the file, or if None, in the file."""
    places: dict[str, Path | None] = {}
    for part, (prefix, what) in _PARTS.items():
        if any(name.startswith(prefix) for name in names):
            places[part] = None
        elif (path.parent / part / "config.json").is_file():
            places[part] = path.parent / part
        elif part != _T5:
            raise ValueError(
                f"{path} has no {what}; expected it in the file, or beside it as a folder {part}: put the file into a "
                "diffusers folder of Stable Diffusion 3 or 3.5 medium, or choose a file with text encoders"
            )
    if _T5 in places and not (path.parent / "tokenizer_3" / "tokenizer.json").is_file():
        raise ValueError(
            f"{path} is to be used with the text encoder T5-XXL, whose tokenizer no such file has; expected it beside "
            "the file as a folder tokenizer_3: put the file into a diffusers folder of Stable Diffusion 3 or 3.5 "
            "medium, or choose a file without T5"
        )
    return places


def _inside(weights: Weights, part: str, network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a part that is in the file, under the names of `network`."""
    prefix, _ = _PARTS.get(part, ("", ""))
    try:
        if part == "transformer":
            return convert_sd3_transformer_checkpoint_to_diffusers(weights.read(_TRANSFORMER, dtype))
        found = weights.read(prefix, dtype)
        if part == "vae":
            return convert_ldm_vae_checkpoint(found, network.config)
    except KeyError as error:  # the conversions expect all weights of a block
        raise ValueError(f"{weights.source} lacks {error.args[0]}; {EXPECTED}; download the model again") from error
    rename = below_text_model(network)
    found = {rename(name.removeprefix(prefix)): weight for name, weight in found.items()}
    if part == "text_encoder":
        found.setdefault("text_projection.weight", torch.eye(network.config.hidden_size))
    return found


def empty_transformer(weights: Weights) -> SD3Transformer2DModel:
    """The transformer of the sizes that the weights have, without memory for its own."""
    for name, dimensions in _SIZES.items():
        if name not in weights.names or len(weights.shape(name)) != dimensions:
            shape = weights.shape(name) if name in weights.names else "missing"
            raise ValueError(f"{weights.source} has a transformer whose {name} is {shape}; {EXPECTED}")
    (width, channels, _, _), (_, states), (_, pooled), (_, places, _) = map(weights.shape, _SIZES)
    blocks = {name.split(".")[1] for name in weights.names if name.startswith("joint_blocks.")}
    if len(blocks) >= LARGE_LAYERS:
        raise refused(weights.source, SD35_LARGE)
    dual = [block for block in blocks if f"joint_blocks.{block}.x_block.attn2.qkv.weight" in weights.names]
    normed = "joint_blocks.0.x_block.attn.ln_q.weight" in weights.names
    with naming(weights.source), torch.device("meta"):
        return SD3Transformer2DModel(
            patch_size=PATCH,
            in_channels=channels,
            out_channels=channels,
            num_layers=len(blocks),
            num_attention_heads=width // HEAD,
            attention_head_dim=HEAD,
            joint_attention_dim=states,
            caption_projection_dim=width,
            pooled_projection_dim=pooled,
            pos_embed_max_size=math.isqrt(places),
            dual_attention_layers=tuple(sorted(map(int, dual))),
            qk_norm="rms_norm" if normed else None,
        )
