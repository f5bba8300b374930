"""What a run may not change on its way: with other settings, another model or other prompts it would be another run."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from comfy_tdpo import __version__
from comfy_tdpo.policy import DiffusionPolicy

from .config import Fields, TrainConfig, config_class, may_change, plain_values

# Of a noise schedule: releases of torch, and GPUs, differ in the last bits of float32; another schedule by far more.
SCHEDULE_TOLERANCE = 1e-4


def identity(config: TrainConfig, policy: DiffusionPolicy, prompts: list[str]) -> dict[str, Any]:
    """What makes a run this one, as plain values for a checkpoint."""
    return {
        "version": __version__,
        "settings": fixed_settings(config),
        "model": {
            "weights": _digest_of_weights(policy),
            "prediction_type": policy.model.prediction_type,
            "schedule": [float(f"{value:.6g}") for value in policy.model.schedule.tolist()],
        },
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }


def fixed_settings(config: TrainConfig) -> Fields:
    """The settings that stay as they are for as long as a run lives, as nested plain values."""
    return _without(plain_values(config), may_change(config))


def check_same(now: dict[str, Any], before: dict[str, Any], policy: DiffusionPolicy) -> None:
    """Raise ValueError where the run that goes on, `now` with `policy`, is not the one that was saved."""
    version = before.get("version", "0.1.0")  # which did not say
    changed = first_difference(now["settings"], before["settings"], version)
    if changed:
        raise ValueError(f"got a run that was begun with other settings: {changed}; {_REMEDY}")
    for part in ("model", "prompts"):
        same = _is_same_model(now, before, policy) if part == "model" else now[part] == before[part]
        if not same:
            raise ValueError(f"got another {part.removesuffix('s')} than the run was begun with; {_REMEDY}")


_REMEDY = f"put it back, or start a new run: of a run only {', '.join(may_change(TrainConfig()))} may change"


def first_difference(now: Fields, before: Fields, version: str = __version__) -> str:
    """The first setting that differs, in words; empty where none does.

    A setting that is missing from `before`, as `version` did not have it yet, counts as having its default.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    usual = dict(_leaves(plain_values(config_class(now["algorithm"])())))
    for name in sorted(old.keys() | new.keys()):
        if name not in new and not name.startswith(_OPEN):
            return f"{name} = {old[name]!r} is unknown to comfy_tdpo {__version__}; the run was begun by {version}"
        value = old[name] if name in old else usual.get(name)
        if value != new.get(name):
            return f"{name} was {value!r} and is {new.get(name)!r}"
    return ""


_OPEN = ("rewards", "reward_scales")  # tables whose keys are the user's


def _leaves(values: Fields, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, value)."""
    for name, value in values.items():
        if isinstance(value, dict) and name not in _OPEN:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _without(values: Fields, names: list[str]) -> Fields:
    left = {name: value for name, value in values.items() if name not in names}
    for name, value in left.items():
        inner = [other.removeprefix(f"{name}.") for other in names if other.startswith(f"{name}.")]
        if inner:
            left[name] = _without(value, inner)
    return left


# --- the model --------------------------------------------------------------------------------------------------------


def _is_same_model(now: dict[str, Any], before: dict[str, Any], policy: DiffusionPolicy) -> bool:
    new, old = now["model"], before["model"]
    if isinstance(old, str):
        return old == _fingerprint_of_0_1(policy)
    schedules = zip(new["schedule"], old["schedule"], strict=False)
    return (
        (new["weights"], new["prediction_type"]) == (old["weights"], old["prediction_type"])
        and len(new["schedule"]) == len(old["schedule"])
        and all(math.isclose(a, b, rel_tol=SCHEDULE_TOLERANCE) for a, b in schedules)
    )


def _digest_of_weights(policy: DiffusionPolicy) -> str:
    digest = hashlib.sha256()
    _add_weights(digest, policy)
    return digest.hexdigest()


def _fingerprint_of_0_1(policy: DiffusionPolicy) -> str:
    """What version 0.1.0 kept of a model: the schedule, rounded, and the weights in one digest."""
    digest = hashlib.sha256(policy.model.prediction_type.encode())
    digest.update(policy.model.schedule.cpu().double().numpy().round(5).tobytes())
    _add_weights(digest, policy)
    return digest.hexdigest()


def _add_weights(digest: Any, policy: DiffusionPolicy) -> None:
    for name, weight in policy.frozen_weights():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
