"""Checkpoints: the exact state of a run on disk, written atomically and verified when read.

A checkpoint is a folder of safetensors files, a state.json, and a SHA256SUMS file in the format of sha256sum. It is
written under a temporary name, flushed, and renamed, so a folder with a checkpoint's name is always complete. The last
K are kept. A checkpoint that fails its checksum is rejected.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from comfy_tdpo.atomic_files import flush_to_disk, naming
from comfy_tdpo.interrupts import heed
from comfy_tdpo.tensor_files import write_tensors

STATE, SUMS, PARTIAL = "state.json", "SHA256SUMS", ".partial"
FORMAT = 4
READABLE = (3, FORMAT)  # 3: written by version 0.1.0

Tensors = dict[str, dict[str, Tensor]]


def save_checkpoint(folder: Path, name: str, tensors: Tensors, state: dict[str, Any], keep: int) -> Path:
    """Write the named groups of `tensors` and the JSON `state` as the checkpoint `name`; keep the last `keep`.

    A checkpoint's name states the run's progress, and `_load` verifies the name, so an existing checkpoint of that name
    already holds the same state.
    """
    place, beside = folder / name, folder / f".{name}{PARTIAL}"
    if (place / STATE).is_file():
        return place
    for broken in (place, beside):
        shutil.rmtree(broken, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        with naming(place):
            _write(beside, tensors, {"format": FORMAT, "name": name, "groups": sorted(tensors), **state})
        beside.replace(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    flush_to_disk(folder)
    for old in _whole_checkpoints(folder)[:-keep]:
        doomed = old.with_name(f".{old.name}{PARTIAL}")
        old.replace(doomed)  # so that a kill during the removal leaves no partial checkpoint under this name
        shutil.rmtree(doomed)
    return place


def _write(folder: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    for group, content in tensors.items():
        write_tensors(folder / f"{group}.safetensors", content)
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        flush_to_disk(path)


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed while saving left in `folder`."""
    for path in folder.glob(f".*{PARTIAL}"):
        shutil.rmtree(path)


def _whole_checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("epoch-*") if (path / STATE).is_file())


def load_latest(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The tensors and state of the newest checkpoint in `folder`, or None if there is none.

    Raises:
        ValueError: the newest checkpoint is damaged; the message names the file.
    """
    found = _whole_checkpoints(folder)
    if not found:
        return None
    try:
        return _load(found[-1])
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError, Damage) as error:
        what = str(error) if isinstance(error, Damage) else f"{type(error).__name__}: {error}"
        remedy = "delete this folder to resume from the previous one" if len(found) > 1 else "start a new run"
        raise ValueError(f"checkpoint {str(found[-1])!r} is damaged ({what}); restore it, or {remedy}") from error


class Damage(Exception):
    """A checkpoint is damaged; the message says how."""


def _load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["format"] not in READABLE:
        raise ValueError(
            f"checkpoint {str(path)!r} has format {state['format']}; expected {FORMAT}: resume the run with the "
            "version of comfy_tdpo that started it, or start a new run"
        )
    files = {group: f"{group}.safetensors" for group in state["groups"]}
    _check_sums(path, {STATE, *files.values()})
    if state["name"] != path.name:
        raise Damage(f"it was saved as {state['name']!r}")
    tensors = {group: load_file(path / file) for group, file in files.items()}
    return (_from_format_3(tensors) if state["format"] == 3 else tensors), state


def _from_format_3(tensors: Tensors) -> Tensors:
    """Move metrics that are reduced by their maximum out of the summed ones, where format 3 kept them."""
    maxima = {name: value for name, value in tensors.get("sums", {}).items() if name == "policy/ratio_drift"}
    sums = {name: value for name, value in tensors.get("sums", {}).items() if name not in maxima}
    return tensors | ({"sums": sums, "maxima": maxima} if "sums" in tensors else {})


def _check_sums(path: Path, expected: set[str]) -> None:
    """Raise Damage unless every file is present and matches its checksum."""
    lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if sums.keys() != expected:
        raise Damage(f"{SUMS} and {STATE} list different files")
    for name, digest in sums.items():
        if _sha256(path / name) != digest:
            raise Damage(f"{name} does not match its checksum")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
            heed()
    return digest.hexdigest()
