"""What a run may not change on its way: with another configuration, model or prompts it would be another run."""

import hashlib
from collections.abc import Iterator
from typing import Any

from comfy_tdpo.policy import DiffusionPolicy

from .config import Fields, TrainConfig, plain_values

# A run may go on for more epochs, write something else, and find its files at another place; of the model the weights
# themselves are compared.
FREE = ("epochs", "output", "model", "reward_weights")
TOLD = 5  # differences in a message


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
    changed = [
        f"{name} was {old!r} and is {new!r}" for name, new, old in _differences(now["settings"], before["settings"])
    ]
    if changed:
        more = f" and {len(changed) - TOLD} more" if len(changed) > TOLD else ""
        raise ValueError(
            f"got a run that was begun with other settings: {', '.join(changed[:TOLD])}{more}; {_SAME}: put back what "
            "was in its config.toml, or start a new run"
        )
    for part in ("model", "prompts"):
        if now[part] != before[part]:
            raise ValueError(
                f"got another {part.removesuffix('s')} than the run was begun with; {_SAME}: put it back, or start a "
                "new run"
            )


_SAME = "expected the same, as only epochs and output.* may change, and where model and reward_weights lie"


def _differences(now: Fields, before: Fields, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(now.keys() | before.keys()):
        new, old = now.get(name), before.get(name)
        if isinstance(new, dict) and isinstance(old, dict) and name != "rewards":
            yield from _differences(new, old, f"{prefix}{name}.")
        elif new != old:
            yield f"{prefix}{name}", new, old
