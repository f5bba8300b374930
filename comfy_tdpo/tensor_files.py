"""Safetensors files: the same content is always written as the same bytes, and files are validated when read."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .interrupts import heed

_LARGEST_HEADER = 100_000_000  # bytes, the safetensors library's own limit
_PIECE = 2**28  # bytes of a large file that are flushed to disk at once, so that slow disks show progress

# The format's names for dtypes, without those that the installed torch lacks.
_DTYPES = {
    name: getattr(torch, dtype)
    for name, dtype in {
        **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
        **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
        **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64"},
        **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
        **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
    }.items()
    if hasattr(torch, dtype)
}

_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# How files of other formats begin that are often found in the place of a .safetensors file.
_OTHER_FORMATS = (
    (b"version https://git-lfs", "it is a Git LFS pointer to the file; fetch the file itself with `git lfs pull`"),
    (b"PK\x03\x04", "it is a ZIP archive, as PyTorch's pickled weights are"),
    (b"\x80", "it is a pickle"),
    (b"GGUF", "it is a GGUF file"),
    (b"<", "it is a web page"),
    (b"{", "it is JSON"),
)


class TensorFile:
    """The tensors of a .safetensors file, memory-mapped and read one at a time.

    Bytes after the last tensor are harmless and are ignored, as in ComfyUI; the safetensors library would reject them.

    shapes: name -> shape; metadata: the header's strings.
    dtypes: name -> dtype, or the format's name of a dtype that the installed PyTorch lacks.
    Raises ValueError, whose message is only the reason, if the file is damaged or has another format; OSError if it
    cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > _LARGEST_HEADER:
                raise ValueError(_kind(start + file.read(64)))
            header = file.read(length)
        size = path.stat().st_size - 8 - length
        if size < 0:
            raise ValueError(f"it ends inside its header, which should have {length} bytes")
        entries, self.metadata = _parse(header)
        self._places = {name: _place(name, entry, size) for name, entry in entries.items()}
        self.shapes = {name: shape for name, (_, shape, _) in self._places.items()}
        self.dtypes = {name: dtype for name, (dtype, _, _) in self._places.items()}
        self._data = torch.UntypedStorage.from_file(str(path), False, 8 + length + size)
        self._start = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name`; a view of the file if its offset is aligned, otherwise a copy."""
        dtype, shape, begin = self._places[name]
        if isinstance(dtype, str):
            raise ValueError(f"{name} is stored as {dtype}, which PyTorch {torch.__version__} cannot read")
        count, begin = math.prod(shape), self._start + begin
        octets = torch.tensor([], dtype=torch.uint8).set_(self._data, begin, (count * dtype.itemsize,))
        return (octets.clone() if begin % dtype.itemsize else octets).view(dtype).view(shape)


def _kind(start: bytes) -> str:
    """What a file is that begins with `start` and not with the length of a header."""
    found = (kind for sign, kind in _OTHER_FORMATS if start.startswith(sign))
    return next(found, "it does not begin with the length of a header")


def _parse(header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"its header is a {type(entries).__name__} and not a table of tensors")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a table of strings")
    return entries, metadata


def _place(name: str, entry: Any, size: int) -> tuple[torch.dtype | str, tuple[int, ...], int]:
    """A tensor's dtype, shape and first byte, from its header `entry`; the data has `size` bytes."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        dtype = _DTYPES.get(code, code)
        sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end)) and isinstance(code, str)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"its header describes {name!r} as {str(entry)[:80]}") from error
    if not sound or (isinstance(dtype, torch.dtype) and end - begin != math.prod(shape) * dtype.itemsize):
        raise ValueError(f"its header describes {name!r} as {str(entry)[:80]}")
    if end > size:
        raise ValueError(f"{name!r} ends at byte {end}, but the file has only {size} bytes of data")
    return dtype, shape, begin


def first_sentence(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters: torch's about a damaged file is a page long."""
    return " ".join(str(error).split()).split(". ")[0][:200]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors`, from any device, and `metadata` to `path`, with the user's default file permissions.

    They are written one by one: safetensors' own `save_file` holds all of them in memory once more, writes metadata in
    the order of a hash map, and some versions make the file readable only by its owner. A stop is heeded between them.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        code = _CODES[tensors[name].dtype]
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    unflushed = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            octets = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
            for piece in octets.split(_PIECE):
                file.write(memoryview(piece.numpy()))
                unflushed += len(piece)
                if unflushed >= _PIECE:
                    file.flush()
                    os.fsync(file.fileno())
                    unflushed = 0
                heed()
