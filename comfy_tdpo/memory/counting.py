"""Counting the bytes of tensors, with and without values.

`Held` counts what operations make and what is still alive of it. `kept_bytes` counts what autograd would keep of a
forward pass, without keeping it.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the block have made and that are still alive.

    It is a Gauge of a device with `total` bytes.
    """

    exact = True

    def __init__(self, total: int = 2**60) -> None:
        super().__init__()
        self.total, self.bytes, self._peak = total, 0, 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def let_go(_: weakref.ref) -> None:
            del self._alive[key]
            self.bytes -= size

        self._alive[key] = weakref.ref(storage, let_go)
        self.bytes += size
        self._peak = max(self._peak, self.bytes)

    def peak_of(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """What `work` returns, and the most bytes alive meanwhile."""
        self.reset()
        return work(), self.peak()

    def free(self) -> int:
        return self.total - self.bytes

    def held(self) -> int:
        return self.bytes

    def peak(self) -> int:
        return self._peak

    def reset(self) -> None:
        self._peak = self.bytes


def kept_bytes(forward: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """The bytes of what autograd would keep of `forward` for a backward pass, but for `weights`.

    They are counted and let go, so that this takes no more memory than a forward pass without gradients.
    """
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    alive: dict[int, weakref.ref] = {}
    total = 0

    def pack(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in alive and storage.data_ptr() not in known:
            total += storage.nbytes()
            alive[key] = weakref.ref(storage, lambda _: alive.pop(key))  # several operations keep the same tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        forward()
    return total
