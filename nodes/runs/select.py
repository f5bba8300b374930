"""Which run a Train node refers to, and when the node would give a new result."""

from ...trainer.alarm import ends_early
from ...trainer.config import TrainConfig
from ...trainer.job import ENDED
from ...trainer.recommend.files import is_current
from ...trainer.run import RunFolder
from ...trainer.run.paths import CONFIG
from ...trainer.run.tastes import changed_tastes
from .combos import AS_IT_IS, NEW, RECOMMENDED
from .names import check_run_name, later_name
from .registry import Runs
from .resume import difference


def choose(runs: Runs, name: str, resume: str, config: TrainConfig, prompts: list[str]) -> RunFolder:
    """The run the node refers to, which need not exist yet.

    Raises:
        ValueError: a run of that name was started with other settings, or is needed and does not exist.
    """
    check_run_name(name)
    if resume == AS_IT_IS:
        return runs.find(name)
    if resume == NEW:
        return _newest_or_free(runs, name, config, prompts)
    run = runs.folder(name)
    if runs.exists(name) and not is_blank(runs, run):
        changed = difference(run, config, prompts)
        if changed:
            raise ValueError(
                f"run {name!r} was started with other settings: {changed}; change that back to resume it, set resume "
                f"to '{NEW}' to start {later_name(name, 2)!r}, or choose another run name"
            )
        if is_done(run, config) and (voted := changed_tastes(run, config)):
            raise ValueError(
                f"run {name!r} has finished, and {voted}; set resume to '{NEW}' to train on the votes of now, or to "
                f"'{AS_IT_IS}' to use the run"
            )
    return run


def _newest_or_free(runs: Runs, name: str, config: TrainConfig, prompts: list[str]) -> RunFolder:
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
    if len(metrics) < config.epochs and not ends_early(metrics, config):
        return False
    return not config.output.recommend or is_current(run)


def token(runs: Runs, name: str, wait: bool) -> str:
    """A text that changes whenever a Train node with this run name would give a new result.

    If the node waits, a missing run and a finished one count as the same: it gives the finished run in both cases.
    """
    states = []
    number = 1
    while runs.exists(later_name(name, number)):
        run = runs.folder(later_name(name, number))
        status = runs.status(run)
        if not (wait and status["state"] == "finished"):
            states.append(f"{status['id']} {status['state']} {status['epoch']}")
        if run.recommended_lora.is_file():
            states.append(f"{status['id']} {RECOMMENDED} {run.recommended_lora.stat().st_mtime_ns}")
        number += 1
    return ", ".join(states)
