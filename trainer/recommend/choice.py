"""The rule of choice.

Of all snapshots and strengths whose held-out reward is at most `tolerance` below the base model's, and whose training
reward is above it, the one with the highest training reward. The tolerance is in standard deviations of the base's
images: a tenth is about the standard error of a mean of 90 images, so a smaller fall cannot be told from noise. If none
qualifies, none is recommended.

All cells are drawn from the same noise, so differences from the base are paired, image by image.

Shapes: n images of a cell.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .files import Cell


@dataclass(frozen=True)
class Outcome:
    """A cell's mean scores, and how far its held-out reward is above the base's, with the standard error of that."""

    cell: Cell
    training: float
    held_out: float
    change: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Recommendation:
    """What was measured, and what follows.

    training, held_out: the rewards' names; prompts: what was drawn; images: n.
    spread: the standard deviation of the held-out reward over the base's images; allowed: how far it may fall.
    base: the base model's outcome; outcomes: those of the snapshots; chosen: None if none qualifies.
    """

    training: str
    held_out: str
    prompts: str
    images: int
    spread: float
    allowed: float
    base: Outcome
    outcomes: list[Outcome]
    chosen: Outcome | None

    @property
    def nearest(self) -> Outcome:
        """The outcome whose held-out reward is the highest."""
        return max(self.outcomes, key=lambda outcome: outcome.held_out)

    def plain(self) -> dict[str, Any]:
        """As plain values, for choice.json."""
        return {
            "training_reward": self.training,
            "held_out_reward": self.held_out,
            "prompts": self.prompts,
            "images": self.images,
            "held_out_spread_of_base": self.spread,
            "allowed_fall": self.allowed,
            "newest_epoch": max(outcome.cell.epoch for outcome in self.outcomes),
            "base": _plain(self.base),
            "outcomes": [_plain(outcome) for outcome in self.outcomes],
            "recommended": _plain(self.chosen) if self.chosen else None,
        }


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "snapshot": outcome.cell.label,
        "epoch": outcome.cell.epoch,
        "strength": outcome.cell.strength,
        "training": outcome.training,
        "held_out": outcome.held_out,
        "held_out_change": outcome.change,
        "held_out_change_standard_error": outcome.error,
    }


def outcome_of(cell: Cell, training: Sequence[float], held_out: Sequence[float], base: Sequence[float]) -> Outcome:
    """The outcome of a cell from its n scores, and the n held-out scores of the `base` on the same noise."""
    differences = [own - of_base for own, of_base in zip(held_out, base, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    return Outcome(cell, fmean(training), fmean(held_out), fmean(differences), error)


def choose(base: Outcome, outcomes: Sequence[Outcome], allowed: float) -> Outcome | None:
    """The best of `outcomes` by the rule above; `allowed` is the tolerance in units of the held-out reward."""
    fit = [outcome for outcome in outcomes if outcome.change >= -allowed and outcome.training > base.training]
    return max(fit, key=lambda outcome: outcome.training, default=None)


def judge(
    names: tuple[str, str],
    scores: Mapping[Cell, tuple[Sequence[float], Sequence[float]]],
    tolerance: float,
    prompts: str,
) -> Recommendation:
    """The recommendation from the (training, held-out) `scores` of each cell, the base model's first.

    names: of these two rewards; prompts: what was drawn, as text.
    """
    (base_cell, (_, of_base)), *_ = scores.items()
    assert base_cell.is_base, "the base model comes first"
    base, *outcomes = [outcome_of(cell, *both, of_base) for cell, both in scores.items()]
    spread = stdev(of_base)
    allowed = tolerance * spread
    chosen = choose(base, outcomes, allowed)
    return Recommendation(*names, prompts, len(of_base), spread, allowed, base, outcomes, chosen)
