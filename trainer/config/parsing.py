"""Parses setting values given as text: NAME,NAME and NAME=VALUE,NAME=VALUE."""

from collections.abc import Collection, Mapping
from typing import Any

from comfy_tdpo.rewards import reward_names
from comfy_tdpo.settings import NONE
from comfy_tdpo.tastes.names import is_taste


def split_names(value: Any) -> Any:
    """The names in NAME,NAME or in a list of names; "none" gives an empty list. Other values are left to validation."""
    parts = value.split(",") if isinstance(value, str) else value
    if parts == [NONE]:
        return []
    return (
        [part.strip() if isinstance(part, str) else part for part in parts if part]
        if isinstance(parts, list)
        else parts
    )


def named_values(text: str) -> dict[str, str]:
    """The pairs in NAME=VALUE,NAME=VALUE; a name without a value gets an empty one."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def reward_files(text: str, used: Collection[str]) -> dict[str, str]:
    """The paths in NAME=PATH,NAME=PATH of some of the rewards that are `used`; ValueError as of the check."""
    files = named_values(text)
    check_reward_files(files, used)
    return files


def check_reward_files(files: Mapping[str, str], used: Collection[str]) -> None:
    """Raise ValueError if a reward's path is empty, or if the reward is neither among those `used` nor, where one of
    these is a taste, one through whose encoder a taste may read."""
    known = {*used, *(reward_names() if any(map(is_taste, used)) else [])}
    for name, path in files.items():
        if name not in known or not path:
            got = f"{name}={path}" if path else name
            raise ValueError(
                f"got --reward-weights {got}; expected NAME=PATH,... for rewards that are used here: {', '.join(used)}"
            )


def weighted(texts: list[str]) -> dict[str, float]:
    """The weights of the rewards in `texts`, each NAME (weight 1) or NAME=WEIGHT.

    Raises:
        ValueError: a weight is not a number, or a reward is named twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, _, weight = (part.strip() for part in text.partition("="))
        if name in weights:
            raise ValueError(f"got reward {name!r} twice; expected each reward once: to weight it, write NAME=WEIGHT")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"got reward {text!r}; expected NAME, or NAME=WEIGHT with a number") from None
    return weights


def with_named_rewards(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with `rewards`, if given as a name or a list of names, as a table of weights."""
    rewards = values.get("rewards")
    names = rewards.split(",") if isinstance(rewards, str) else rewards
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return values | {"rewards": weighted(names)}
    return values
