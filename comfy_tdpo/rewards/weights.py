"""Finding published weights and loading them into a model; files are checked against the model and never run as code.

The search order is: the path a user gives, the folders a host has added (ComfyUI's models/tdpo_rewards), the hub's
cache, the hub. A file's keys and shapes are checked before any of it is used, and entries that a model does not use are
not read.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from torch import Tensor, nn

from ..models.quantised import find_scales
from ..models.weights import check_finite
from ..tensor_files import TensorFile, first_sentence

Module = TypeVar("Module", bound=nn.Module)
Shape = tuple[int, ...]

ANY_MODEL = "model.safetensors"

_folders: list[Path] = []


@dataclass(frozen=True)
class Source:
    """One published file: its repository and name on the hub, and other names for it; bits: of its numbers."""

    repo: str
    file: str
    size: str
    licence: str
    aliases: tuple[str, ...] = ()
    bits: int = 32

    def __str__(self) -> str:
        also = "".join(f", also called {name}," for name in self.aliases)
        return f"{self.file}{also} of huggingface.co/{self.repo} ({self.size}, licence {self.licence})"

    @property
    def own_folder(self) -> str:
        return self.repo.rpartition("/")[2]

    def inside(self, folder: Path, shared: bool) -> Path | None:
        """The path of this file in `folder`, or in a subfolder named after its repository; None if it is not there.

        shared: whether `folder` also holds files of other models. If so, a file with the name that every CLIP has is
        only looked for in the subfolder.
        """
        names = (self.file, *self.aliases)
        places = [folder / self.own_folder / name for name in names]
        if not (shared and self.file == ANY_MODEL):
            places += [folder / name for name in names]
        return next((place for place in places if place.is_file()), None)


def add_weights_folder(folder: Path) -> None:
    """Add `folder` to the places that are searched for weights."""
    if folder not in _folders:
        _folders.append(folder)


def find_weights(reward: str, source: Source, given: Path | None = None) -> Path:
    """The local path of `source`, downloaded if necessary.

    given: the user's path for `reward`: the file itself, or a folder that contains it.
    Raises ValueError if there is no such file; the message says what is needed and where to put it.
    """
    if given is not None:
        return _find_given(reward, source, given)
    for folder in _folders:
        if found := source.inside(folder, shared=True):
            return found
    return _download(reward, source)


def _find_given(reward: str, source: Source, given: Path) -> Path:
    if given.is_file():
        return given
    if not given.is_dir():
        raise ValueError(f"got '{given}' as the weights of reward {reward!r}, but nothing is there; expected {source}")
    if found := source.inside(given, shared=False):
        return found
    raise ValueError(f"'{given}', given as the weights of reward {reward!r}, does not contain {source}; put it there")


def _download(reward: str, source: Source) -> Path:
    cached = try_to_load_from_cache(source.repo, source.file)
    if isinstance(cached, str):  # no need to ask the hub whether it is up to date
        return Path(cached)
    try:
        return Path(hf_hub_download(source.repo, source.file))
    except OSError as error:
        folders = "".join(f"at '{folder / source.own_folder / source.file}', or " for folder in _folders)
        raise ValueError(
            f"reward {reward!r} needs {source}, which cannot be downloaded: {' '.join(str(error).split())}; check the "
            f"connection and HF_HUB_OFFLINE, or put it {folders}into a folder, with the reward's other files if it has "
            f"any, and say where: reward_weights {reward}=FOLDER"
        ) from error


def load_weights(
    module: Module,
    path: Path,
    source: Source,
    dtype: torch.dtype = torch.float32,
    key: Callable[[str], str] = lambda name: name,
    inside: str = "",
) -> Module:
    """Fill `module`, which has no memory for weights yet, with copies of the weights in the file `path`, and freeze it.

    dtype: of the weights, except scalars, which stay float32, because a temperature in bf16 can be off by a percent.
    key: maps the module's names to the file's; inside: the entry of a checkpoint that contains the weights.
    Raises ValueError if the file is damaged or not the expected one, before any of it is used.
    """
    names = {name: key(name) for name in module.state_dict()}
    expected = {names[name]: tuple(empty.shape) for name, empty in module.state_dict().items()}
    shapes, read = _open(path, source, inside)
    _check(path, source, expected, shapes)
    weights = {}
    for name, stored in names.items():
        weight = read(stored)
        if not weight.is_floating_point() or weight.layout != torch.strided:
            raise ValueError(f"{stored} in '{path}' is {weight.dtype} ({weight.layout}); expected {source}")
        weights[name] = weight.to(dtype if weight.ndim else torch.float32, copy=True)
        check_finite(weights[name], weight, f"{stored} in '{path}'")
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def _check(path: Path, source: Source, expected: dict[str, Shape], shapes: dict[str, Shape]) -> None:
    missing = sorted(expected.keys() - shapes.keys())
    try:
        quantised = next(iter(find_scales(shapes).values()), None)
    except ValueError as error:
        quantised = str(error)
    if quantised:
        raise ValueError(f"'{path}' is quantised: {quantised}; expected {source}; download that file")
    if missing:
        raise ValueError(
            f"'{path}' lacks {len(missing)} of {len(expected)} weights, the first is {missing[0]}; expected {source}; "
            "it looks like another model: download it again, or give the right path"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{name} in '{path}' is {shapes[name]}, not {shape}; expected {source}; give the right path"
            )


def _open(path: Path, source: Source, inside: str) -> tuple[dict[str, Shape], Callable[[str], Tensor]]:
    """The shapes of the tensors in a file, by name, and a function that reads one of them."""
    if path.suffix != ".safetensors":
        tensors = _tensors(path, source, inside)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__
    try:
        file = TensorFile(path)
    except (ValueError, OSError) as error:
        raise _damaged(path, source, error) from error
    return file.shapes, file.__getitem__


def _tensors(path: Path, source: Source, inside: str) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        found = found[inside] if inside else found
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # torch raises all kinds of exceptions for files that are not checkpoints
        raise _damaged(path, source, error) from error


def _damaged(path: Path, source: Source, error: Exception) -> ValueError:
    return ValueError(
        f"'{path}' ({path.stat().st_size} bytes) cannot be read as {source}: {type(error).__name__} "
        f"{first_sentence(error)}; it looks like an unfinished download or another format; download it again"
    )
