"""Whether a run can resume with the settings that a node asks for, and what its configuration then is.

Runs with the same settings, including the seed, give the same results, so there is no need to tell such runs apart.
"""

from comfy_tdpo.clean_text import one_line

from ...trainer.config import TrainConfig, plain_values
from ...trainer.config.changes import differences, may_change
from ...trainer.run import RunFolder
from .prompts import Prompts, written_in
from .settings import INPUTS, NUMBERS

# The name of a MODEL includes a digest of its weights, so it always counts. A run keeps its prompts in its own files,
# so these names never count; the training prompts themselves are compared.
ALWAYS, NEVER = ("model",), ("prompts", "grid_prompts")


def difference(run: RunFolder, config: TrainConfig, prompts: Prompts) -> str:
    """What in `config` and `prompts` keeps `run` from resuming with them; empty if nothing does.

    Of several differences, one that an input or a wire of the node sets is named first.
    """
    before = run.config
    counting = [
        change for name, change in _changes(before, config) if name in ALWAYS or not (name in NEVER or may_change(name))
    ]
    if counting:
        return counting[0]
    return _difference_of_prompts([one_line(prompt) for prompt in run.prompts(before)], written_in(run.path), prompts)


def unheeded(run: RunFolder, config: TrainConfig) -> str:
    """What in `config` the run, which is training, would take only when it resumes; empty if there is nothing."""
    return "; ".join(change for name, change in _changes(run.config, config) if name not in NEVER)


def _changes(before: TrainConfig, now: TrainConfig) -> list[tuple[str, str]]:
    """Each setting that differs and how, those that an input or a wire of the node sets first."""
    found = differences(plain_values(now), plain_values(before))
    names = sorted(found, key=lambda name: (name not in (*INPUTS, *NUMBERS), name))
    return [(name, "{} was {!r} and is {!r}".format(name, *found[name])) for name in names]


def _difference_of_prompts(words: list[str], written: dict[str, str], now: Prompts) -> str:
    """The same for prompts: the `words` that a run keeps, and those of them that were `written` otherwise."""
    if words == now.words:
        return "" if written == now.written else "the weights in its prompts were different"
    if now.written and words == [now.for_clip(own) for own in now.words]:
        return "its rewards read the weights in its prompts as words, as version 0.1.0 did"
    return "its prompts were different"


def resumed(before: TrainConfig, config: TrainConfig) -> TrainConfig:
    """The configuration of a run that resumes, if `difference` is empty: `config`, with the prompts of `before`."""
    return config.model_copy(update={name: getattr(before, name) for name in NEVER})
