"""Z-Image from one .safetensors file: the transformer, in ComfyUI's layout or in diffusers', and maybe text encoder and
autoencoder. The noise levels, which differ between the base model and Turbo, are never in a file."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Model

from . import shipped
from .model_file import Layout, ModelFile, Part, autoencoder, text_encoder
from .names import native_names
from .weights import Weights

_ANCHOR = "cap_embedder.1.weight"  # of the transformer, in either layout
_OF_DIFFUSERS = "all_x_embedder.2-1.weight"
# What the names of the transformer's weights begin with, those that differ first in ComfyUI's layout and in diffusers'.
_TRANSFORMER = (
    *("x_embedder.", "final_layer.", "all_x_embedder.", "all_final_layer."),
    *("layers.", "noise_refiner.", "context_refiner.", "t_embedder.", "cap_embedder.", "x_pad_token", "cap_pad_token"),
)


def _transformer(weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    return weights if _OF_DIFFUSERS in weights else convert_z_image_transformer_checkpoint_to_diffusers(weights)


LAYOUT = Layout(
    family="Z-Image",
    classes={
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": Qwen3Model,
        "tokenizer": Qwen2Tokenizer,
    },
    parts={
        "transformer": Part(_TRANSFORMER, _transformer),
        "vae": Part(("vae.",), autoencoder),
        "text_encoder": Part(("text_encoders.qwen3_4b.transformer.model.",), text_encoder),
    },
    downloads="Tongyi-MAI/Z-Image or Tongyi-MAI/Z-Image-Turbo",
    scheduler=True,
)


def open_file(path: Path) -> ModelFile:
    """The model in `path`; raises ValueError if the file is damaged."""
    weights = Weights([path])
    weights.rename(native_names(weights.names, _ANCHOR))
    weights.check_numbers()
    return ModelFile(LAYOUT, weights, shipped.CONFIGS / "z-image")
