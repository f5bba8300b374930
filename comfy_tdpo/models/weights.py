"""What every file of weights goes through on its way into a network."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .files import EXPECTED


def open_weights(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is no sound .safetensors file: {error}; it looks like an unfinished "
            "download or another format; fetch it again"
        ) from error


def check_weights(path: Path, network: nn.Module, weights: dict[str, Tensor]) -> None:
    expected = network.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise ValueError(missing_weights(path, type(network), missing))
    for key, empty in expected.items():
        if weights[key].shape != empty.shape:
            got, want = tuple(weights[key].shape), tuple(empty.shape)
            raise ValueError(f"{key} of the {type(network).__name__} in {path} is {got}, not {want}; {EXPECTED}")


def missing_weights(source: Path, cls: type, keys: list[str]) -> str:
    return (
        f"{source} lacks {len(keys)} weights of the {cls.__name__}, the first is {keys[0]}; {EXPECTED}; "
        "fetch the model again, or choose a version that is not pruned to one component"
    )


def fill(network: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """`network`, made without memory, with its weights copied out of the file in `dtype`."""
    network.load_state_dict({key: weights[key].to(dtype, copy=True) for key in network.state_dict()}, assign=True)
    return network


def check_channels(channels: int, source: Path) -> None:
    if channels != 4:
        raise ValueError(
            f"the U-Net in {source} takes {channels} channels (inpainting, depth or editing); expected the 4 of text "
            "to image; choose the base model of the same family"
        )
