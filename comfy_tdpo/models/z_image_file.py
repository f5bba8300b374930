"""Z-Image from one .safetensors file, which lies in the model's diffusers folder in place of its transformer.

The file holds the transformer, in ComfyUI's layout or in diffusers', and maybe text encoder and autoencoder. What it
lacks is read from the folder: at least the tokenizer, and the noise levels, which differ between the base model and
Turbo. The folder's own transformer is never read.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from torch import Tensor

from . import shipped
from .diffusers_folder import checked_and_filled, empty_network, load_parts
from .files import AGAIN
from .names import prefix_of
from .shipped import read_config
from .weights import Weights

_ANCHOR = "cap_embedder.1.weight"  # of the transformer, in either layout
_OF_DIFFUSERS = "all_x_embedder.2-1.weight"
_TEXT = "text_encoders.qwen3_4b.transformer."
_VAE = "vae."
_MARKS = {"text_encoder": f"{_TEXT}model.embed_tokens.weight", "vae": f"{_VAE}decoder.conv_in.weight"}


def load_file(path: Path, classes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The networks and the tokenizer of the model in `path`, by name, given their `classes`.

    Raises:
        ValueError: the file is damaged, or the folder in which it lies lacks what it does not hold.
    """
    weights = Weights([path])
    weights.check_numbers()
    inside = ["transformer", *(name for name, mark in _MARKS.items() if mark in weights.names)]
    outside = [name for name in classes if name not in inside]
    _check_folder(path, inside, [*outside, "scheduler"])
    makers = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}
    networks = {name: empty_network(shipped.CONFIGS / "z-image" / name, classes[name]) for name in inside}
    parts = {
        name: checked_and_filled(network, makers[name](weights, dtype), dtype, path)
        for name, network in networks.items()
    }
    return parts | load_parts(path.parent, {name: classes[name] for name in outside}, dtype)


def _check_folder(path: Path, inside: list[str], outside: list[str]) -> None:
    """Raise ValueError unless all parts that are `outside` of the file are folders beside it."""
    missing = [name for name in outside if not (path.parent / name).is_dir()]
    if missing:
        raise ValueError(
            f"{path} holds the {' and '.join(inside)} of Z-Image, and there is no {' and no '.join(missing)} beside "
            "it; expected the file to lie in the model's diffusers folder, whose own transformer is not needed: move "
            "it into a download of Tongyi-MAI/Z-Image or Tongyi-MAI/Z-Image-Turbo"
        )


def _transformer(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    prefix = prefix_of(weights.names, _ANCHOR)
    found = {name.removeprefix(prefix): weight for name, weight in weights.read(prefix, dtype).items()}
    if _OF_DIFFUSERS in found:
        return found
    return convert_z_image_transformer_checkpoint_to_diffusers(found)


def _text_encoder(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    prefix = f"{_TEXT}model."
    return {name.removeprefix(prefix): weight for name, weight in weights.read(prefix, dtype).items()}


def _vae(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    config = read_config(shipped.CONFIGS / "z-image", "vae/config.json")
    found = weights.read(_VAE, dtype)
    try:
        return convert_ldm_vae_checkpoint(found, config)
    except KeyError as error:  # diffusers' conversion expects a bias wherever there is a weight
        raise ValueError(f"{weights.source} lacks {error.args[0]}; {AGAIN}") from error
