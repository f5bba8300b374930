"""A device without float64, as Apple's GPUs are: tensors that are held on the CPU and say that they are elsewhere."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")  # a name that torch knows


class Elsewhere(Tensor):
    """A tensor on DEVICE."""

    @staticmethod
    def __new__(cls, held: Tensor):
        assert held.dtype != torch.float64, "this device has no float64"
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), dtype=held.dtype, device=DEVICE)

    def __init__(self, held: Tensor):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("used outside of `Device`")


class Device(TorchDispatchMode):
    """Inside the block, DEVICE exists. Operations on it give tensors on it, and take numbers but no tensors from the
    CPU, except to copy them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(isinstance(leaf, Elsewhere) for leaf in tensors)
        copying = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if here and not copying:
            strangers = [leaf for leaf in tensors if not isinstance(leaf, Elsewhere) and leaf.ndim]
            assert not strangers, f"{function} mixes devices"
        if (device := kwargs.get("device")) is not None:
            here = torch.device(device).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(Elsewhere, lambda leaf: leaf.held, (args, kwargs))
        found = function(*args, **kwargs)
        return tree_map_only(Tensor, Elsewhere, found) if here else found
