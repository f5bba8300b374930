"""Parses setting values given as text: NAME,NAME and NAME=VALUE,NAME=VALUE."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from comfy_tdpo.rewards import check_reward, reward_names
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
    return dict(_pairs(text))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(","):
        if part.strip():
            name, _, value = part.partition("=")
            yield name.strip(), value.strip()


def reward_files(text: str) -> dict[str, str]:
    """The paths in NAME=PATH,NAME=PATH.

    Raises:
        ValueError: a name or a path is missing, or a name occurs twice.
    """
    files: dict[str, str] = {}
    for name, path in _pairs(text):
        if not name or not path:
            raise ValueError(
                f"got --reward-weights {text!r}; expected a reward with its file or folder: write NAME=PATH"
            )
        if files.setdefault(name, path) != path:
            raise ValueError(
                f"got --reward-weights with {name} twice, '{files[name]}' and '{path}'; expected it once: remove one"
            )
    return files


def check_used(files: Iterable[str], rewards: Collection[str]) -> None:
    """Raise ValueError if one of the `rewards` does not exist, or if a reward with `files` of its own is none of them.

    With a taste among them, files of any reward are allowed, since a taste reads through the encoder of one.
    """
    for name in rewards:
        check_reward(name)
    known = {*rewards, *(reward_names() if any(map(is_taste, rewards)) else [])}
    for name in files:
        if name not in known:
            raise ValueError(
                f"got --reward-weights for {name}; expected a reward that is used here ({', '.join(rewards)}): remove "
                "it, or use that reward"
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
