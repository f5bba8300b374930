"""Exact state on disk: atomic to write, checked when read.

A checkpoint is a folder of safetensors files and one state.json. It is written beside its place, flushed, and renamed,
so that a folder with a checkpoint's name is always whole; the last K are kept.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .run import flush_to_disk

STATE = "state.json"
FORMAT = 1

Tensors = dict[str, dict[str, Tensor]]


def save_checkpoint(folder: Path, name: str, tensors: Tensors, state: dict[str, Any], keep: int) -> Path:
    """Write the named groups of `tensors` and the JSON `state` as the checkpoint `name`; keep the last `keep`.

    A checkpoint's name says how far the run had come, so one that is there already holds the same state.
    """
    place, beside = folder / name, folder / f".{name}.partial"
    if place.exists():
        return place
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for group, content in tensors.items():
            on_cpu = {key: value.detach().cpu().contiguous() for key, value in content.items()}
            save_file(on_cpu, beside / f"{group}.safetensors")
        text = json.dumps({"format": FORMAT, "groups": sorted(tensors), **state})
        (beside / STATE).write_text(text, encoding="utf-8")
        for path in [*beside.iterdir(), beside]:
            flush_to_disk(path)
        beside.replace(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    flush_to_disk(folder)
    for old in _whole_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return place


def _whole_checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("epoch-*") if (path / STATE).is_file())


def load_latest(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The tensors and state of the newest checkpoint in `folder`, or None where there is none.

    Raises:
        ValueError: the newest checkpoint is damaged; the message names the file.
    """
    found = _whole_checkpoints(folder)
    return _load(found[-1]) if found else None


def _load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    advice = f"delete the folder {str(path)!r} to go on from the checkpoint before it"
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"{path} has checkpoint format {state['format']}; expected {FORMAT}")
        tensors = {name: load_file(path / f"{name}.safetensors") for name in state["groups"]}
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint {str(path)!r} is damaged ({type(error).__name__}: {error}); {advice}") from error
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state, keyed by the position of each parameter in its one group and the name of the moment."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, moments in state.items() for name, value in moments.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
