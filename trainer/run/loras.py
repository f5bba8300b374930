"""The LoRA files of a run, or those of its whole models, whose weights are read safely even from untrusted files."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .paths import RunPaths, epoch_in


def read_lora(path: Path) -> dict[str, Tensor]:
    """The weights in a LoRA file.

    Raises:
        ValueError: it is not a complete safetensors file, or a weight is not finite.
    """
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"got LoRA file {path.name!r}, which cannot be read ({error}); expected a complete .safetensors file: "
            "download or save it again, and never use a .pt or .ckpt from somebody you do not trust"
        ) from error
    for name, weight in weights.items():
        if not torch.isfinite(weight.float()).all():
            raise ValueError(
                f"got LoRA file {path.name!r}, whose {name} contains NaN or infinity and would turn images black; "
                "expected finite weights: choose an earlier snapshot or another file"
            )
    return weights


def snapshots(run: RunPaths) -> dict[int, Path]:
    """Epoch -> LoRA file, including the latest."""
    files = sorted(run.snapshots.glob("epoch-*.safetensors"))
    kept = {epoch: path for path in files if (epoch := epoch_in(path)) is not None}
    if run.latest_lora.is_file():
        kept.setdefault(epoch_of(run.latest_lora), run.latest_lora)
    return kept


def epoch_of(path: Path) -> int:
    """The epoch in a LoRA's own metadata."""
    try:
        return int(_metadata(path)["epoch"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"got LoRA file {path.name!r}, which does not state its epoch; expected a run's LoRA"
        ) from error


def baked_strength(path: Path) -> float:
    """The strength that was baked into a recommended LoRA; 1 for any other."""
    return float(_metadata(path).get("strength", 1.0))


def network_of(path: Path) -> str:
    """What of a pipeline of diffusers it belongs to: "unet" or "transformer"."""
    return _metadata(path).get("network", "unet")  # files of 0.1.0, which trained U-Nets, do not say so


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
