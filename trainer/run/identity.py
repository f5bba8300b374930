"""What identifies a run, and therefore must not change when it resumes: its settings, its model, its prompts and the
tastes that it is scored by.
"""

import hashlib
import math
from typing import Any

import torch

from comfy_tdpo import __version__
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rewards.taste import Taste

from ..config import TrainConfig, plain_values
from ..config.changes import changeable, differences, may_change, unknown

# Relative. Noise schedules computed by different torch releases or GPUs differ in the last bits of float32; really
# different schedules differ by far more.
SCHEDULE_TOLERANCE = 1e-4
TOLD = 5  # differences listed in a message


def identity(
    config: TrainConfig, policy: DiffusionPolicy, prompts: list[str], tastes: dict[str, Taste]
) -> dict[str, Any]:
    """The identity of a run, as plain values for a checkpoint; `tastes` are those among its rewards, by name."""
    return {
        "version": __version__,
        "settings": plain_values(config),
        "model": {
            "weights": _digest_of_weights(policy),
            "prediction_type": policy.model.prediction_type,
            "schedule": [float(f"{value:.6g}") for value in policy.model.schedule.tolist()],
        },
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "tastes": {name: taste.fitted.fingerprint for name, taste in tastes.items()},
    }


def check_same(now: dict[str, Any], before: dict[str, Any], policy: DiffusionPolicy) -> None:
    """Raise ValueError if the run that resumes, `now` with `policy`, is not the one that was saved, `before`."""
    newer = unknown(before["settings"])
    if newer:
        raise ValueError(
            f"got a run with the setting {newer[0]!r}, which comfy_tdpo {__version__} does not know; expected one that "
            f"this version can read: resume it with comfy_tdpo {before.get('version', '(a newer version)')}"
        )
    changed = [
        f"{name} was {old!r} and is {new!r}"
        for name, (old, new) in differences(now["settings"], before["settings"]).items()
        if not may_change(name)
    ]
    if changed:
        more = f" and {len(changed) - TOLD} more" if len(changed) > TOLD else ""
        raise ValueError(
            f"got a run that was started with other settings: {', '.join(changed[:TOLD])}{more}; {_SAME}: restore its "
            "config.toml, or start a new run"
        )
    for part in ("model", "prompts"):
        same = _is_same_model(now, before, policy) if part == "model" else now[part] == before[part]
        if not same:
            raise ValueError(
                f"got {'a different model' if part == 'model' else 'different prompts'} from when the run started; "
                f"{_SAME}: restore the {part}, or start a new run"
            )
    for name, fingerprint in before.get("tastes", {}).items():  # older versions have none
        if now["tastes"].get(name, fingerprint) != fingerprint:  # one that was only measured may be gone
            raise ValueError(
                f"got another taste {name!r} from when the run started; {_SAME}: restore the run's folder tastes, or "
                "start a new run"
            )


_SAME = f"expected the same, since only {', '.join(changeable())} may change"


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
    """The model's fingerprint as of version 0.1.0: one digest of the rounded schedule and the weights."""
    digest = hashlib.sha256(policy.model.prediction_type.encode())
    digest.update(policy.model.schedule.cpu().double().numpy().round(5).tobytes())
    _add_weights(digest, policy)
    return digest.hexdigest()


def _add_weights(digest: Any, policy: DiffusionPolicy) -> None:
    for name, weight in policy.frozen_weights():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
