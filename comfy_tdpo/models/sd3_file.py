"""Stable Diffusion 3 and 3.5 medium from one .safetensors file in the original layout.

Published files hold the transformer, most of them the autoencoder, and all, some or none of the text encoders. T5 may
be missing both in the file and beside it.

Deliberate deviation from diffusers' `from_single_file`: every weight must be present, except the projection of CLIP-L,
which published files lack. It is the identity then, as in the original code, in diffusers and in ComfyUI.
"""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from ..process.flow_schedule import PATCH
from . import shipped
from .files import EXPECTED, naming, refused
from .model_file import Layout, ModelFile, Part, autoencoder, text_encoder
from .names import OF_SD3, native_names
from .unsupported import LARGE_LAYERS, SD35_LARGE
from .weights import Weights

HEAD = 64  # width of a head of attention
# What the names of the transformer's weights begin with.
_TRANSFORMER = (
    *("joint_blocks.", "x_embedder.", "context_embedder.", "t_embedder.", "y_embedder.", "pos_embed", "final_layer."),
)
# Weights whose shapes tell the sizes of the transformer -> how many dimensions they have.
_SIZES = {"x_embedder.proj.weight": 4, "context_embedder.weight": 2, "y_embedder.mlp.0.weight": 2, "pos_embed": 3}


def _transformer(weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    return convert_sd3_transformer_checkpoint_to_diffusers(weights)


def _clip_l(weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    return {"text_projection.weight": torch.eye(network.config.hidden_size)} | text_encoder(weights, network)


LAYOUT = Layout(
    family="Stable Diffusion 3",
    classes={
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        **dict.fromkeys(("text_encoder", "text_encoder_2"), CLIPTextModelWithProjection),
        **dict.fromkeys(("tokenizer", "tokenizer_2"), CLIPTokenizer),
        "text_encoder_3": T5EncoderModel,
        "tokenizer_3": T5TokenizerFast,
    },
    parts={
        "transformer": Part(_TRANSFORMER, _transformer),
        "vae": Part(("first_stage_model.",), autoencoder),
        "text_encoder": Part(("text_encoders.clip_l.transformer.",), _clip_l),
        "text_encoder_2": Part(("text_encoders.clip_g.transformer.",), text_encoder),
        "text_encoder_3": Part(("text_encoders.t5xxl.transformer.",), text_encoder),
    },
    downloads="stabilityai/stable-diffusion-3-medium-diffusers or stabilityai/stable-diffusion-3.5-medium",
    optional=("text_encoder_3", "tokenizer_3"),
    otherwise=", or choose a file with an autoencoder and both CLIPs, and without T5",
)


def open_file(path: Path) -> ModelFile:
    """The model in `path`; raises ValueError if names and shapes of weights tell that it is another."""
    weights = Weights([path])
    weights.rename(native_names(weights.names, OF_SD3))
    weights.check_numbers()
    return ModelFile(LAYOUT, weights, shipped.CONFIGS / "sd3", {"transformer": empty_transformer(weights)})


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
