"""The table of runs: what it shows of each beside its status, and how a run is deleted."""

import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from ...trainer.job import ENDED, forget_job
from ...trainer.metrics import is_curve
from ...trainer.run import RunFolder
from ...trainer.run.paths import CONFIG, LOCK, METRICS, PROMPTS
from .registry import Fields, NotEnded, Runs, finite, modified

ASIDE = ".tdpo-deleted-"  # begins the names of folders that are being deleted; no run has such a name
DOING = {"waiting": "waits for its turn", "running": "is training", "stopping": "is still stopping"}

_deleting = threading.Lock()


def table(runs: Runs) -> Fields:
    """A row for each run, newest first."""
    return {"rows": [_row(run) for run in runs.all()]}


def _row(run: RunFolder) -> Fields:
    files, size = contents(run.path)
    row: Fields = {"id": run.path.name, "files": files, "bytes": size}
    row["modified"] = modified(run.path / METRICS) or modified(run.path / CONFIG)
    try:
        config = run.config
        watched = config.overoptimisation.reward or next(iter(config.measured), None)
        return row | {"algorithm": config.algorithm, "watched": watched, "metrics": [_curves(m) for m in run.metrics()]}
    except (ValueError, OSError):  # its status says what is wrong with it
        return row | {"algorithm": "", "watched": None, "metrics": []}


def _curves(metrics: dict[str, float]) -> dict[str, float | None]:
    """Of an epoch's metrics, those that the chart draws: a table of many runs stays small."""
    return finite({key: value for key, value in metrics.items() if key == "epoch" or is_curve(key)})


def contents(folder: Path) -> tuple[int, int]:
    """How many files a folder has, and their bytes; links are counted and not followed."""
    files = size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a run that trains removes old checkpoints
                size += Path(parent, name).lstat().st_size
                files += 1
    return files, size


# --- deleting ---------------------------------------------------------------------------------------------------------


def delete(runs: Runs, run: RunFolder) -> Fields:
    """Delete the folder of a run and everything in it; what links in it point at stays, and so do its LoRAs in `loras`.

    Others see the run as it was, or not at all: its folder is renamed first.

    Raises:
        NotEnded: it trains or waits; ValueError: it is no run of ours, another process uses it, or files remain.
    """
    name = run.path.name
    _check_is_ours(runs, run)
    job = runs.job(run)
    if job is not None:
        state = job.status.state
        if state not in ENDED:
            raise NotEnded(f"run {name!r} {DOING[state]}; stop it, then delete it")
        job.wait()  # for what is still being written
    with _deleting:
        with run.lock():  # raises an error if another process trains it; Windows renames no folder with an open file
            pass
        aside = runs.root / f"{ASIDE}{uuid4().hex}"
        try:
            run.path.rename(aside)
        except OSError as error:
            raise ValueError(
                f"run {name!r} could not be deleted: {error.strerror}; close what uses its files, and try again"
            ) from error
        if job is not None:
            forget_job(job)
        for folder in runs.root.glob(f"{ASIDE}*"):  # also what is left of one that was interrupted
            shutil.rmtree(folder, ignore_errors=True)
    if aside.exists():
        raise ValueError(f"run {name!r} is deleted, but files of it remain in output/tdpo/{aside.name}: remove them")
    return {"id": name}


def _check_is_ours(runs: Runs, run: RunFolder) -> None:
    """Raise ValueError unless the run's folder lies in that of all runs, and has the files that each run has."""
    name = run.path.name
    if run.path.resolve() != runs.root.resolve() / name:
        raise ValueError(f"got run {name!r}, which is a link to another folder; delete the link yourself")
    for file in (CONFIG, PROMPTS):
        if (run.path / file).is_symlink() or not (run.path / file).is_file():
            raise ValueError(f"got folder {name!r} without the {file} that every run has; delete it yourself")
    if (run.path / LOCK).is_symlink():
        raise ValueError(f"got run {name!r}, whose {LOCK} is a link; delete it yourself")
