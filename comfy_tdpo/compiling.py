"""torch.compile of a denoiser's transformer blocks, so that sampling and training run the same code.

torch makes one graph of a block for calls with gradients and another one for calls without, may fuse their operations
differently, and then rounds differently: the ratio of a fresh sample would not be 1. So here a block always runs the
graph of training. Where no gradients are wanted, it is called with them, and its outputs are detached.

- Whether an input requires a gradient is part of a graph too, and differs between sampling and training, and between
  the first block and the others. So every input does.
- Shapes are static: a size always gets the same graph. With dynamic shapes, the graph made for a second size also
  takes the first one, which may have been sampled with another graph.
- A block is compiled as a whole or not at all: where torch cannot, or has made MOST graphs, it raises. By default, it
  runs what is left uncompiled and says nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .torch_release import check_release

# A block has one for every size of its inputs, and each with and without the LoRA; torch's own limit is 8.
MOST = 256
LIMITS = ("recompile_limit", "accumulated_recompile_limit")

BLOCK = "TransformerBlock"  # ends the names of diffusers' classes of transformer blocks

TOOLS = {
    "cpu": "a C++ compiler (g++, clang or, on Windows, Visual Studio's build tools)",
    "cuda": "triton (triton-windows on Windows), a C compiler and Python's header files",
}


def check(device: torch.device) -> None:
    """Compile one line of code for `device`; raises ValueError if that fails."""
    check_release("compile")
    expected = f"expected {TOOLS.get(device.type, 'what torch.compile needs')}: install it, or set compile to false"
    if device.type == "cuda" and find_spec("triton") is None:
        raise ValueError(f"got compile true without the package triton; {expected}")
    try:
        compiled(_one_line)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"got compile true where torch cannot compile ({_first_line(error)}); {expected}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _one_line(x: Tensor) -> Tensor:
    return (x + 1).sin()


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


class CompiledBlocks:
    """The transformer blocks of `network`, compiled in place from now on; names of parameters stay as they are.

    Raises:
        ValueError: it has none; `source` is the model's name in the message.
    """

    def __init__(self, network: nn.Module, source: str):
        self._on = True
        self.blocks = [module for module in network.modules() if type(module).__name__.endswith(BLOCK)]
        if not self.blocks:
            raise ValueError(
                f"got compile true for {source}, which has no transformer blocks; expected a model that has them: set "
                "compile to false"
            )
        for block in self.blocks:
            plain = block.forward
            block.forward = partial(self._call, plain, compiled(plain))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block, the network runs as if it were not compiled, and hooks inside its blocks are called."""
        before = self._on
        try:
            self._on = False
            yield
        finally:
            self._on = before

    def _call(self, plain: Callable, fast: Callable, *inputs: Any, **named: Any) -> Any:
        if not self._on:
            return plain(*inputs, **named)
        trains = torch.is_grad_enabled()
        with torch.enable_grad(), _many_graphs(), _explaining():
            outputs = fast(*map(_graded, inputs), **{name: _graded(value) for name, value in named.items()})
        return outputs if trains else tree_map(_detached, outputs)


def _graded(value: Any) -> Any:
    """`value`, which requires a gradient if it is a tensor that can have one."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    return value.detach().requires_grad_()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@contextmanager
def _explaining() -> Iterator[None]:
    """Turn torch's errors in compiling into a ValueError that says what to do."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise ValueError(
            f"got transformer blocks that torch cannot compile ({type(error).__name__}: {_first_line(error)}); "
            "expected to compile them, since compile is true: resume the run with compile false"
        ) from error


@contextmanager
def _many_graphs() -> Iterator[None]:
    """Inside the block, torch makes MOST graphs of a function; it reads the limit in the thread that calls."""
    from torch._dynamo import config  # takes seconds to import

    before = {name: getattr(config, name) for name in LIMITS}
    try:
        for name in LIMITS:
            setattr(config, name, MOST)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
