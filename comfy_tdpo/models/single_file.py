"""Stable Diffusion from one .safetensors file in the original (LDM) layout, which carries weights only.

Deviations from diffusers' `from_single_file`, on purpose:
- every weight must arrive: diffusers leaves a missing one uninitialised;
- an SD 2.x file that does not say how it predicts is taken as ComfyUI takes it. diffusers' own rule, v-prediction
  unless `global_step` is 875000, is brittle by its own comment, and most files carry no `global_step`;
- "!" in a prompt stays the word "!" although SD 2.x pads with that token: open_clip and ComfyUI tokenize it so.
"""

import logging
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from . import shipped
from .files import EXPECTED
from .scheduler import load_scheduler
from .shipped import clip_tokenizer, read_config
from .weights import check_channels, check_weights, fill, open_weights

logger = logging.getLogger(__name__)

# Keys of the original (LDM) layout that tell a checkpoint's family by their shapes.
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"  # (width, latent channels, 3, 3)
_CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # (width, text width)
_LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"  # (width,)

# What else a .safetensors file may be, by a part of its keys; the first that fits names it.
_OTHER_FILES = {
    "lora_": "a LoRA",
    ".lora.": "a LoRA",
    "control_model.": "a ControlNet",
    "conditioner.embedders.": "an SDXL checkpoint",
    "joint_blocks.": "an SD 3 checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "label_emb.": "a U-Net with class or image conditions (SDXL, unCLIP)",
    "down_blocks.": "one component of a diffusers folder",
}


def load_file(path: Path, dtype: torch.dtype, prediction_type: str | None) -> dict:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file; {EXPECTED}; convert it to .safetensors first (a pickled .ckpt, .pt or "
            ".bin file can run code when it is loaded)"
        )
    with open_weights(path) as file:
        family = _family(file, path)
        prediction_type = prediction_type or _prediction_type(file, family, path)
        configs = shipped.CONFIGS / ("sd2-v" if (family, prediction_type) == ("sd2", "v_prediction") else family)
        makers = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}
        try:
            networks = {name: make(file, configs) for name, make in makers.items()}
        except KeyError as error:  # diffusers' conversion takes a layer's bias for granted where its weight is
            raise ValueError(f"{path} lacks {error.args[0]}; {EXPECTED}; fetch the model again") from error
        for network, weights in networks.values():
            check_weights(path, network, weights)
        return {name: fill(network, weights, dtype) for name, (network, weights) in networks.items()} | {
            "tokenizer": clip_tokenizer(configs),
            "scheduler": load_scheduler(configs / "scheduler" / "scheduler_config.json", prediction_type),
        }


def _family(file: safe_open, path: Path) -> str:
    """ "sd1" or "sd2", from keys and shapes alone."""
    keys = set(file.keys())
    other = next((what for part, what in _OTHER_FILES.items() if any(part in key for key in keys)), None)
    if other or not {_CONV_IN, _CONTEXT} <= keys:
        raise ValueError(f"{path} is {other or 'something else: keys like ' + min(keys, default='none')}; {EXPECTED}")
    shapes = [tuple(file.get_slice(key).get_shape()) for key in (_CONV_IN, _CONTEXT)]
    if [len(shape) for shape in shapes] != [4, 2]:
        raise ValueError(f"{path} has weights of the shapes {shapes} where a U-Net begins; {EXPECTED}")
    (width, channels, _, _), (_, text_width) = shapes
    check_channels(channels, path)
    known = {}
    for family in ("sd1", "sd2"):
        config = read_config(shipped.CONFIGS / family, "unet/config.json")
        known[config["block_out_channels"][0], config["cross_attention_dim"]] = family
    if (width, text_width) not in known:
        raise ValueError(f"the U-Net in {path} is {width} wide and reads text {text_width} wide; {EXPECTED}")
    return known[width, text_width]


def _prediction_type(file: safe_open, family: str, path: Path) -> str:
    """What the file says of itself (ModelSpec's key, or ComfyUI's); for a silent SD 2.x file, ComfyUI's guess."""
    metadata = file.metadata() or {}
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if said:
        return "v_prediction" if said.startswith("v") else "epsilon"
    if family == "sd1" or _LAST_NORM not in file.keys():
        return "epsilon"
    guess = "v_prediction" if file.get_tensor(_LAST_NORM).float().std(unbiased=False) > 0.09 else "epsilon"
    logger.warning("%s does not say how it predicts; taken as %s; prediction_type overrides that", path, guess)
    return guess


def _read(file: safe_open, prefix: str) -> dict[str, Tensor]:
    return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}


def _unet(file: safe_open, configs: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    config = read_config(configs, "unet/config.json")
    with init_empty_weights():
        model = UNet2DConditionModel.from_config(config)
    return model, convert_ldm_unet_checkpoint(_read(file, "model.diffusion_model."), config)


def _vae(file: safe_open, configs: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    config = read_config(configs, "vae/config.json")
    with init_empty_weights():
        model = AutoencoderKL.from_config(config)
    return model, convert_ldm_vae_checkpoint(_read(file, "first_stage_model."), config)


def _text_encoder(file: safe_open, configs: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    with init_empty_weights():
        model = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    weights = _read(file, "cond_stage_model.")
    if any(key.startswith("cond_stage_model.model.") for key in weights):
        weights = convert_open_clip_checkpoint(model, weights)
    else:
        weights = convert_ldm_clip_checkpoint(weights)
    # transformers 5 dropped the level "text_model", and some old merges never had it
    level = "text_model." if hasattr(model, "text_model") else ""
    return model, {level + key.removeprefix("text_model."): weight for key, weight in weights.items()}
