"""Recognising out-of-memory errors, and going on with fewer rows: the last resort, after MemoryBudget."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

Result = TypeVar("Result")

_FURTHER_WORDS = (  # not recognised by accelerate
    "error: out of memory",  # CUDA and HIP, outside torch's allocator
    "_STATUS_ALLOC_FAILED",  # cuBLAS, hipBLAS, cuSOLVER, cuDNN 8
    "_ALLOCATION_FAILED",  # cuDNN 9, on the device or the host
    "nable to find an engine to execute",  # torch, when memory ran out in all of cuDNN's kernels for a convolution
    "nable to find a valid cuDNN algorithm",
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


def within_memory(work: Callable[[], Result], shrink: Callable[[], None]) -> Result:
    """What `work` returns. Each time that it runs out of memory, `shrink` is called and `work` starts over.

    `shrink` lowers the number of rows that `work` takes at once, and raises ValueError once they can't be fewer.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # here, where nothing refers to the tensors of `work` any more
        shrink()


def largest_divisor(samples_per_update: int, limit: int, together: int = 1) -> int:
    """A divisor, because sampling and training agree to the last bit only if every forward has equally many rows; a
    multiple of `together`, and that itself if the limit is lower."""
    update, most = (max(rows // together, 1) for rows in (samples_per_update, limit))
    return together * max(d for d in range(1, update + 1) if update % d == 0 and d <= most)


def smaller_micro_batch(micro_batch: int, samples_per_update: int, together: int = 1) -> int:
    """At most half of `micro_batch`, and still such a divisor of the update, whose result does not change.

    Raises:
        ValueError: `micro_batch` is already `together` or less.
    """
    if micro_batch <= together:
        number = "one sample" if together == 1 else f"{together} samples"
        raise ValueError(
            f"got out of memory with {number} at a time; expected room for {number}: lower resolution, set "
            "policy.gradient_checkpointing to true, set precision to fp16 or bf16, set guidance to 1, or close other "
            "programs that use the device"
        )
    return largest_divisor(samples_per_update, micro_batch // 2, together)


def smaller_decode_batch(decode_batch: int) -> int:
    """Half of `decode_batch`.

    Raises:
        ValueError: `decode_batch` is already 1.
    """
    if decode_batch == 1:
        raise ValueError(
            "got out of memory decoding one image at a time; expected room for one: lower resolution, set precision to "
            "fp16 or bf16, set reward_precision to bf16, or close other programs that use the device"
        )
    return decode_batch // 2
