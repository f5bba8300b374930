"""Safetensors files against the library's own reader, and invalid headers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_tdpo.tensor_files import TensorFile


def test_tensors_are_those_of_the_library(tmp_path):
    """Of all widths, so that some do not lie at a multiple of their own; scalars and empty ones too."""
    path = tmp_path / "model.safetensors"
    numbers = torch.arange(6).view(2, 3)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.int64, torch.int32, torch.uint8, torch.bool]
    tensors = {str(dtype): numbers.to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, path, {"said": "so"})
    for shift in range(3):  # spaces after the header move all that follows
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        moved = tmp_path / "moved.safetensors"
        moved.write_bytes(
            (length + shift).to_bytes(8, "little") + data[8 : 8 + length] + b" " * shift + data[8 + length :]
        )
        file, expected = TensorFile(moved), load_file(path)
        assert file.metadata == {"said": "so"} and file.shapes.keys() == expected.keys()
        for name, tensor in expected.items():
            assert file.dtypes[name] == tensor.dtype and file.shapes[name] == tuple(tensor.shape)
            assert file[name].dtype == tensor.dtype and torch.equal(file[name].double(), tensor.double())


def write(path: Path, header: object, size: int = 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 9999, "is not valid JSON"),
        ([], "is a list"),
        ({"x": 3}, "describes 'x' as 3"),
        ({"x": SOUND | {"shape": [3]}}, "describes 'x'"),
        ({"x": SOUND | {"shape": [-1, -2]}}, "describes 'x'"),
        ({"x": SOUND | {"shape": "ab"}}, "describes 'x'"),
        ({"x": SOUND | {"data_offsets": [-8, 0]}}, "describes 'x'"),
        ({"x": SOUND | {"data_offsets": [8, 16]}}, "ends at byte 16, but the file has only 8 bytes of data"),
        ({"x": SOUND | {"data_offsets": [0]}}, "describes 'x'"),
        ({"x": SOUND | {"dtype": ["F32"]}}, "describes 'x'"),
        ({"x": SOUND | {"dtype": None}}, "describes 'x'"),
        ({"__metadata__": [], "x": 3}, "describes 'x'"),
        ({"__metadata__": {"a": 1}, "x": SOUND}, "metadata"),
    ],
)
def test_a_header_that_lies_is_an_error(tmp_path, header, reason):
    assert TensorFile(write(tmp_path / "sound", {"x": SOUND}))["x"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=reason):
        TensorFile(write(tmp_path / "odd", header))


def test_a_type_that_torch_lacks_is_an_error_only_when_it_is_read(tmp_path):
    file = TensorFile(write(tmp_path / "new", {"x": SOUND, "y": SOUND | {"dtype": "F4"}}))
    assert file.dtypes == {"x": torch.float32, "y": "F4"}
    with pytest.raises(ValueError, match="y is stored as F4, which PyTorch .* cannot read"):
        file["y"]


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer.*`git lfs pull`"),
        (b"PK\x03\x04\0\0\x08\x08\0\0\0", "ZIP archive, as PyTorch"),
        (b"\x80\x02}q\0cnumpy", "a pickle"),
        (b"GGUF\x03\0\0\0\x10\0", "a GGUF file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b'{"error": "gated"}', "JSON"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, start, kind):
    (tmp_path / "file").write_bytes(start)
    with pytest.raises(ValueError, match=kind):
        TensorFile(tmp_path / "file")


def test_a_header_of_an_absurd_length_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="does not begin with the length"):
        TensorFile(tmp_path / "file")
