"""Copies of tensors in other memory, and networks that hold a copy of their weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A GPU gets it from main memory without waiting for what it does before."""
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # it would wait for memory that is not pinned
    return tensor.to(device)


def copied(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A float32 copy of `parameters`, by name, on their device."""
    # float() and detach() return the parameter's own memory where they have nothing to do, so clone
    return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


@contextmanager
def swapped(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], in_place: bool = False) -> Iterator[None]:
    """Inside the block, `parameters` hold `weights`, from any device; afterwards, their own values to the last bit.

    in_place: whether others read the parameters' memory, so that the values go there; this takes a copy of them.
    """

    def give(values: dict[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            if in_place:
                parameter.data.copy_(values[name])
            else:
                parameter.data = values[name].to(parameter.device).to(parameter.dtype)  # fast if pinned

    live = {name: parameter.data.clone() if in_place else parameter.data for name, parameter in parameters.items()}
    try:
        give(weights)
        yield
    finally:
        give(live)
