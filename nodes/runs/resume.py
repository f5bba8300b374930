"""Whether a run resumes with other settings, and with which.

A run gives the same result whenever it is repeated with the same settings, seed among them. So nothing here asks which
of two such runs is meant.
"""

from collections.abc import Iterator
from typing import Any

from ...trainer.config import Fields, TrainConfig, plain_values
from ...trainer.run import RunFolder
from .settings import INPUTS, NUMBERS

# A MODEL's name holds a digest of its weights, so that it always counts. A run keeps its prompts in files of its own,
# so that these names never count; the training prompts themselves are compared.
ALWAYS, NEVER = ("model",), ("prompts", "grid_prompts")


def may_change(name: str) -> bool:
    """Whether the setting of that dotted name, such as output.samples_every, may change when a run resumes.

    The only place where nodes say so.
    """
    return name in ("epochs", "reward_weights") or name.startswith("output.")


def difference(run: RunFolder, config: TrainConfig, prompts: list[str]) -> str:
    """In what `config` and `prompts` would be another run than `run`; empty where they would not.

    Of several differences it names one that an input or a wire of the node decides, where there is one.
    """
    before = run.config
    old, new = dict(_leaves(plain_values(before))), dict(_leaves(plain_values(config)))
    for name in sorted(old.keys() | new.keys(), key=lambda name: (name not in (*INPUTS, *NUMBERS), name)):
        counts = name in ALWAYS or not (name in NEVER or may_change(name))
        if counts and old.get(name) != new.get(name):
            return f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
    return "" if run.prompts(before) == prompts else "its prompts were others"


def resumed(before: TrainConfig, config: TrainConfig) -> TrainConfig:
    """What a run of `before` goes on with where `difference` found none: `config`, with the run's own prompts."""
    return config.model_copy(update={name: getattr(before, name) for name in NEVER})


def _leaves(values: Fields, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name; the rewards, by weight, are one."""
    for name, value in values.items():
        if isinstance(value, dict) and name not in ("rewards", "reward_weights", "reward_scales"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
