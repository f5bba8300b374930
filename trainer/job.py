"""A run on a background thread: start, watch, stop, wait."""

import gc
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .alarm import alarm_of
from .pace import Pace
from .run import EpochMetrics, RunFolder
from .turns import Turns

if TYPE_CHECKING:  # code that only asks about jobs need not import all of the training
    from .state import Watch
    from .training import Training

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "stopping", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")
TrainingFactory = Callable[[RunFolder, threading.Event, "Watch"], "Training"]


@dataclass(frozen=True)
class Status:
    """The state and progress of a job.

    waits_for: the id of the job that trains on the device while this one waits for its turn; else None;
    epoch: finished epochs of `epochs`; phase: what the current epoch is doing, `phase_done` of `phase_total`, with a
    fraction for a micro-batch that is under way;
    eta_s: seconds the remaining epochs will take at the pace of the latest ones; during the first, an estimate that
    counts that epoch too, None before its first sample is done;
    lora: the newest LoRA file, None before there is one; error: one sentence if the state is "failed";
    overoptimised: the epoch since which the run overoptimises, None if it does not.
    """

    id: str
    state: State
    epoch: int
    epochs: int
    phase: str = ""
    phase_done: float = 0
    phase_total: int = 0
    waits_for: str | None = None
    eta_s: float | None = None
    metrics: EpochMetrics | None = None
    lora: Path | None = None
    overoptimised: int | None = None
    error: str | None = None


Subscriber = Callable[[str, Status], None]  # (event: "phase" | "epoch" | "end", status)


class Job:
    """One run, trained on its own thread.

    Args:
        run: the run's folder, new or to be resumed; its name is the job's id.
        factory: makes the Training inside the thread, so that slow loading and errors happen there.
        device: where it trains. One job at a time trains on a device; others wait for their turn.
    """

    def __init__(self, run: RunFolder, factory: TrainingFactory, device: torch.device | str = "cpu"):
        self.run, self._factory = run, factory
        self.device = _numbered(device)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._subscribers: list[Subscriber] = []
        self._pace, self._began = Pace(), 0.0
        self._thread = threading.Thread(target=self._work, name=f"tdpo-{self.id}", daemon=True)
        config, metrics = run.config, run.metrics()
        lora = run.latest_lora if run.latest_lora.exists() else None
        self._status = Status(self.id, "waiting", len(metrics), config.epochs, lora=lora, overoptimised=_since(metrics))

    @property
    def id(self) -> str:
        return self.run.path.resolve().name

    @property
    def status(self) -> Status:
        with self._lock:
            return self._seen(self._status)

    def _seen(self, status: Status) -> Status:
        """The status to report: a job that was asked to stop is "stopping" until it ends, whatever it still does."""
        if status.state in ENDED:
            return status
        if self._stop.is_set():
            return replace(status, state="stopping")
        first = _turns.first(self.device) if status.state == "waiting" else None
        return replace(status, waits_for=first.id if first and first is not self else None)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber(event, status)` on every event, from the thread of this job or of one that it waited for;
        returns a function that unsubscribes.

        Exceptions of a subscriber are logged and affect neither the training nor other subscribers.
        """
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def start(self) -> None:
        """Start training, or wait for the jobs on the same device that were started before.

        Raises:
            ValueError: this job was started before, or another one with its id has not ended.
        """
        if self._thread.ident is not None:
            raise ValueError(f"job {self.id!r} was started before; make a new one to resume its run")
        _register(self)
        self._thread.start()

    def stop(self) -> None:
        """Ask the job to stop after the current micro-batch and save everything; returns at once."""
        self._stop.set()
        _turns.look_again()

    def wait(self, timeout: float | None = None) -> Status:
        """Wait at most `timeout` seconds for a started job to end, and return its status."""
        self._thread.join(timeout)
        return self.status

    def _work(self) -> None:
        self._change("phase")  # it may have to wait
        outcome: dict[str, Any] = {"state": "failed", "error": "its thread was ended"}
        try:
            stopped = not _turns.wait(self.device, self, self._stop.is_set) or self._train()
            outcome = {"state": "stopped" if stopped else "finished"}
        except Exception as error:  # any error is reported through the job's status
            logger.exception("run %s failed", self.id)
            outcome = {"state": "failed", "error": _sentence(error)}
        finally:
            del self._factory
            _free(self.device)  # before the next job loads its models
            _turns.leave(self.device, self)
            self._change("end", **outcome)
        for job in _turns.everybody():
            job._change("phase")  # those that wait now wait for another one

    def _train(self) -> bool:
        self._change("phase", state="running", phase="loading")
        training = self._factory(self.run, self._stop, self._watch)
        self._began = time.monotonic()
        for metrics in training.epochs():
            lora = self.run.latest_lora if self.run.latest_lora.exists() else None
            changes = {"metrics": metrics, "lora": lora, "overoptimised": _since([metrics]), "eta_s": self._eta()}
            self._change("epoch", epoch=int(metrics["epoch"]), **changes)
        return training.stopped or self._recommend(training)

    def _recommend(self, training: "Training") -> bool:
        """Find the LoRA to use, if the run asks for that; whether it was stopped meanwhile."""
        if not self.run.config.output.recommend:
            return False
        from .recommend.work import after_training
        from .training import Stopped

        try:
            after_training(training, self._watch)
        except Stopped:
            return True
        return False

    def _watch(self, phase: str, done: float, total: int) -> None:
        self._pace.see(phase, done, total, time.monotonic())
        changes: dict[str, Any] = {}
        if self.status.epoch >= self.status.epochs:  # after the training, as when the LoRA to use is chosen
            changes["eta_s"] = self._pace.left(done, total)
        elif not self.status.epoch and (epoch := self._pace.epoch()) is not None:
            changes["eta_s"] = max(self.status.epochs * epoch - (time.monotonic() - self._began), 0.0)
        self._change("phase", phase=phase, phase_done=done, phase_total=total, **changes)

    def _eta(self) -> float | None:
        """Seconds for the remaining epochs, at the mean pace of the last five."""
        seconds = [metrics["time/epoch_s"] for metrics in self.run.metrics()[-5:]]
        left = self.status.epochs - len(self.run.metrics())
        return left * sum(seconds) / len(seconds) if seconds else None

    def _change(self, event: str, **changes: Any) -> None:
        with self._lock:
            self._status = replace(self._status, **changes)
            status = self._seen(self._status)
        for subscriber in list(self._subscribers):
            try:
                subscriber(event, status)
            except Exception:  # a subscriber's error must not end the training
                logger.exception("a subscriber of run %s failed", self.id)


def _free(device: torch.device) -> None:
    """Free what an ended training held: it refers to itself, so it goes only when garbage is collected."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if hasattr(torch, "accelerator") and hasattr(torch.accelerator, "empty_host_cache"):  # not in older releases
            torch.accelerator.empty_host_cache()  # memory that was pinned


def _since(metrics: list[EpochMetrics]) -> int | None:
    alarm = alarm_of(metrics)
    return alarm.since if alarm else None


def _numbered(device: torch.device | str) -> torch.device:
    """The device with its index; without one, it is the first."""
    device = torch.device(device)
    return torch.device(device.type, device.index or 0)


def _sentence(error: Exception) -> str:
    from comfy_tdpo.memory.running_out import out_of_memory  # loads accelerate

    if out_of_memory(error):
        return (
            "out of memory: lower resolution, micro_batch or decode_batch, set policy.gradient_checkpointing to true, "
            "set precision to fp16 or bf16, set reward_precision to bf16, or close other programs that use the device; "
            "everything saved so far is intact"
        )
    text = (
        str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    )  # the former are for users
    return " ".join(text.split())


_jobs: dict[str, Job] = {}
_turns: Turns[Job] = Turns()
_registry_lock = threading.Lock()


def find_job(job_id: str) -> Job | None:
    """The job with this id in this process, running or ended."""
    return _jobs.get(job_id)


def forget_job(job: Job) -> None:
    """Forget an ended job whose run is gone, as another run may take its id."""
    with _registry_lock:
        if _jobs.get(job.id) is job:
            del _jobs[job.id]


def job_on(device: torch.device | str) -> Job | None:
    """The job that is training on this device."""
    return _turns.first(_numbered(device))


def stop_all(timeout: float) -> None:
    """Before the process ends, ask every job to stop, and wait at most `timeout` seconds in total for them to save."""
    jobs, end = _turns.everybody(), time.monotonic() + timeout
    for job in jobs:
        job.stop()
    for job in jobs:
        job.wait(max(0.0, end - time.monotonic()))


def _register(job: Job) -> None:
    with _registry_lock:
        if _jobs.get(job.id) in _turns.everybody():
            raise ValueError(f"another run named {job.id!r} is training or waiting; stop it or wait for it")
        _jobs[job.id] = job
        _turns.join(job.device, job)
