"""The noise levels of flow-matching models, as numbers. Cheap to import, as the registry beside it is."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

PATCH = 2  # elements of a latent, in each direction, for each token of these models


class DynamicShift(NamedTuple):
    """A shift that grows with the image: m = exp(mu), where mu is a line through two points in the number of tokens.

    The defaults are those of FLUX.1 dev; `exponential` False takes mu itself for m.
    """

    least_tokens: float = 256
    least: float = 0.5
    most_tokens: float = 4096
    most: float = 1.15
    exponential: bool = True

    def at(self, tokens: float) -> float:
        slope = (self.most - self.least) / (self.most_tokens - self.least_tokens)
        mu = self.least + slope * (tokens - self.least_tokens)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True)
class FlowSchedule:
    """x_t = (1 - t) x_0 + t eps at the levels t = m u / (1 + (m - 1) u) of u = 1, 1 - 1/T, ..., 1/T (arXiv 2403.03206).

    shift: m, or how it follows from the size of the image; timesteps: the network's time input at t = 1.
    """

    shift: float | DynamicShift = 1.0
    timesteps: int = 1000

    def at(self, height: int, width: int) -> "FlowSchedule":
        """The schedule with one m, for latents of `height` x `width` elements."""
        if isinstance(self.shift, DynamicShift):
            return replace(self, shift=self.shift.at(height * width / PATCH**2))
        return self

    @property
    def numbers(self) -> list[float]:
        """What distinguishes it from others."""
        shift = self.shift if isinstance(self.shift, DynamicShift) else [self.shift]
        return [*map(float, shift), float(self.timesteps)]
