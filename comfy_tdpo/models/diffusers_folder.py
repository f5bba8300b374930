"""Stable Diffusion from a folder that diffusers saved, on this machine or on the hub."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..quiet import quiet_loading
from .files import EXPECTED, PICKLE_SUFFIXES, naming, read_json, required
from .scheduler import load_scheduler
from .weights import check_channels, missing_weights, open_weights

# What a pipeline of Stable Diffusion is made of, besides its scheduler.
_CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
}


def download(repo: str, dtype: torch.dtype) -> Path:
    """The hub's folder of `repo`, from the cache where it is there; only the files that are loaded."""
    suffix = Path(repo).suffix
    if suffix in (".safetensors", *PICKLE_SUFFIXES) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
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


def load_folder(folder: Path, dtype: torch.dtype, prediction_type: str | None) -> dict:
    _check_index(required(folder, "model_index.json"))
    check_channels(read_json(required(folder, "unet/config.json")).get("in_channels", 4), folder)
    scheduler = required(folder, "scheduler/scheduler_config.json")
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        required(folder, "tokenizer/vocab.json")
        required(folder, "tokenizer/merges.txt")
    return {
        "unet": _from_pretrained(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        "vae": _vae_of_folder(folder / "vae", dtype),
        "text_encoder": _from_pretrained(CLIPTextModel, folder / "text_encoder").to(dtype),
        "tokenizer": _tokenizer(folder / "tokenizer"),
        "scheduler": load_scheduler(scheduler, prediction_type),
    }


def _check_index(index: Path) -> None:
    """The pipeline's classes, before anything big is loaded."""
    parts = read_json(index)
    kind = parts.get("_class_name")
    for name, expected in _CLASSES.items():
        part = parts.get(name)
        found = part[-1] if isinstance(part, list) and part else part  # [library, class]
        if str(found).removesuffix("Fast") != expected.__name__:
            raise ValueError(f"{index.parent} is a {kind} whose {name} is {found}, not {expected.__name__}; {EXPECTED}")
    if "text_encoder_2" in parts:
        raise ValueError(f"{index.parent} is a {kind} with two text encoders (SDXL); {EXPECTED}")


def _vae_of_folder(folder: Path, dtype: torch.dtype) -> nn.Module:
    vae = _from_pretrained(AutoencoderKL, folder, torch_dtype=dtype)
    if not isinstance(vae.config.scaling_factor, int | float):
        got = vae.config.scaling_factor
        raise ValueError(f"{folder / 'config.json'} has scaling_factor {got!r}; expected a number, as 0.18215")
    return vae


def _tokenizer(folder: Path) -> CLIPTokenizer:
    with naming(folder):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _from_pretrained(cls: Any, folder: Path, **kwargs) -> nn.Module:
    required(folder.parent, f"{folder.name}/config.json")
    variant = _variant(folder)
    with quiet_loading(), naming(folder):
        model, found = cls.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **kwargs,
        )
    if found["missing_keys"]:
        raise ValueError(missing_weights(folder, cls, sorted(found["missing_keys"])))
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
        with open_weights(path):
            pass
    return None if plain else "fp16"
