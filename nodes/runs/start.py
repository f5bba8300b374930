"""Starts a run, reports its progress and waits for it; everything from ComfyUI is passed in."""

import atexit
import shutil
import threading
import time
from collections.abc import Callable

import torch

from comfy_tdpo.atomic_files import write_atomically

from ...trainer import job as jobs
from ...trainer.config import TrainConfig
from ...trainer.job import ENDED, Job, Status, TrainingFactory
from ...trainer.run import RunFolder
from ...trainer.run.paths import CONFIG, PROMPTS, TASTES
from .marks import Place, mark
from .prompts import Prompts, keep_written
from .registry import Fields, Runs, finite
from .resume import resumed
from .select import is_blank

SECONDS_TO_SAVE = 60  # for a training to finish its step and save a checkpoint when ComfyUI quits
SECONDS_BETWEEN_EVENTS = 0.2

Tell = Callable[[Fields], None]


def job_under_way(runs: Runs, run: RunFolder) -> Job | None:
    """The job that trains the run; a job that is stopping is waited for and does not count."""
    job = runs.job(run)
    if job is not None and job.status.state == "stopping":
        job.wait()
    return job if job is not None and job.status.state not in ENDED else None


def prepare(runs: Runs, run: RunFolder, config: TrainConfig, prompts: Prompts) -> None:
    """Create the folder of a new run, or update the configuration of one that resumes; `choose` has compared them."""
    if (run.path / CONFIG).exists() and not is_blank(runs, run):
        with run.lock():
            run.write_config(resumed(run.config, config))
        return
    blank = (run.path / CONFIG).exists()  # it has never trained, so nothing is lost
    if not blank:
        run.check_free()
    write_atomically(run.path / PROMPTS, lambda file: file.write_text("\n".join(prompts.words), encoding="utf-8"))
    config = config.model_copy(update={"prompts": str(run.path / PROMPTS)})
    if blank:
        with run.lock():
            run.sample_grid(0).unlink(missing_ok=True)
            shutil.rmtree(run.path / TASTES, ignore_errors=True)
            run.configure(config)
    else:
        run.create(config)
    keep_written(run.path, prompts)


def start(
    runs: Runs,
    run: RunFolder,
    factory: TrainingFactory,
    device: torch.device,
    place: Place,
    tell: Tell,
    wait: bool = False,
    because: str = "",
    widgets: Fields | None = None,
) -> Job:
    """Train on a separate thread, which calls `tell` with the details of each event tdpo.progress.

    wait: whether the graph waits for the end; because: why the run has another name than the node's, or empty;
    widgets: the values of the node's.
    """
    mark(run, place, wait, because, widgets)
    job = Job(run, factory, device)
    job.subscribe(lambda event, status: _keep(runs, run, event))
    job.subscribe(Teller(runs, run, tell))
    atexit.unregister(jobs.stop_all)
    atexit.register(jobs.stop_all, SECONDS_TO_SAVE)
    job.start()
    return job


def _keep(runs: Runs, run: RunFolder, event: str) -> None:
    """Share the LoRAs after each epoch; at the end, draw the plots, as the command line does."""
    if event == "phase":
        return
    runs.share_loras(run)
    if event == "end" and run.metrics():
        from ...trainer.plots.curves import save_plots

        save_plots(run)


class Teller:
    """Reports every epoch and the end, and the progress in between at most every SECONDS_BETWEEN_EVENTS."""

    def __init__(self, runs: Runs, run: RunFolder, tell: Tell):
        self.runs, self.run, self.tell = runs, run, tell
        self._last = 0.0
        self._seen: tuple[str, str | None] = ("", None)
        self._lock = threading.Lock()  # what is told last is the newest

    def __call__(self, event: str, status: Status) -> None:
        with self._lock:
            self._report(event, status)

    def _report(self, event: str, status: Status) -> None:
        now, seen = time.monotonic(), (status.phase, status.waits_for)
        if event == "phase" and seen == self._seen and now - self._last < SECONDS_BETWEEN_EVENTS:
            return
        self._last, self._seen = now, seen
        metrics = finite(status.metrics) if status.metrics else None
        self.tell(self.runs.status(self.run) | {"metrics": metrics})


# --- waiting ----------------------------------------------------------------------------------------------------------


def wait_for(job: Job, show: Callable[[int, int], None]) -> Status:
    """Wait for `job` to end, and call `show(done, total)` meanwhile, which never goes back.

    If `show` raises, which is how ComfyUI signals that the user cancelled, the job is stopped and saved first.

    Raises:
        RuntimeError: the job failed.
    """
    most = 0
    try:
        while (status := job.wait(SECONDS_BETWEEN_EVENTS)).state not in ENDED:
            done, total = _done(status)
            most = max(most, done)  # what is drawn before and after the updates belongs to neither half of an epoch
            show(most, total)
    except BaseException:
        job.stop()
        job.wait()
        raise
    job.wait()  # for what is still being written
    if status.state == "failed":
        raise RuntimeError(f"run {job.id!r} failed: {status.error}")
    return status


def _done(status: Status) -> tuple[int, int]:
    """Progress in hundredths of epochs: sampling is the first half of each, updating the second; training is both."""
    share = status.phase_done / status.phase_total if status.phase_total else 0.0
    begin, size = {"sampling": (0, 50), "updating": (50, 50), "training": (0, 100)}.get(status.phase, (0, 0))
    within = begin + int(size * share)
    return 100 * status.epoch + within, 100 * status.epochs
