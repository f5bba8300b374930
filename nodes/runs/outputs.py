"""The results of a run so far, as outputs of a node. ComfyUI's images are float (B, H, W, 3) in [0, 1]."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...trainer.plots.curves import reward_figure
from ...trainer.run import RunFolder
from ...trainer.run.loras import read_lora
from .registry import newest_grid


def lora_weights(run: RunFolder) -> dict[str, Tensor]:
    """The newest LoRA. Before the first, no weights, which has the same effect as an untrained LoRA; none either of a
    run that trains all weights."""
    return read_lora(run.latest_lora) if run.latest_lora.is_file() and not run.trains_all else {}


def sample_image(run: RunFolder) -> Tensor:
    """The newest grid of samples, (1, H, W, 3); grey if there is none yet."""
    path = newest_grid(run)
    try:
        return as_tensor(Image.open(path)) if path else torch.full((1, 64, 64, 3), 0.5)
    except OSError as error:
        raise ValueError(f"got a sample grid that is damaged: '{path}' ({error}); delete it") from error


def plot_image(run: RunFolder) -> Tensor:
    """The rewards over the epochs, (1, H, W, 3)."""
    return as_tensor(reward_figure(run.metrics(), run.config))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).float()[None] / 255
