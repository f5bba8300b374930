"""Choosing a micro-batch that fits in memory, recognising out-of-memory errors, and measuring peak memory."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

CPU_MICRO_BATCH = 16  # default on a CPU: larger is no faster, and running out of RAM raises no error to catch

_FURTHER_WORDS = (  # not recognised by accelerate
    "error: out of memory",  # CUDA and HIP, outside torch's allocator
    "_STATUS_ALLOC_FAILED",  # cuBLAS, hipBLAS, cuSOLVER, cuDNN 8
    "_ALLOCATION_FAILED",  # cuDNN 9, on the device or the host
    "miopenStatusAllocFailed",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "Invalid buffer size",  # MPS, for a single tensor
)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` means out of memory, on any device and from any library."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or not all(isinstance(part, str) for part in error.args):
        return False
    return should_reduce_batch_size(error) or any(words in str(error) for words in _FURTHER_WORDS)


def first_micro_batch(configured: int | None, samples_per_update: int, device: torch.device) -> int:
    """The initial micro-batch: as configured, otherwise CPU_MICRO_BATCH on a CPU or the whole update on a GPU."""
    limit = configured or (CPU_MICRO_BATCH if device.type == "cpu" else samples_per_update)
    return _largest_divisor(samples_per_update, limit)


def smaller_micro_batch(micro_batch: int, samples_per_update: int) -> int:
    """At most half of `micro_batch`, and still a divisor of the update, whose result does not change.

    Raises:
        ValueError: `micro_batch` is already 1.
    """
    if micro_batch == 1:
        raise ValueError(
            "got out of memory with one sample at a time; expected room for one: lower resolution, set "
            "policy.gradient_checkpointing to true, set precision to bf16, or close other programs that use the device"
        )
    torch.cuda.empty_cache()
    return _largest_divisor(samples_per_update, micro_batch // 2)


def fitting_micro_batch(try_rows: Callable[[int], None], micro_batch: int, samples_per_update: int) -> int:
    """`micro_batch`, reduced until `try_rows` can process that many rows without running out of memory."""
    while True:
        try:
            try_rows(micro_batch)
            return micro_batch
        except Exception as error:
            if not out_of_memory(error):
                raise
        micro_batch = smaller_micro_batch(micro_batch, samples_per_update)


def _largest_divisor(samples_per_update: int, limit: int) -> int:
    """A divisor, because sampling and training agree to the last bit only if every forward has equally many rows."""
    return max(d for d in range(1, samples_per_update + 1) if samples_per_update % d == 0 and d <= limit)


def reset_peak_memory(device: torch.device) -> None:
    """Make `peak_memory` count from now on, where the system supports it: on CUDA, and for RAM on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # some containers do not allow it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes, that this process has held since the reset: GPU memory on CUDA, otherwise RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])  # "12345 kB"
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
