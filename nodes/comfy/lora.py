"""Applies LoRAs as ComfyUI does, but raises an error if nothing fits; and the whole models of runs that train these."""

from pathlib import Path
from typing import Any

import comfy.sd
from torch import Tensor

from ...trainer.run import RunFolder
from ...trainer.run.loras import baked_strength, epoch_of, read_lora
from ..runs.combos import NO_BLEND
from ..runs.snapshots import find_snapshot
from .blend import blend_weights
from .folders import lora_file
from .whole import apply_model


def apply_run(
    model: Any, run: RunFolder, snapshot: str, epoch: int, strength: float, blend: str = NO_BLEND
) -> tuple[Any, str]:
    """The MODEL with a run's LoRA or trained weights, and what was applied, as text; `blend` is one of BLENDS."""
    found = find_snapshot(run, snapshot, epoch)
    if found.file is None:
        return model, f"run {run.path.name}: {found.note}; the model is unchanged"
    named = f"run {run.path.name!r}"
    if run.trains_all:
        if blend != NO_BLEND:
            raise ValueError(
                f"got blend_over_steps {blend!r} for {named}, which trained all weights and not a LoRA; expected "
                f"{NO_BLEND!r}"
            )
        applied = apply_model(model, read_lora(found.file), strength, named)
    else:
        applied = apply_weights(model, read_lora(found.file), strength, named, blend)
    what = f"run {run.path.name}, after epoch {epoch_of(found.file)}, strength {_strength(found.file, strength)}"
    return applied, what + _blended(blend) + (f" ({found.note})" if found.note else "")


def _strength(path: Path, strength: float) -> str:
    """The strength as text, multiplied by the one that is baked into the file, if there is one."""
    baked = baked_strength(path)
    return f"{strength:g}" if baked == 1 else f"{strength * baked:g} (the recommended {baked:g} times {strength:g})"


def _blended(blend: str) -> str:
    return "" if blend == NO_BLEND else f", blended over the steps ({blend})"


def apply_file(model: Any, name: str, strength: float, blend: str = NO_BLEND) -> tuple[Any, str]:
    """The MODEL with a LoRA file from ComfyUI's list, and what was applied, as text."""
    weights = read_lora(lora_file(name))
    applied = apply_weights(model, weights, strength, f"{name!r}", blend)
    return applied, f"{name}, strength {strength:g}" + _blended(blend)


def apply_weights(model: Any, weights: dict[str, Tensor], strength: float, what: str, blend: str = NO_BLEND) -> Any:
    """The MODEL patched with these weights, whose strength grows over the sampling steps if `blend` says so.

    Raises:
        ValueError: none of them fits the MODEL.
    """
    if blend == NO_BLEND:
        patched, _ = comfy.sd.load_lora_for_models(model, None, weights, strength, 0)
        fits = _added(patched, model)
    else:
        patched = blend_weights(model, weights, strength, blend)
        fits = patched is not None
    if not fits:
        raise ValueError(
            f"got a LoRA ({what}) of which nothing fits this MODEL; expected one that was trained on this kind of "
            "model: connect the MODEL that the Train node uses"
        )
    return patched


def _added(patched: Any, before: Any) -> bool:
    return any(len(patches) > len(before.patches.get(key, ())) for key, patches in patched.patches.items())
