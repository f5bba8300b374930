"""Which run a Train node refers to, and when the node would give a new result."""

import time
from dataclasses import dataclass

from ...trainer.alarm import ends_early
from ...trainer.config import TrainConfig
from ...trainer.job import ENDED
from ...trainer.recommend.files import is_current
from ...trainer.run import RunFolder
from ...trainer.run.paths import CONFIG
from ...trainer.run.tastes import changed_tastes
from .combos import AS_IT_IS, CONTINUE, NEW, RECOMMENDED
from .marks import mark_of
from .names import check_run_name, later_name
from .prompts import Prompts
from .registry import Fields, Runs
from .resume import difference

UNFINISHED = ("failed", "stopped", "interrupted")


@dataclass(frozen=True)
class Choice:
    """run: it need not exist yet; because: why it has another name than the node's, or empty."""

    run: RunFolder
    because: str = ""


def choose(runs: Runs, name: str, resume: str, config: TrainConfig, prompts: Prompts) -> Choice:
    """The run the node refers to.

    Raises:
        ValueError: it is needed and does not exist.
    """
    check_run_name(name)
    if resume == AS_IT_IS:
        return Choice(runs.find(name))
    if resume == NEW:
        return Choice(_newest_or_free(runs, name, config, prompts))
    return _same_or_next(runs, name, config, prompts)


def _same_or_next(runs: Runs, name: str, config: TrainConfig, prompts: Prompts) -> Choice:
    """The first of name, name-2, ... that has these settings, or may take them, or is free."""
    number, because = 1, ""
    while runs.exists(later_name(name, number)):
        run = runs.folder(later_name(name, number))
        why = "" if is_blank(runs, run) else _why_another(run, config, prompts)
        if not why:
            break
        because = f"Run {run.path.name!r} {why}."
        number += 1
    return Choice(runs.folder(later_name(name, number)), because)


def _why_another(run: RunFolder, config: TrainConfig, prompts: Prompts) -> str:
    """Why what is asked for cannot be the run, as a clause about it; empty if it can."""
    if changed := difference(run, config, prompts):
        return f"has other settings: {changed}"
    voted = changed_tastes(run, config) if is_done(run, config) else ""
    return f"has finished, and {voted}" if voted else ""


def _newest_or_free(runs: Runs, name: str, config: TrainConfig, prompts: Prompts) -> RunFolder:
    """The first free one of name, name-2, ...; or the last existing one, if it is blank or already trains the same."""
    number = 1
    while runs.exists(later_name(name, number)):
        number += 1
    if number > 1:
        last = runs.folder(later_name(name, number - 1))
        same = not difference(last, config, prompts) and not changed_tastes(last, config)
        if is_blank(runs, last) or (_is_settled(runs, last) and same):
            return last
    return runs.folder(later_name(name, number))


def _is_settled(runs: Runs, run: RunFolder) -> bool:
    return runs.status(run)["state"] in ("waiting", "running", "stopping", "finished")


def is_blank(runs: Runs, run: RunFolder) -> bool:
    """Whether the run has not trained yet and is not training, so that its settings may still be replaced."""
    job = runs.job(run)
    trained = bool(run.metrics()) or run.checkpoints.exists()
    return not trained and (job is None or job.status.state in ENDED)


def is_done(run: RunFolder, config: TrainConfig) -> bool:
    """Whether the run has everything that `config` asks for."""
    if not (run.path / CONFIG).exists():
        return False
    metrics = run.metrics()
    same_watch = run.config.overoptimisation.reward == config.overoptimisation.reward
    if len(metrics) < config.epochs and not (same_watch and ends_early(metrics, config)):
        return False
    return not config.output.recommend or is_current(run)


def token(runs: Runs, name: str, wait: bool, resume: str = CONTINUE, widgets: Fields | None = None) -> str:
    """A text that changes whenever a Train node with this run name and these `widgets` would give a new result.

    If the node waits, a missing run and a finished one count as the same: it gives the finished run in both cases. A
    run that ended before its time is resumed whenever the graph is queued, also if it ends in the same epoch again,
    unless other widgets than these started it: then the node means another run, or has all that it asks for.
    """
    states: list[str] = []
    number, unfinished = 1, False
    while runs.exists(later_name(name, number)):
        run = runs.folder(later_name(name, number))
        status = runs.status(run)
        goes_on = status["state"] in UNFINISHED and not _started_by_others(run, widgets or {})
        unfinished = goes_on or (unfinished and resume != NEW)  # a new one follows the last
        if not (wait and status["state"] == "finished"):
            states.append(f"{status['id']} {status['state']} {status['epoch']}")
        if run.recommended_lora.is_file():
            states.append(f"{status['id']} {RECOMMENDED} {run.recommended_lora.stat().st_mtime_ns}")
        number += 1
    if unfinished and resume != AS_IT_IS:
        states.append(str(time.monotonic_ns()))
    return ", ".join(states)


def _started_by_others(run: RunFolder, widgets: Fields) -> bool:
    """Whether the run was started by widgets of another value; those whose value comes along a wire are None."""
    before = mark_of(run).widgets
    return any(value is not None and before.get(name, value) != value for name, value in widgets.items())
