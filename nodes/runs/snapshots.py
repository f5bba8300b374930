"""Finds the LoRA snapshots of a run and reads their weights, safely even from untrusted files."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...trainer.metrics import reward_names
from ...trainer.run import EpochMetrics, RunFolder
from ...trainer.run.paths import epoch_in
from .combos import BEST_TRAINING, EPOCH, LATEST, SNAPSHOTS, check_choice


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


def find_snapshot(run: RunFolder, which: str, epoch: int) -> Path | None:
    """The file of a snapshot; None if the latest is asked for and there is none yet.

    Raises:
        ValueError: the run has no such snapshot.
    """
    check_choice("snapshot", which, SNAPSHOTS)
    if which == LATEST:
        return run.latest_lora if run.latest_lora.is_file() else None
    kept = snapshots(run)
    if which == EPOCH:
        if epoch not in kept:
            raise ValueError(
                f"run {run.path.name!r} has no snapshot of epoch {epoch}; expected one of those it has "
                f"({_listed(kept)}): lower output.samples_every in Train's settings to keep more"
            )
        return kept[epoch]
    kind = "reward" if which == BEST_TRAINING else "eval"
    metrics = run.metrics()
    names = reward_names(metrics, kind)
    if not names or not kept:
        raise ValueError(
            f"run {run.path.name!r} has no {which} yet; expected a finished epoch of a run with such a reward"
        )
    return kept[best_epoch(list(kept), metrics, f"{kind}/{names[0]}/mean")]


def snapshots(run: RunFolder) -> dict[int, Path]:
    """Epoch -> LoRA file, including the latest."""
    files = sorted((run.path / "lora").glob("epoch-*.safetensors"))
    kept = {epoch: path for path in files if (epoch := epoch_in(path)) is not None}
    if run.latest_lora.is_file():
        kept.setdefault(epoch_of(run.latest_lora), run.latest_lora)
    return kept


def epoch_of(path: Path) -> int:
    """The epoch in a LoRA's own metadata."""
    try:
        with safe_open(path, "pt") as file:
            return int((file.metadata() or {})["epoch"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"got LoRA file {path.name!r}, which does not state its epoch; expected a run's LoRA"
        ) from error


def best_epoch(epochs: list[int], metrics: list[EpochMetrics], key: str) -> int:
    """The one of `epochs` whose LoRA draws the best images.

    The images of an epoch are drawn before its updates, so its LoRA is judged by those of the next epoch; the last
    epoch is judged by its own.
    """
    scores = {int(line["epoch"]): line[key] for line in metrics if key in line}
    return max(epochs, key=lambda epoch: scores.get(epoch + 1, scores.get(epoch, float("-inf"))))


def _listed(kept: dict[int, Path]) -> str:
    return ", ".join(map(str, sorted(kept))) or "none yet"
