"""Finds the snapshot of a run that a graph asks for.

A graph is often queued before the run has what it asks for: in background mode, after a Stop, or without a held-out
reward. Then the newest LoRA stands in, and the node says so.
"""

from dataclasses import dataclass
from pathlib import Path

from ...trainer.metrics import reward_names
from ...trainer.recommend.files import read_choice
from ...trainer.run import EpochMetrics, RunFolder
from ...trainer.run.loras import snapshots
from .combos import BEST_TRAINING, EPOCH, LATEST, RECOMMENDED, SNAPSHOTS, check_choice


@dataclass(frozen=True)
class Found:
    """file: of the LoRA, None if the model is to stay as it is; note: why it is not the one asked for, or empty."""

    file: Path | None
    note: str = ""


def find_snapshot(run: RunFolder, which: str, epoch: int) -> Found:
    """The snapshot to use.

    Raises:
        ValueError: the run has no snapshot of the epoch that is asked for, though it has others.
    """
    check_choice("snapshot", which, SNAPSHOTS)
    latest = Found(run.latest_lora if run.latest_lora.is_file() else None)
    kept = snapshots(run)
    if which == LATEST or not kept:
        return latest if latest.file else Found(None, "no LoRA yet")
    if which == RECOMMENDED:
        return _recommended(run, latest)
    if which == EPOCH:
        return Found(_of_epoch(run, kept, epoch))
    metrics = run.metrics()
    kind = "reward" if which == BEST_TRAINING else "eval"
    names = reward_names(metrics, kind)
    if not names:
        return Found(latest.file, "no held-out reward was measured, so the latest")
    name = next((name for name in run.config.measured if kind == "eval" and name in names), names[0])
    return Found(kept[best_epoch(list(kept), metrics, f"{kind}/{name}/mean")])


def _recommended(run: RunFolder, latest: Found) -> Found:
    if run.recommended_lora.is_file():
        return Found(run.recommended_lora)
    choice = read_choice(run.recommendation)
    if choice is not None and choice.get("recommended") is None:
        return Found(None, "no snapshot gained reward and kept the held-out reward, so none is recommended")
    return Found(latest.file, "none is recommended yet, so the latest")


def _of_epoch(run: RunFolder, kept: dict[int, Path], epoch: int) -> Path:
    if epoch not in kept:
        known = ", ".join(map(str, sorted(kept)))
        raise ValueError(
            f"run {run.path.name!r} has no snapshot of epoch {epoch}; expected one of those it has ({known}): lower "
            "output.samples_every (in settings of TDPO-R Train) to keep more"
        )
    return kept[epoch]


def best_epoch(epochs: list[int], metrics: list[EpochMetrics], key: str) -> int:
    """The one of `epochs` whose LoRA draws the best images.

    The images of an epoch are drawn before its updates, so its LoRA is judged by those of the next epoch; the last
    epoch is judged by its own.
    """
    scores = {int(line["epoch"]): line[key] for line in metrics if key in line}
    return max(epochs, key=lambda epoch: scores.get(epoch + 1, scores.get(epoch, float("-inf"))))
