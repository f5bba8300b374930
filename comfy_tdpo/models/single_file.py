"""Stable Diffusion from one .safetensors file in the original (LDM) layout, which contains only weights.

Deliberate deviations from diffusers' `from_single_file`:
- every weight must be present: diffusers leaves a missing one uninitialised;
- if a file has only the U-Net's averaged weights (EMA), those are used;
- if an SD 2.x file does not state its prediction type, ComfyUI's rule decides. diffusers' rule, v-prediction unless
  `global_step` is 875000, is brittle according to its own comment, and most files have no `global_step`. An XL file
  says so by an empty weight `v_pred`, as in ComfyUI;
- "!" in a prompt stays the word "!", as in open_clip and ComfyUI, although SD 2.x pads with that token.
"""

import logging
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from . import shipped
from .files import EXPECTED, refused
from .names import below_text_model, ldm_names
from .scheduler import load_scheduler
from .shipped import clip_tokenizer, read_config
from .unsupported import EDM, LCM, of_weights
from .weights import Weights, check_channels, check_weights, converting, fill

logger = logging.getLogger(__name__)

# Keys of the original (LDM) layout whose shapes identify a checkpoint's family.
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"  # (width, latent channels, 3, 3)
_CONTEXT = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"  # (width, text width)
_LABELS = "model.diffusion_model.label_emb."  # conditioning on classes or images; of XL, on sizes and a pooled state
_DEEPEST = "model.diffusion_model.middle_block.1.transformer_blocks."  # as many as in XL's deepest blocks
_OF_LCM = "time_embed.cond_proj.weight"
_LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"  # (width,)

# Other kinds of .safetensors files, by a part of their keys. The most frequent part decides; ties go to the first.
_OTHER_FILES = {
    "lora_": "a LoRA",
    ".lora.": "a LoRA",
    "control_model.": "a ControlNet",
    "conditioner.embedders.": "an SDXL checkpoint without the whole U-Net (text encoders alone, or KOALA)",
    "joint_blocks.": "an SD 3 checkpoint without its whole transformer",
    "double_blocks.": "a checkpoint with the blocks of FLUX.1 and another layout",
    "label_emb.": "a U-Net with class or image conditions (unCLIP), or SDXL's U-Net alone",
    "down_blocks.": "one component of a diffusers folder",
}
_NO_CHECKPOINTS = ("lora_", ".lora.", "control_model.")  # of these, of any family
_REFINER = (384, 1280)  # width and text width
# Weights that say that an XL checkpoint was trained on other noise than XL: what it is, and what to do.
_OTHER_NOISE = {
    **dict.fromkeys(("edm_mean", "edm_vpred.sigma_max"), (EDM, "choose a model that is derived from SDXL's base")),
    "ztsnr": (
        "trained with zero terminal SNR (ztsnr)",
        "save it as a diffusers folder, with a scheduler that has prediction_type v_prediction, rescale_betas_zero_snr "
        "true and timestep_spacing trailing",
    ),
}


def load_file(path: Path, dtype: torch.dtype, prediction_type: str | None) -> dict:
    weights, family, configs, prediction_type = _opened(path, prediction_type)
    makers = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}
    tokenizers = {"tokenizer": clip_tokenizer(configs)}
    if family == "sdxl":
        makers["text_encoder_2"] = _text_encoder_2
        tokenizers["tokenizer_2"] = clip_tokenizer(configs, "tokenizer_2")
    with converting(path):
        networks = {name: make(weights, configs, dtype) for name, make in makers.items()}
    for network, found in networks.values():
        check_weights(path, network, found)
    filled = {name: fill(network, found, dtype, path) for name, (network, found) in networks.items()}
    return filled | tokenizers | {"scheduler": _scheduler(configs, prediction_type)}


def outline_file(path: Path, prediction_type: str | None) -> tuple[DDIMScheduler, Path]:
    """The noise schedule of the model in `path`, and its shipped configurations."""
    _, _, configs, prediction_type = _opened(path, prediction_type)
    return _scheduler(configs, prediction_type), configs


def _scheduler(configs: Path, prediction_type: str) -> DDIMScheduler:
    return load_scheduler(configs / "scheduler" / "scheduler_config.json", prediction_type)


def _opened(path: Path, prediction_type: str | None) -> tuple[Weights, str, Path, str]:
    """The weights in `path`, their family, its configurations, and what the network predicts."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; {EXPECTED}; convert it to .safetensors first (a pickled .ckpt, .pt or "
            ".bin file can run code when it is loaded)"
        )
    weights = Weights([path])
    weights.rename(ldm_names(weights.names))
    _check_kind(weights)
    weights.check_numbers()
    family = _family(weights)
    prediction_type = prediction_type or _prediction_type(weights, family)
    configs = shipped.CONFIGS / ("sd2-v" if (family, prediction_type) == ("sd2", "v_prediction") else family)
    return weights, family, configs, prediction_type


def _check_kind(weights: Weights) -> None:
    """Identify the file by the weights it has, so that a stray key does not change the kind of a whole checkpoint."""
    names = weights.names
    counts = {part: sum(part in name for name in names) for part in _OTHER_FILES}
    part = max(counts, key=counts.__getitem__)
    if {_CONV_IN, _CONTEXT} <= names:
        if any(name.endswith(_OF_LCM) for name in names):
            raise refused(weights.source, LCM)
        return
    if (other := of_weights(names)) and not (part in _NO_CHECKPOINTS and counts[part]):
        raise refused(weights.source, other)
    kind = _OTHER_FILES[part] if counts[part] else f"something else: keys like {min(names, default='none')}"
    raise ValueError(f"{weights.source} is {kind}; {EXPECTED}")


def _family(weights: Weights) -> str:
    """Tell "sd1", "sd2" and "sdxl" apart by shapes alone."""
    path, shapes = weights.source, [weights.shape(key) for key in (_CONV_IN, _CONTEXT)]
    if [len(shape) for shape in shapes] != [4, 2]:
        raise ValueError(f"{path} has a U-Net whose first weights have the shapes {shapes}; {EXPECTED}")
    (width, channels, _, _), (_, text_width) = shapes
    check_channels(channels, path)
    known = {}
    for family in ("sd1", "sd2", "sdxl"):
        config = read_config(shipped.CONFIGS / family, "unet/config.json")
        known[config["block_out_channels"][0], config["cross_attention_dim"]] = family
    if (width, text_width) == _REFINER:
        raise ValueError(f"{path} is SDXL's refiner, which cannot begin from noise; {EXPECTED}; choose SDXL's base")
    if (width, text_width) not in known:
        raise ValueError(f"the U-Net in {path} has width {width} and text width {text_width}; {EXPECTED}")
    family = known[width, text_width]
    if family == "sdxl":
        _check_xl(weights)
    elif any(name.startswith(_LABELS) for name in weights.names):
        raise ValueError(f"{path} is {_OTHER_FILES['label_emb.']}; {EXPECTED}")
    return family


def _check_xl(weights: Weights) -> None:
    """Raise ValueError if an XL checkpoint has other noise or other blocks than XL."""
    for name, (what, remedy) in _OTHER_NOISE.items():
        if name in weights.names:
            raise ValueError(f"{weights.source} is {what}; {EXPECTED}; {remedy}")
    depth = read_config(shipped.CONFIGS / "sdxl", "unet/config.json")["transformer_layers_per_block"][-1]
    blocks = {name.removeprefix(_DEEPEST).partition(".")[0] for name in weights.names if name.startswith(_DEEPEST)}
    if len(blocks) != depth:
        raise ValueError(
            f"{weights.source} is SDXL made smaller: its middle has {len(blocks)} transformer blocks, not {depth} "
            f"(SSD-1B, Vega); {EXPECTED}; save it as a diffusers folder"
        )


def _prediction_type(weights: Weights, family: str) -> str:
    """The type in the file's metadata (ModelSpec's or ComfyUI's key); for an SD 2.x file without, ComfyUI's guess."""
    said = weights.metadata.get("modelspec.prediction_type") or weights.metadata.get("modelspec.predict_key")
    if said:
        return "v_prediction" if said.startswith("v") else "epsilon"
    if family == "sdxl":
        return "v_prediction" if "v_pred" in weights.names else "epsilon"
    if family == "sd1" or _LAST_NORM not in weights.names:
        return "epsilon"
    guess = "v_prediction" if weights[_LAST_NORM].float().std(unbiased=False) > 0.09 else "epsilon"
    logger.warning(
        "%s does not state its prediction type; assuming %s; set prediction_type to override it", weights.source, guess
    )
    return guess


def _unet(weights: Weights, configs: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    config = read_config(configs, "unet/config.json")
    with init_empty_weights():
        model = UNet2DConditionModel.from_config(config)
    return model, convert_ldm_unet_checkpoint(weights.read("model.diffusion_model.", dtype), config)


def _vae(weights: Weights, configs: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    config = read_config(configs, "vae/config.json")
    with init_empty_weights():
        model = AutoencoderKL.from_config(config)
    return model, convert_ldm_vae_checkpoint(weights.read("first_stage_model.", dtype), config)


def _text_encoder(weights: Weights, configs: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """The only text encoder, or the first, from transformers' names of 2022 or open_clip's."""
    with init_empty_weights():
        model = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    for prefix in ("cond_stage_model.", "conditioner.embedders.0."):  # the latter of XL and SD-Turbo
        if found := weights.read(prefix, dtype):
            break
    open_clip = f"{prefix}model."
    if any(key.startswith(open_clip) for key in found):
        found = convert_open_clip_checkpoint(model, found, open_clip)
    else:
        found = convert_ldm_clip_checkpoint(found)
    rename = below_text_model(model)
    return model, {rename(key): weight for key, weight in found.items()}


def _text_encoder_2(weights: Weights, configs: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    with init_empty_weights():
        model = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(configs / "text_encoder_2"))
    prefix = "conditioner.embedders.1.model."
    found = convert_open_clip_checkpoint(model, weights.read(prefix, dtype), prefix)
    rename = below_text_model(model)
    return model, {rename(key): weight for key, weight in found.items()}
