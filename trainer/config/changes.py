"""Which settings may change when a run resumes, and how two configurations differ.

The settings that may change are marked with MAY_CHANGE. A setting that a saved run lacks, because an older version
wrote it, counts as having its default.
"""

from collections.abc import Iterator
from typing import Any

from comfy_tdpo.settings import MAY_CHANGE, Section, section_of

from .schema import Fields, TrainConfig, config_class, leaf_fields, plain_values

USERS_KEYS = ("rewards", "reward_scales", "reward_weights")  # tables with the user's keys: one setting each


def changeable(section: type[Section] = TrainConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of the settings that may change; a section stands for all settings in it."""
    for name, info in section.model_fields.items():
        if MAY_CHANGE in info.metadata:
            yield f"{prefix}{name}"
        elif inner := section_of(info):
            yield from changeable(inner, f"{prefix}{name}.")


def may_change(name: str) -> bool:
    """Whether the setting with this dotted name, such as output.samples_every, may change when a run resumes."""
    return any(name == free or name.startswith(f"{free}.") for free in changeable())


def differences(now: Fields, before: Fields) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations, as nested plain values, differ: dotted name -> (before, now)."""
    defaults = dict(_flat(plain_values(config_class(now["algorithm"])())))
    old, new = defaults | dict(_flat(before)), defaults | dict(_flat(now))
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def unknown(values: Fields) -> list[str]:
    """The dotted names in a saved run's `values` that this version does not know."""
    known = {name for name, _ in leaf_fields()}
    return [name for name, _ in _flat(values) if name not in known]


def _flat(values: Fields, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and name not in USERS_KEYS:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
