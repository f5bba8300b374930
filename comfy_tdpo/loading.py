"""Stable Diffusion 1.x and 2.x from wherever a user has it: a diffusers folder, a hub id, or one .safetensors file.

A single file carries weights only. What else a pipeline needs lies beside this module: each family's component
configurations in configs/, as published with the models, and CLIP's vocabulary in open_clip. So a file loads offline.

Deviations from diffusers' `from_single_file`, on purpose:
- every weight must arrive: diffusers leaves a missing one uninitialised;
- an SD 2.x file that does not say how it predicts is taken as ComfyUI takes it. diffusers' own rule, v-prediction
  unless `global_step` is 875000, is brittle by its own comment, and most files carry no `global_step`;
- "!" in a prompt stays the word "!" although SD 2.x pads with that token: open_clip and ComfyUI tokenize it so.
"""

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .quiet import quiet_loading

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
EXPECTED = "expected Stable Diffusion 1.x or 2.x: a diffusers folder, its hub id, or a whole .safetensors checkpoint"

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
_OTHER_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Components:
    """What of Stable Diffusion is trained and sampled; modules in evaluation mode, without gradients."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    source: str


def load_components(model: str, dtype: torch.dtype = torch.float32, prediction_type: str | None = None) -> Components:
    """Load `model` on the CPU with its weights in `dtype`.

    model: a diffusers folder, a .safetensors checkpoint in the original layout, or a hub id "owner/name".
    prediction_type: "epsilon", "v_prediction" or "sample", where the model itself says nothing or is wrong.
    Raises ValueError when the model cannot be had or is not Stable Diffusion 1.x or 2.x for text to image.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type is {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")
    path = Path(model).expanduser()
    if path.is_file():
        parts = _load_file(path, dtype, prediction_type)
    else:
        parts = _load_folder(path if path.is_dir() else _download(model, dtype), dtype, prediction_type)
    for name in ("unet", "vae", "text_encoder"):
        parts[name].eval().requires_grad_(False)
    return Components(**parts, source=model)


# --- a diffusers folder, here or on the hub


def _download(repo: str, dtype: torch.dtype) -> Path:
    """The hub's folder of `repo`, from the cache where it is there; only the files that are loaded."""
    suffix = Path(repo).suffix
    if suffix in (".safetensors", *_OTHER_SUFFIXES) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        raise ValueError(f"no file or folder {repo!r}; {EXPECTED}; check the path")
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    variant = None if dtype == torch.float32 else "fp16"
    try:
        _check_index(Path(hf_hub_download(repo, "model_index.json")))
        return Path(StableDiffusionPipeline.download(repo, variant=variant, use_safetensors=True, **unused))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{repo!r} is no file or folder here, and as a hub id it cannot be had: {reason}; {EXPECTED}; "
            "check the name, the connection and HF_HUB_OFFLINE, or log in with `hf auth login` where access is gated"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype, prediction_type: str | None) -> dict:
    _check_index(_required(folder, "model_index.json"))
    _check_channels(_read_json(_required(folder, "unet/config.json")).get("in_channels", 4), folder)
    scheduler = _required(folder, "scheduler/scheduler_config.json")
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        _required(folder, "tokenizer/vocab.json")
        _required(folder, "tokenizer/merges.txt")
    return {
        "unet": _from_pretrained(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        "vae": _vae_of_folder(folder / "vae", dtype),
        "text_encoder": _from_pretrained(CLIPTextModel, folder / "text_encoder").to(dtype),
        "tokenizer": _tokenizer(folder / "tokenizer"),
        "scheduler": _scheduler(scheduler, prediction_type),
    }


def _check_index(index: Path) -> None:
    """The pipeline's classes, before anything big is loaded."""
    parts = _read_json(index)
    kind = parts.get("_class_name")
    for name, expected in Components.__annotations__.items():
        if name in ("scheduler", "source"):
            continue
        part = parts.get(name)
        found = part[-1] if isinstance(part, list) and part else part  # [library, class]
        if str(found).removesuffix("Fast") != expected.__name__:
            raise ValueError(f"{index.parent} is a {kind} whose {name} is {found}, not {expected.__name__}; {EXPECTED}")
    if "text_encoder_2" in parts:
        raise ValueError(f"{index.parent} is a {kind} with two text encoders (SDXL); {EXPECTED}")


def _required(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder} lacks {name}; {EXPECTED}; fetch or save the whole folder again")
    return folder / name


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch or save the whole folder again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {shorten(repr(values), 60)}; expected a JSON object; fetch the folder again")
    return values


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Inside the block whatever a library makes of a bad configuration becomes one error that names `path`."""
    try:
        yield
    except Exception as error:  # a constructor fed with odd values raises anything
        reason = shorten(str(error), 300)
        raise ValueError(f"{path} cannot be loaded: {reason}; {EXPECTED}; fetch or save it again") from error


def _vae_of_folder(folder: Path, dtype: torch.dtype) -> nn.Module:
    vae = _from_pretrained(AutoencoderKL, folder, torch_dtype=dtype)
    if not isinstance(vae.config.scaling_factor, int | float):
        got = vae.config.scaling_factor
        raise ValueError(f"{folder / 'config.json'} has scaling_factor {got!r}; expected a number, as 0.18215")
    return vae


def _tokenizer(folder: Path) -> CLIPTokenizer:
    with _naming(folder):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _from_pretrained(cls: Any, folder: Path, **kwargs) -> nn.Module:
    _required(folder.parent, f"{folder.name}/config.json")
    variant = _variant(folder)
    with quiet_loading(), _naming(folder):
        model, found = cls.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **kwargs,
        )
    if found["missing_keys"]:
        raise ValueError(_missing(folder, cls, sorted(found["missing_keys"])))
    return model


def _variant(folder: Path) -> str | None:
    """None where plain weights lie in `folder`, "fp16" where only those do; their headers are sound."""
    files = {path.name.removesuffix(".safetensors"): path for path in sorted(folder.glob("*.safetensors"))}
    plain = [path for stem, path in files.items() if "." not in stem]
    half = [path for stem, path in files.items() if ".fp16" in stem]
    if not plain and not half:
        names = ", ".join(path.name for path in sorted(folder.glob("*"))) or "nothing"
        raise ValueError(
            f"{folder} holds no weights as .safetensors or .fp16.safetensors (got {names}); "
            "convert them with `pipeline.save_pretrained(folder, safe_serialization=True)`"
        )
    for path in plain or half:
        with _open(path):
            pass
    return None if plain else "fp16"


def _scheduler(path: Path, prediction_type: str | None) -> DDIMScheduler:
    """DDIM on the noise schedule in the file `path`. Latents are not in [-1, 1]: never clipped."""
    changes = {"clip_sample": False} | ({"prediction_type": prediction_type} if prediction_type else {})
    config = _read_json(path) | changes
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"{path} has prediction_type {kind!r}; expected one of {', '.join(PREDICTION_TYPES)}")
    with _naming(path):
        return DDIMScheduler.from_config(config)


def _check_channels(channels: int, source: Path) -> None:
    if channels != 4:
        raise ValueError(
            f"the U-Net in {source} takes {channels} channels (inpainting, depth or editing); expected the 4 of text "
            "to image; choose the base model of the same family"
        )


def _missing(source: Path, cls: type, keys: list[str]) -> str:
    return (
        f"{source} lacks {len(keys)} weights of the {cls.__name__}, the first is {keys[0]}; {EXPECTED}; "
        "fetch the model again, or choose a version that is not pruned to one component"
    )


# --- a single file in the original layout


def _load_file(path: Path, dtype: torch.dtype, prediction_type: str | None) -> dict:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file; {EXPECTED}; convert it to .safetensors first (a pickled .ckpt, .pt or "
            ".bin file can run code when it is loaded)"
        )
    with _open(path) as file:
        family = _family(file, path)
        prediction_type = prediction_type or _prediction_type(file, family, path)
        configs = CONFIGS / ("sd2-v" if (family, prediction_type) == ("sd2", "v_prediction") else family)
        makers = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}
        try:
            networks = {name: make(file, configs) for name, make in makers.items()}
        except KeyError as error:  # diffusers' conversion takes a layer's bias for granted where its weight is
            raise ValueError(f"{path} lacks {error.args[0]}; {EXPECTED}; fetch the model again") from error
        for network, weights in networks.values():
            _check_weights(path, network, weights)
        return {name: _fill(network, weights, dtype) for name, (network, weights) in networks.items()} | {
            "tokenizer": clip_tokenizer(configs),
            "scheduler": _scheduler(configs / "scheduler" / "scheduler_config.json", prediction_type),
        }


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is no sound .safetensors file: {error}; it looks like an unfinished "
            "download or another format; fetch it again"
        ) from error


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
    _check_channels(channels, path)
    known = {}
    for family in ("sd1", "sd2"):
        config = _config(CONFIGS / family, "unet/config.json")
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


def _config(configs: Path, name: str) -> dict:
    return json.loads((configs / name).read_text(encoding="utf-8"))


def _read(file: safe_open, prefix: str) -> dict[str, Tensor]:
    return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}


def _unet(file: safe_open, configs: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    config = _config(configs, "unet/config.json")
    with init_empty_weights():
        model = UNet2DConditionModel.from_config(config)
    return model, convert_ldm_unet_checkpoint(_read(file, "model.diffusion_model."), config)


def _vae(file: safe_open, configs: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    config = _config(configs, "vae/config.json")
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


def _check_weights(path: Path, network: nn.Module, weights: dict[str, Tensor]) -> None:
    expected = network.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise ValueError(_missing(path, type(network), missing))
    for key, empty in expected.items():
        if weights[key].shape != empty.shape:
            got, want = tuple(weights[key].shape), tuple(empty.shape)
            raise ValueError(f"{key} of the {type(network).__name__} in {path} is {got}, not {want}; {EXPECTED}")


def _fill(network: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """`network`, made without memory, with its weights copied out of the file in `dtype`."""
    network.load_state_dict({key: weights[key].to(dtype, copy=True) for key in network.state_dict()}, assign=True)
    return network


def clip_tokenizer(configs: Path) -> CLIPTokenizer:
    """CLIP's tokenizer, cut and padded as the family of `configs` does."""
    config = _config(configs, "tokenizer/tokenizer_config.json")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in _vocabulary().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=config["model_max_length"])
    # after loading: given at loading, "!" would become a special token and swallow every "!" of a prompt
    tokenizer.pad_token = config["pad_token"]
    return tokenizer


@cache
def _vocabulary() -> dict[str, str]:
    """A CLIP tokenizer's two files, out of open_clip's vocabulary."""
    from open_clip.tokenizer import SimpleTokenizer  # here: importing open_clip takes seconds

    clip = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    numbers = {names.get(token, token): number for token, number in clip.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in clip.bpe_ranks)]
    return {"vocab.json": json.dumps(numbers), "merges.txt": "\n".join(merges) + "\n"}
