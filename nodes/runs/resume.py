"""Whether a run resumes with other settings, and with which.

A run gives the same result whenever it is repeated with the same settings, seed among them. So nothing here asks which
of two such runs is meant.
"""

from ...trainer.config import TrainConfig, plain_values
from ...trainer.config.changes import differences, may_change
from ...trainer.run import RunFolder
from .settings import INPUTS, NUMBERS

# A MODEL's name holds a digest of its weights, so that it always counts. A run keeps its prompts in files of its own,
# so that these names never count; the training prompts themselves are compared.
ALWAYS, NEVER = ("model",), ("prompts", "grid_prompts")


def difference(run: RunFolder, config: TrainConfig, prompts: list[str]) -> str:
    """In what `config` and `prompts` would be another run than `run`; empty where they would not.

    Of several differences it names one that an input or a wire of the node decides, where there is one.
    """
    before = run.config
    found = differences(plain_values(config), plain_values(before))
    counting = [name for name in found if name in ALWAYS or not (name in NEVER or may_change(name))]
    if counting:
        name = min(counting, key=lambda name: (name not in (*INPUTS, *NUMBERS), name))
        old, new = found[name]
        return f"{name} was {old!r} and is {new!r}"
    return "" if run.prompts(before) == prompts else "its prompts were others"


def resumed(before: TrainConfig, config: TrainConfig) -> TrainConfig:
    """What a run of `before` goes on with where `difference` found none: `config`, with the run's own prompts."""
    return config.model_copy(update={name: getattr(before, name) for name in NEVER})
