"""What a run may not change on its way: with another configuration, model or prompts it would be another run."""

import hashlib
from typing import Any

from comfy_tdpo.policy import DiffusionPolicy

from .config import Fields, TrainConfig, plain_values

# A run may go on for more epochs, write something else, and find its files at another place; of the model the weights
# themselves are compared.
FREE = ("epochs", "output", "model", "reward_weights")


def identity(config: TrainConfig, policy: DiffusionPolicy, prompts: list[str]) -> dict[str, Any]:
    """What makes a run this one, as plain values for a checkpoint."""
    settings = {name: value for name, value in plain_values(config).items() if name not in FREE}
    return {
        "settings": settings,
        "model": policy.fingerprint(),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }


def check_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise ValueError where the run that goes on is not the one that was saved."""
    changed = _first_difference(now["settings"], before["settings"])
    if changed:
        raise ValueError(f"got a run that was begun with other settings: {changed}; {_REMEDY}")
    for part in ("model", "prompts"):
        if now[part] != before[part]:
            raise ValueError(f"got another {part.removesuffix('s')} than the run was begun with; {_REMEDY}")


_REMEDY = "expected the same, as only epochs and output.* may change: put it back, or start a new run"


def _first_difference(now: Fields, before: Fields, prefix: str = "") -> str:
    for name in sorted(now.keys() | before.keys()):
        new, old = now.get(name), before.get(name)
        if isinstance(new, dict) and isinstance(old, dict) and name != "rewards":
            found = _first_difference(new, old, f"{prefix}{name}.")
            if found:
                return found
        elif new != old:
            return f"{prefix}{name} was {old!r} and is {new!r}"
    return ""
