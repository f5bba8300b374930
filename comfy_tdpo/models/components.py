"""Loading Stable Diffusion 1.x, 2.x and XL from a diffusers folder, a hub id, or one .safetensors file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .diffusers_folder import checked_classes, configurations, download, load_folder, pipeline_class
from .files import required
from .scheduler import PREDICTION_TYPES, load_scheduler
from .single_file import load_file, outline_file


@dataclass(frozen=True)
class Components:
    """The parts of Stable Diffusion that are used here; modules are frozen and in evaluation mode.

    text_encoder_2, tokenizer_2: only XL has them.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    source: str
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None


def load_components(model: str, dtype: torch.dtype = torch.float32, prediction_type: str | None = None) -> Components:
    """Load `model` on the CPU with its weights in `dtype`.

    model: a diffusers folder, a .safetensors checkpoint in the original layout, or a hub id "owner/name".
    prediction_type: "epsilon", "v_prediction" or "sample", for a model whose configuration lacks it or is wrong.
    Raises ValueError if the model cannot be loaded, or is not a text-to-image model of Stable Diffusion 1.x, 2.x or XL.
    """
    _check(prediction_type)
    path = Path(model).expanduser()
    if path.is_file():
        parts = load_file(path, dtype, prediction_type)
    else:
        folder = path if path.is_dir() else download(model, dtype, pipeline_class)
        parts = load_folder(folder, dtype, prediction_type)
    return Components(**parts, source=model)


def outline(model: str, prediction_type: str | None = None) -> tuple[DDIMScheduler, Path]:
    """Its noise schedule, and a folder with its configurations; arguments and errors as of `load_components`."""
    _check(prediction_type)
    path = Path(model).expanduser()
    if path.is_file():
        return outline_file(path, prediction_type)
    configs, of_schedule = configurations(model, checked_classes)
    return load_scheduler(required(of_schedule, "scheduler/scheduler_config.json"), prediction_type), configs


def _check(prediction_type: str | None) -> None:
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type is {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")
