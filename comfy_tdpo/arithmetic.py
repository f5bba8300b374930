"""torch's process-wide switches of a GPU's arithmetic: set while a run trains, and put back after it.

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
from typing import Any

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


@contextmanager
def switched(deterministic: bool) -> Iterator[None]:
    """Inside the block, the switches are as the top of this file says."""
    switches = _switches(deterministic)
    before = [(place, name, getattr(place, name)) for place, name, _ in switches]
    cuda = torch.backends.cuda
    attention = cuda.cudnn_sdp_enabled() if hasattr(cuda, "cudnn_sdp_enabled") else None  # from torch 2.5 on
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for place, name, value in switches:
            setattr(place, name, value)
        if attention is not None:
            torch.backends.cuda.enable_cudnn_sdp(False)
        if deterministic:
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
        if attention is not None:
            torch.backends.cuda.enable_cudnn_sdp(attention)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])


def described(deterministic: bool, device: torch.device) -> str:
    """What is on, in a few words; empty where nothing has to be said, as on the CPU."""
    if device.type != "cuda":
        return ""
    return f"TF32 off, deterministic {'on' if deterministic else 'off'}"


def _switches(deterministic: bool) -> list[tuple[Any, str, Any]]:
    """(where, name, value) of each; what is on for deterministic results already stays on without them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [(cudnn, "benchmark", False), (cudnn, "deterministic", deterministic or cudnn.deterministic)]
    switches.append((matmul, "allow_fp16_reduced_precision_reduction", False))
    if hasattr(matmul, "allow_fp16_accumulation"):  # from torch 2.7 on
        switches.append((matmul, "allow_fp16_accumulation", False))
    return _float32() + switches


def _float32() -> list[tuple[Any, str, Any]]:
    """The switches of TF32. torch 2.9 has two sets, and reading the first raises where somebody has used the second."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        _ = matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        return [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(place, "allow_tf32", False) for place in (matmul, cudnn)]
