"""Finds the snapshot of a run that a graph asks for."""

from pathlib import Path

from ...trainer.metrics import reward_names
from ...trainer.recommend.files import read_choice
from ...trainer.run import EpochMetrics, RunFolder
from ...trainer.run.loras import snapshots
from .combos import BEST_TRAINING, EPOCH, LATEST, RECOMMENDED, SNAPSHOTS, check_choice


def find_snapshot(run: RunFolder, which: str, epoch: int) -> Path | None:
    """The file of a snapshot; None if the latest is asked for and there is none yet.

    Raises:
        ValueError: the run has no such snapshot.
    """
    check_choice("snapshot", which, SNAPSHOTS)
    if which == LATEST:
        return run.latest_lora if run.latest_lora.is_file() else None
    if which == RECOMMENDED:
        return _recommended(run)
    kept = snapshots(run)
    if which == EPOCH:
        if epoch not in kept:
            raise ValueError(
                f"run {run.path.name!r} has no snapshot of epoch {epoch}; expected one of those it has "
                f"({_listed(kept)}): lower output.samples_every (in settings of TDPO-R Train) to keep more"
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


def _recommended(run: RunFolder) -> Path:
    if run.recommended_lora.is_file():
        return run.recommended_lora
    choice = read_choice(run.recommendation)
    if choice is not None and choice.get("recommended") is None:
        raise ValueError(
            f"run {run.path.name!r} has no {RECOMMENDED} LoRA: none of its snapshots gained reward and kept the "
            "held-out reward of the base model; choose another snapshot, or train with a KL penalty (kl.coefficient in "
            "settings of TDPO-R Train)"
        )
    raise ValueError(
        f"run {run.path.name!r} has no {RECOMMENDED} LoRA yet; expected a run that looks for one when it finishes: add "
        "the line output.recommend = true to the settings of TDPO-R Train and queue the graph"
    )


def best_epoch(epochs: list[int], metrics: list[EpochMetrics], key: str) -> int:
    """The one of `epochs` whose LoRA draws the best images.

    The images of an epoch are drawn before its updates, so its LoRA is judged by those of the next epoch; the last
    epoch is judged by its own.
    """
    scores = {int(line["epoch"]): line[key] for line in metrics if key in line}
    return max(epochs, key=lambda epoch: scores.get(epoch + 1, scores.get(epoch, float("-inf"))))


def _listed(kept: dict[int, Path]) -> str:
    return ", ".join(map(str, sorted(kept))) or "none yet"
