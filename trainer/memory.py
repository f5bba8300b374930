"""How many rows fit into memory at a time, and how much memory was held at most."""

import sys

import psutil
import torch

from comfy_tdpo.policy import DiffusionPolicy

CPU_MICRO_BATCH = 16  # where nothing is configured: more rows gain nothing there, and RAM does not say when it ends


def first_micro_batch(configured: int | None, samples_per_update: int, device: torch.device) -> int:
    """The micro-batch to begin with: as configured, else what a CPU likes or the whole update on a GPU."""
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


def fitting_micro_batch(policy: DiffusionPolicy, prompt: str, micro_batch: int, samples_per_update: int) -> int:
    """`micro_batch`, made smaller until a training step of that many rows fits into memory."""
    while True:
        positions = torch.zeros(micro_batch, dtype=torch.long, device=policy.device)
        embeds = policy.encode_prompts([prompt]).expand(micro_batch, -1, -1)
        try:
            latents = torch.zeros(micro_batch, *policy.latent_shape, device=policy.device)
            policy.step(latents, positions, embeds)[0].sum().backward()
            return micro_batch
        except torch.cuda.OutOfMemoryError:
            micro_batch = smaller_micro_batch(micro_batch, samples_per_update)
        finally:
            for parameter in policy.parameters:
                parameter.grad = None


def _largest_divisor(samples_per_update: int, limit: int) -> int:
    """Every forward has the same number of rows, so that sampling and training agree to the last bit."""
    return max(d for d in range(1, samples_per_update + 1) if samples_per_update % d == 0 and d <= limit)


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held: on the GPU where it trains there, else in RAM; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
