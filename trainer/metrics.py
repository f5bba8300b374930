"""Metrics for people: the rewards of a run, its curves, and numbers and durations as text."""

from unicodedata import combining, east_asian_width

from .config import TrainConfig
from .run import EpochMetrics


def reward_names(metrics: list[EpochMetrics], kind: str) -> list[str]:
    """The rewards in the metrics; kind is "reward" for the one that is trained on, "part" for those that it sums,
    "guard", or "eval" for those only tracked.
    """
    prefix = "reward/" if kind == "part" else f"{kind}/"
    keys = [key for key in keys_of(metrics) if key.startswith(prefix) and key.endswith("/mean")]
    names = [key.removeprefix(prefix).removesuffix("/mean") for key in keys]
    return names[:1] if kind == "reward" else names[1:] if kind == "part" else names


def is_curve(key: str) -> bool:
    """Whether a metric is the mean or the spread of a reward that is trained on or only tracked."""
    return key.startswith(("reward/", "eval/")) and key.endswith(("/mean", "/std"))


def role(name: str, config: TrainConfig) -> str:
    """The role of a tracked reward: a guard, a part of the sum that is trained on, or held out."""
    if name in config.guards:
        return "guard"
    return "part of the sum" if name in config.trained_on else "held out"


def keys_of(metrics: list[EpochMetrics]) -> list[str]:
    return list(dict.fromkeys(key for epoch in metrics for key in epoch))


def points_of(metrics: list[EpochMetrics], key: str) -> tuple[list[float], list[float]]:
    """Reward queries and values of the epochs that have `key`."""
    having = [epoch for epoch in metrics if key in epoch]
    return [epoch["reward_queries"] for epoch in having], [epoch[key] for epoch in having]


def readable(value: float, like: float | None = None, sign: str = "") -> str:
    """A reward as text: two decimals, or three if it, or the value `like` that it is shown with, is below 1."""
    decimals = 3 if abs(value if like is None else like) < 1 else 2
    return f"{value:{sign}z.{decimals}f}"


def shortened(name: str, length: int) -> str:
    """`name`, with its end cut off if it is wider than `length` columns of a terminal."""
    if columns_of(name) <= length:
        return name
    while columns_of(name) > length - 3:
        name = name[:-1]
    return f"{name}..."


def padded(text: str, width: int) -> str:
    return text + " " * (width - columns_of(text))


def columns_of(text: str) -> int:
    """The width of `text` on a terminal: two columns for each wide character, none for a combining one."""
    return sum(2 if east_asian_width(char) in "FW" else not combining(char) for char in text)


def duration(seconds: float) -> str:
    """Minutes and seconds, such as 2:04, preceded by hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
