"""How many rows fit into memory at a time, what running out of it looks like, and how much was held at most."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

CPU_MICRO_BATCH = 16  # the default there: more rows gain nothing, and running out of RAM raises no error to catch

_FURTHER_WORDS = (  # that accelerate does not know
    "error: out of memory",  # CUDA and HIP, outside torch's allocator
    "_STATUS_ALLOC_FAILED",  # cuBLAS, hipBLAS, cuSOLVER, cuDNN 8
    "_ALLOCATION_FAILED",  # cuDNN 9, on the device or the host
    "miopenStatusAllocFailed",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "Invalid buffer size",  # MPS, of one tensor
)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out, on any device, in whatever library."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or not all(isinstance(part, str) for part in error.args):
        return False
    return should_reduce_batch_size(error) or any(words in str(error) for words in _FURTHER_WORDS)


def first_micro_batch(configured: int | None, samples_per_update: int, device: torch.device) -> int:
    """The micro-batch to begin with: as configured, else what suits a CPU, or the whole update on a GPU."""
    limit = configured or (CPU_MICRO_BATCH if device.type == "cpu" else samples_per_update)
    return _largest_divisor(samples_per_update, limit)


def smaller_micro_batch(micro_batch: int, samples_per_update: int) -> int:
    """Half of `micro_batch`, or as near as a divisor allows; the update it is a part of stays the same.

    Raises:
        ValueError: it is 1 already.
    """
    if micro_batch == 1:
        raise ValueError(
            "got out of memory with one sample at a time; expected room for that: lower resolution, set "
            "policy.gradient_checkpointing to true, precision to bf16, or close what else uses the device"
        )
    torch.cuda.empty_cache()
    return _largest_divisor(samples_per_update, micro_batch // 2)


def fitting_micro_batch(try_rows: Callable[[int], None], micro_batch: int, samples_per_update: int) -> int:
    """`micro_batch`, made smaller until `try_rows` does its work on that many without running out of memory."""
    while True:
        try:
            try_rows(micro_batch)
            return micro_batch
        except Exception as error:
            if not out_of_memory(error):
                raise
        micro_batch = smaller_micro_batch(micro_batch, samples_per_update)


def _largest_divisor(samples_per_update: int, limit: int) -> int:
    """Every forward has the same number of rows, so that sampling and training agree to the last bit."""
    return max(d for d in range(1, samples_per_update + 1) if samples_per_update % d == 0 and d <= limit)


def reset_peak_memory(device: torch.device) -> None:
    """Have `peak_memory` count from now on, where the system can: on CUDA, and in RAM on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # some containers do not allow it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held since the reset: on the GPU where it trains there, else in RAM; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])  # "12345 kB"
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
