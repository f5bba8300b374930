"""Reading model weights from files, checking them, and filling networks with them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..counts import number_of
from ..tensor_files import TensorFile
from .files import EXPECTED
from .quantised import check_formats, declared_formats, find_scales, multiply_out


class Weights:
    """The weights in one or several .safetensors files, by name, read on access.

    source: the path to name in messages; metadata: the headers' strings.
    Raises ValueError if a file is damaged.
    """

    def __init__(self, paths: list[Path]):
        files = [_open(path) for path in paths]
        self.source = paths[0] if len(paths) == 1 else paths[0].parent
        self.metadata = {key: value for file in files for key, value in file.metadata.items()}
        self._places = {name: (file, name) for file in files for name in file.shapes}
        self._scales: dict[str, str] = {}

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def rename(self, change: Callable[[str], str]) -> None:
        """Rename each weight with `change`."""
        places: dict[str, tuple[TensorFile, str]] = {}
        for name, place in self._places.items():
            if change(name) in places:
                raise ValueError(
                    f"{self.source} contains {change(name)} twice, as {places[change(name)][1]} and as {place[1]}; "
                    f"{EXPECTED}; keep one of them"
                )
            places[change(name)] = place
        self._places = places

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._places[name]
        return file.shapes[stored]

    def check_numbers(self, declared: object = None) -> None:
        """Raise ValueError if the weights are quantised in a way that cannot be undone.

        declared: the configuration's entry on quantisation, if any.
        """
        try:
            self._scales = find_scales(self._places)
            if declared and not self._scales:
                raise ValueError(f"its configuration has quantization_config {str(declared)[:60]}")
            check_formats(declared_formats(self._places, self._stored, self.metadata), self._scales)
            for name, (file, stored) in self._places.items():
                dtype = file.dtypes[stored]
                if name.endswith(("weight", "bias")) and not getattr(dtype, "is_floating_point", False):
                    raise ValueError(f"{name} is stored as {str(dtype).removeprefix('torch.')}")
        except ValueError as error:
            raise self._quantised(error) from error

    def read(self, prefix: str | tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights whose names start with a `prefix`: those with a scale in `dtype`, others as stored."""
        names = [name for name in self._places if name.startswith(prefix)]
        return {name: self[name].to(dtype) if name in self._scales else self[name] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        """The weight `name` as stored, or dequantised to float32 if it has a scale."""
        if name not in self._scales:
            return self._stored(name)
        try:
            return multiply_out(self._stored(name), self._stored(self._scales[name]))
        except ValueError as error:
            raise self._quantised(ValueError(f"{name}: {error}")) from error

    def _stored(self, name: str) -> Tensor:
        file, stored = self._places[name]
        return file[stored]

    def _quantised(self, found: ValueError) -> ValueError:
        return ValueError(
            f"{self.source} is quantised in a way that cannot be trained: {found}; expected weights in fp32, fp16, "
            "bf16 or float8; choose the model's fp16 or bf16 version"
        )


def _open(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a valid .safetensors file: {error}; it looks like an "
            "unfinished download or another format; download it again"
        ) from error


@contextmanager
def converting(source: Path) -> Iterator[None]:
    """Turn a KeyError inside the block into a ValueError: diffusers' conversions expect all weights of a layer."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{source} lacks {error.args[0]}; {EXPECTED}; download the model again") from error


def check_weights(source: Path, network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise ValueError if a weight is missing or has the wrong shape."""
    expected = network.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise ValueError(
            f"{source} lacks {number_of(len(missing), 'weight')} of the {type(network).__name__}, the first is "
            f"{missing[0]}; {EXPECTED}; download the model again, or choose a version that is not pruned to one "
            "component"
        )
    for key, empty in expected.items():
        if weights[key].shape != empty.shape:
            got, want = tuple(weights[key].shape), tuple(empty.shape)
            raise ValueError(f"{key} of the {type(network).__name__} in {source} is {got}, not {want}; {EXPECTED}")


def fill(network: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype, source: Path) -> nn.Module:
    """Fill `network`, which has no memory for weights yet, with copies of `weights` in `dtype`, and freeze it.

    Raises ValueError if a weight is not finite.
    """
    copies = {}
    for name in network.state_dict():
        copies[name] = weights[name].to(dtype, copy=True)
        check_finite(copies[name], weights[name], f"{name} of the {type(network).__name__} in {source}")
    network.load_state_dict(copies, assign=True)
    return network.eval().requires_grad_(False)


def check_finite(copy: Tensor, stored: Tensor, name: str) -> None:
    """Raise ValueError if `copy`, which is `stored` in another dtype, is not finite everywhere."""
    if is_finite(copy):
        return
    if is_finite(stored):
        raise ValueError(f"{name} is too large for {copy.dtype}; load the model in fp32 or bf16")
    count = int((~stored.float().isfinite()).sum())
    raise ValueError(
        f"{name} contains NaN or infinity ({count} of {stored.numel()} values); expected finite weights; the file is "
        "damaged or comes from a failed merge: download it again, or choose another version of the model"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass and without a copy: a NaN makes both minimum and maximum NaN."""
    if not tensor.numel():
        return True
    least, greatest = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    return bool(least.isfinite() and greatest.isfinite())


def check_channels(channels: int, source: Path) -> None:
    if channels != 4:
        raise ValueError(
            f"the U-Net in {source} takes {channels} channels (inpainting, depth or editing); expected the 4 of "
            "text to image; choose the base model of the same family"
        )
