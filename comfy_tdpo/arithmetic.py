"""torch's process-wide switches of a GPU's arithmetic: set while a run trains or its images are drawn, and put back.

- TF32 is off, in cuDNN too, where torch has it on: it rounds float32 to fp16's 10 bits of mantissa, which moves a step
  half as far as fp16 does (benchmarks/precision.md, docs/LOG.md). Whoever wants that speed sets precision to fp16.
- fp16 is summed in float32, and cuDNN does not choose its kernels by timing them, which differs from run to run.
- cuDNN's attention is off. On some GPUs torch prefers it for heads as wide as those of Stable Diffusion 1.x, but only
  where no gradients are wanted, so that sampling would round otherwise than training.
- deterministic: no kernel adds in an order that differs from run to run. Operations without such a kernel raise.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # the values with which cuBLAS gives the same bits again


def prepare(deterministic: bool) -> None:
    """Call it before CUDA is initialised: cuBLAS reads its environment variable only once."""
    if deterministic and not torch.cuda.is_initialized():
        os.environ.setdefault(WORKSPACE, REPEATABLE[0])


def check(deterministic: bool, device: torch.device) -> None:
    """Raise ValueError if results on `device` cannot be deterministic in this process."""
    found = os.environ.get(WORKSPACE, "")
    if deterministic and device.type == "cuda" and torch.version.cuda and found not in REPEATABLE:
        raise ValueError(
            f"got deterministic true, with {WORKSPACE} {found or 'not set'} when CUDA started; expected "
            f"{REPEATABLE[0]}: start the program with {WORKSPACE}={REPEATABLE[0]}, or set deterministic to false"
        )


class _Switches(NamedTuple):
    """attributes: (where, name, value) of each; attention: whether cuDNN's is on, None where torch has no switch for
    it; algorithms: whether only deterministic ones may be used, and whether others only cause a warning."""

    attributes: list[tuple[Any, str, Any]]
    attention: bool | None
    algorithms: tuple[bool, bool]

    def put(self) -> None:
        for place, name, value in self.attributes:
            setattr(place, name, value)
        if self.attention is not None:
            torch.backends.cuda.enable_cudnn_sdp(self.attention)
        on, only_warned_of = self.algorithms
        torch.use_deterministic_algorithms(on, warn_only=only_warned_of)


_lock = Lock()
_blocks: list[bool] = []  # `deterministic` of those that threads are in
_before: _Switches | None = None  # the first of them


@contextmanager
def switched(deterministic: bool) -> Iterator[None]:
    """Inside the block, the switches are as the top of this file says.

    Blocks of several threads may overlap: the last one that ends puts back what was before the first.
    """
    global _before
    with _lock:
        _before = _before or _found()
        _blocks.append(deterministic)
        _for_a_run(_before, any(_blocks)).put()
    try:
        yield
    finally:
        with _lock:
            _blocks.remove(deterministic)
            (_for_a_run(_before, any(_blocks)) if _blocks else _before).put()
            if not _blocks:
                _before = None


def described(deterministic: bool, device: torch.device) -> str:
    """What is on, in a few words; empty where nothing has to be said, as on the CPU."""
    if device.type != "cuda":
        return ""
    return f"TF32 off, deterministic {'on' if deterministic else 'off'}"


def _found() -> _Switches:
    """What is set now, of all that a run wants otherwise."""
    cuda = torch.backends.cuda
    return _Switches(
        [(place, name, getattr(place, name)) for place, name in _attributes()],
        cuda.cudnn_sdp_enabled() if hasattr(cuda, "cudnn_sdp_enabled") else None,  # from torch 2.5 on
        (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
    )


def _for_a_run(before: _Switches, deterministic: bool) -> _Switches:
    """Everything off; what is on for deterministic results already stays on without them."""
    wanted = {"fp32_precision": "ieee"}
    attributes = [
        (place, name, (deterministic or was) if name == "deterministic" else wanted.get(name, False))
        for place, name, was in before.attributes
    ]
    attention = None if before.attention is None else False
    return _Switches(attributes, attention, (True, False) if deterministic else before.algorithms)


def _attributes() -> list[tuple[Any, str]]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = [(cudnn, "benchmark"), (cudnn, "deterministic"), (matmul, "allow_fp16_reduced_precision_reduction")]
    if hasattr(matmul, "allow_fp16_accumulation"):  # from torch 2.7 on
        names.append((matmul, "allow_fp16_accumulation"))
    return names + _float32()


def _float32() -> list[tuple[Any, str]]:
    """The switches of TF32. torch 2.9 has two sets, and reading the first raises where somebody has used the second."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        _ = matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        return [(place, "fp32_precision") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(place, "allow_tf32") for place in (matmul, cudnn)]
