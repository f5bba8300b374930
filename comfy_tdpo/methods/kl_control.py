"""Controllers of the KL penalty's coefficient: how it adapts from epoch to epoch to hold a target KL."""

import math
from typing import Any, Protocol


class Controller(Protocol):
    """value: the coefficient, in normalised reward per nat."""

    value: float

    def update(self, kl: float, samples: int) -> None:
        """Adapt to the mean `kl`, in nats per trajectory, of an epoch's `samples` trajectories."""
        ...

    def restart(self) -> None:
        """Forget earlier epochs, because the reference was reset and the KL starts again at 0."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class KLCoefficient:
    """A fixed coefficient, or one adapted to hold a target KL (Ziegler et al., arXiv 1909.08593, Sec. 2.2).

    Args:
        value: normalised reward per nat.
        target: KL to hold, in nats per trajectory, or None for a fixed coefficient.
        horizon: samples over which the coefficient may change by a factor of about 1.2.
    """

    def __init__(self, value: float, target: float | None = None, horizon: int = 10_000):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Adapt to the mean `kl`, in nats per trajectory, of `samples` trajectories."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * samples / self.horizon

    def restart(self) -> None:
        """It has no memory of earlier epochs."""

    def state(self) -> dict[str, Any]:
        return {"value": self.value}

    def load(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class ProportionalIntegral:
    """A coefficient adapted in every epoch by e, the logarithm of the KL over its target, bounded to +-BOUND:

        log value += PROPORTIONAL (e - e of the epoch before) + INTEGRAL e.

    At first, as long as the KL is below the target and rises by more than a fifth in each epoch, the coefficient is not
    lowered: a KL on its way up from 0 says little about where it will settle (no windup).

    A penalty with twice the coefficient lets the KL settle at about a quarter. So the logarithm of the KL answers with
    -2 times the change of the coefficient's, a few epochs later; the constants fit a delay of one to four epochs.
    (Stooke et al., arXiv 2007.03964, control a constraint's multiplier in this way; here it is its logarithm.)
    """

    PROPORTIONAL, INTEGRAL, BOUND, RISING = 0.3, 0.3, 2.5, 1.2

    def __init__(self, value: float, target: float):
        self.value, self.target = value, target
        self.restart()

    def restart(self) -> None:
        self.before: float | None = None  # the KL of the epoch before
        self.rising = True  # whether it has risen in every epoch

    def update(self, kl: float, samples: int) -> None:
        error, before = self._error(kl), self._error(self.before or 0.0)
        change = self.PROPORTIONAL * (error - before) + self.INTEGRAL * error
        self.rising = self.rising and (self.before is None or kl > self.RISING * self.before)
        if self.rising and kl < self.target:
            change = max(change, 0.0)
        self.value *= math.exp(change)
        self.before = kl

    def _error(self, kl: float) -> float:
        return min(max(math.log(kl / self.target), -self.BOUND), self.BOUND) if kl > 0 else -self.BOUND

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "before": self.before, "rising": self.rising}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self.before, self.rising = state["value"], state["before"], state["rising"]
