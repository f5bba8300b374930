"""A device that is not the CPU, on a machine without a GPU: its tensors are held on the CPU and say that they are
elsewhere.

They have values, so that whole runs work and must give what the CPU gives, to the last bit. (Torch's own FakeTensorMode
has none, and cannot go back through a graph on CUDA where there is no driver.) As on Apple's GPUs there is no float64.
"""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")  # a name that torch knows, and whose graphs it goes through on the caller's thread
COPYING = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put)
set_data = Tensor.data.__set__


class Elsewhere(Tensor):
    """A tensor on DEVICE."""

    held: Tensor
    is_meta = False  # torch would take it for a tensor without values

    @staticmethod
    def __new__(cls, held: Tensor):
        assert held.dtype != torch.float64, "this device has no float64"
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), dtype=held.dtype, device=DEVICE)

    def __init__(self, held: Tensor):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == set_data:  # torch would exchange all but what is held
            tensor, other = args
            assert isinstance(other, Elsewhere), f"{other.device} takes the place of {DEVICE}"
            tensor.held = other.held
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("used outside of `Device`")


class Device(TorchDispatchMode):
    """Inside the block, DEVICE exists. Operations on it give tensors on it. From the CPU they take numbers, and tensors
    only to copy them and as indices."""

    def __enter__(self):
        self._patches = ExitStack()
        self._patches.enter_context(patch.object(torch, "autocast", _autocast))
        self._patches.enter_context(patch.object(torch, "tensor", _tensor))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        there = _there(args, kwargs)
        if there and function.overloadpacket not in COPYING:
            _check_together(function, args, kwargs)
        if (device := kwargs.get("device")) is not None:
            there = torch.device(device).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        elif function.overloadpacket is torch.ops.aten.copy_:
            there = isinstance(args[0], Elsewhere)
        given = args
        args, kwargs = tree_map_only(Elsewhere, lambda leaf: leaf.held, (args, kwargs))
        found = function(*args, **kwargs)
        if not there:
            return found
        # an operation in place gives the tensor that it was given, since others may hold it
        own = {id(leaf.held): leaf for leaf in tree_leaves(given) if isinstance(leaf, Elsewhere)}
        return tree_map_only(Tensor, lambda leaf: own[id(leaf)] if id(leaf) in own else Elsewhere(leaf), found)


def _there(*arguments: Any) -> bool:
    return any(isinstance(leaf, Elsewhere) for leaf in tree_leaves(arguments))


def _check_together(function, args: tuple, kwargs: dict) -> None:
    """Raise AssertionError where CUDA would raise an error about two devices."""
    if function.overloadpacket in INDEXING:
        assert isinstance(args[0], Elsewhere), f"{function} takes indices from {DEVICE} on the CPU"
        args = (args[0], *args[2:])  # indices may be on the CPU
    strangers = [
        leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere)
    ]
    assert not any(leaf.ndim for leaf in strangers), f"{function} mixes devices"


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.amp.autocast_mode.autocast:
    return torch.amp.autocast_mode.autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


make_tensor = torch.tensor


def _tensor(*args: Any, device: torch.device | str | None = None, **kwargs: Any) -> Tensor:
    """Torch makes it on the CPU and moves it where no mode sees it."""
    return make_tensor(*args, **kwargs).to(device or "cpu")
