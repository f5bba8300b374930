"""How much memory there is, and how much of it is held."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil
import torch


class Gauge(Protocol):
    """The memory of a device, in bytes.

    exact: whether two measurements of the same work agree, so that the number of rows may be chosen by them.
    """

    exact: bool

    def free(self) -> int:
        """What can still be allocated."""
        ...

    def held(self) -> int:
        """What this process holds."""
        ...

    def peak(self) -> int:
        """The most that this process has held since `reset`, or since it began."""
        ...

    def reset(self) -> None:
        """Make `peak` count from now on, where the system supports it."""
        ...


class Cuda:
    """A Gauge: the memory of a GPU, by CUDA or ROCm; held are the tensors."""

    exact = True

    def __init__(self, device: torch.device):
        self.device = device

    def free(self) -> int:
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        free, _ = torch.cuda.mem_get_info(index)
        return free + torch.cuda.memory_reserved(self.device) - self.held()  # the allocator's own, unused

    def held(self) -> int:
        torch.cuda.synchronize(self.device)  # the driver's allocator, ComfyUI's default, frees when the GPU gets there
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)


class Ram:
    """A Gauge: the RAM of this process. All of its threads and the allocator's habits are in it, so it is not exact."""

    exact = False

    def free(self) -> int:
        return psutil.virtual_memory().available

    def held(self) -> int:
        return psutil.Process().memory_info().rss

    def peak(self) -> int:
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset
        if sys.platform == "linux":
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return 1024 * int(fields["VmHWM"].split()[0])  # "12345 kB"
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def reset(self) -> None:
        if sys.platform == "linux":
            with suppress(OSError):  # some containers do not allow it
                Path("/proc/self/clear_refs").write_text("5")


def gauge_of(device: torch.device) -> Gauge:
    """The gauge of `device`: of RAM for all that are not CUDA's."""
    return Cuda(device) if device.type == "cuda" else Ram()
