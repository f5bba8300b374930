"""Statistics of an epoch, in float64 on the CPU: Apple's GPUs have no float64, and the numbers are few."""

from torch import Tensor


def exact(values: Tensor) -> Tensor:
    """`values` in float64 on the CPU."""
    return values.cpu().double()
