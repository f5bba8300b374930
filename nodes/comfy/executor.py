"""What the Train node does on ComfyUI's executor: everything except the training itself, which has its own thread."""

import signal
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from server import PromptServer

from ...trainer.job import TrainingFactory, job_on
from ...trainer.run import RunFolder
from ..runs.combos import AS_IT_IS
from ..runs.marks import Place, mark_unheeded
from ..runs.resume import unheeded
from ..runs.select import choose, is_done
from ..runs.settings import Wanted
from ..runs.start import job_under_way, prepare, start, wait_for
from .folders import all_runs
from .models_in import Wires


def train(wires: Wires, wanted: Wanted, name: str, resume: str, wait: bool, place: Place) -> RunFolder:
    """Choose the run and start it; with `wait`, return only when it has ended.

    A run that is training already keeps its settings, and its node says which of them were meant to change; with
    `wait`, it then resumes with those asked for.
    """
    runs, device = all_runs(), comfy.model_management.get_torch_device()
    config, prompts = wanted.config(), wanted.prompts()
    choice = choose(runs, name, resume, config, prompts)
    run = choice.run
    if resume == AS_IT_IS:
        return run
    job = job_under_way(runs, run)
    changes = unheeded(run, config) if job else ""
    mark_unheeded(run, changes)
    if changes:
        tell(runs.status(run))
    if is_done(run, config):
        return run
    if job is None:
        factory = wires.factory(config, prompts, device)  # in main memory until the device has been cleared
        prepare(runs, run, config, prompts)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        _save_before_quitting()
        after = _after_clearing(factory, device)
        job = start(runs, run, after, device, place, tell, wait, choice.because, wanted.widgets)
    if wait:
        bar = comfy.utils.ProgressBar(100 * config.epochs)
        status = wait_for(job, bar.update_absolute)
        if changes and status.state == "finished":
            return train(wires, wanted, name, resume, wait, place)
    return run


def _after_clearing(factory: TrainingFactory, device: torch.device) -> TrainingFactory:
    """`factory`, for a run that may wait behind others: what was loaded meanwhile is unloaded when its turn comes.

    ComfyUI does that on its own thread, as soon as no graph is running.
    """
    waits = job_on(device) is not None

    def make(*how: Any) -> Any:
        if waits:
            PromptServer.instance.prompt_queue.set_flag("unload_models", True)
        return factory(*how)

    return make


def tell(detail: dict[str, Any]) -> None:
    """Send an event to every browser, from any thread."""
    if not PromptServer.instance.loop.is_closed():  # as it is while ComfyUI ends, in versions that use asyncio.run
        PromptServer.instance.send_sync("tdpo.progress", detail)


# --- quitting ---------------------------------------------------------------------------------------------------------


def _save_before_quitting() -> None:
    """Make sure that trainings are saved when ComfyUI ends.

    A normal exit and Ctrl+C run the `atexit` handlers, which stop all jobs. SIGTERM, as sent by service managers, would
    kill ComfyUI at once; from the first training on, it acts like Ctrl+C, unless it already has a handler. Signal
    handlers can only be set on the main thread, where ComfyUI's server loop runs.
    """
    PromptServer.instance.loop.call_soon_threadsafe(_take_sigterm)


def _take_sigterm() -> None:
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
