"""The rule of choice.

Of all snapshots and strengths whose training reward is above the base model's, and whose held-out reward is at most
`tolerance` below it with a confidence of 90 %, the one with the highest training reward. The tolerance is in standard
deviations of the base's images. If none qualifies, the nearest are drawn more often and judged again, see `work.py`.

All cells are drawn from the same noise, so differences from the base are paired, image by image. The confidence is for
prompts like these: images of one prompt change alike, so a standard error is that of a mean over prompts, and its
quantile Student's. (A single prompt says nothing about others; its standard error is that of a mean over images.)

The best of many cells is partly lucky. So what is reported of it is measured again, on noise that has not chosen it.

Shapes: n images of a cell.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from .files import BASE, Cell, Draw

CONFIDENCE = 0.9
NEAREST = 3  # cells that are drawn more often if none qualifies

Scores = Mapping[Draw, tuple[float, float]]  # (training, held-out) of each image of a cell


@dataclass(frozen=True)
class Outcome:
    """A cell's mean scores, and how they differ from the base's on the same noise.

    gain: in the training reward; change: in the held-out reward, with its standard error; least: its lower bound.
    """

    cell: Cell
    training: float
    held_out: float
    gain: float = 0.0
    change: float = 0.0
    error: float = 0.0
    least: float = 0.0


@dataclass(frozen=True)
class Recommendation:
    """What was measured, and what follows.

    training, held_out: the rewards' names; prompts: what was drawn; images: n, of cells that were not drawn more often.
    spread: the standard deviation of the held-out reward over the base's images; allowed: how far it may fall.
    base: the base model's outcome; outcomes: those of the snapshots; chosen: None if none qualifies.
    fresh_base, fresh: the base model's and the chosen cell's outcomes on noise that has chosen nothing.
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
    fresh_base: Outcome | None = None
    fresh: Outcome | None = None

    @property
    def nearest(self) -> list[Outcome]:
        """The outcomes with a gain that are the surest to keep the held-out reward, the surest first."""
        gained = [outcome for outcome in self.outcomes if outcome.gain > 0]
        return sorted(gained, key=lambda outcome: -outcome.least)[:NEAREST]

    def checked(self, base: Scores, chosen: Scores) -> "Recommendation":
        """The same with these fresh scores of the base model and of the chosen cell."""
        assert self.chosen is not None, "only what was chosen is checked"
        of_base, fresh = outcome_of(BASE, base, base), outcome_of(self.chosen.cell, chosen, base)
        return replace(self, fresh_base=of_base, fresh=fresh)

    def plain(self) -> dict[str, Any]:
        """As plain values, for choice.json; the means of what is recommended are those on fresh noise."""
        return {
            "training_reward": self.training,
            "held_out_reward": self.held_out,
            "prompts": self.prompts,
            "images": self.images,
            "held_out_spread_of_base": self.spread,
            "allowed_fall": self.allowed,
            "confidence": CONFIDENCE,
            "newest_epoch": max(outcome.cell.epoch for outcome in self.outcomes),
            "base": _plain(self.base),
            "outcomes": [_plain(outcome) for outcome in self.outcomes],
            "recommended": _plain(self.fresh) if self.fresh else None,
            "recommended_beside": _plain(self.fresh_base) if self.fresh_base else None,
        }


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "snapshot": outcome.cell.label,
        "epoch": outcome.cell.epoch,
        "strength": outcome.cell.strength,
        "training": outcome.training,
        "held_out": outcome.held_out,
        "training_gain": outcome.gain,
        "held_out_change": outcome.change,
        "held_out_change_standard_error": outcome.error,
        "held_out_change_least": outcome.least,
    }


def outcome_of(cell: Cell, scores: Scores, base: Scores) -> Outcome:
    """The outcome of a cell from its scores, and those of the base on the same noise and maybe more."""
    pairs = [(draw, *own, *base[draw]) for draw, own in scores.items()]
    gain = fmean(training - of_base for _, training, _, of_base, _ in pairs)
    changes = {draw: held_out - of_base for draw, _, held_out, _, of_base in pairs}
    change, (error, freedom) = fmean(changes.values()), standard_error(changes)
    means = [fmean(values) for values in zip(*scores.values(), strict=True)]
    return Outcome(cell, means[0], means[1], gain, change, error, change - float(stdtrit(freedom, CONFIDENCE)) * error)


def standard_error(values: Mapping[Draw, float]) -> tuple[float, int]:
    """The standard error of the mean of the images' `values`, clustered by prompt, and its degrees of freedom."""
    mean, by_prompt = fmean(values.values()), defaultdict(list)
    for draw, value in values.items():
        by_prompt[draw.prompt].append(value - mean)
    clusters = [sum(own) for own in by_prompt.values()]
    if len(clusters) == 1:
        clusters = next(iter(by_prompt.values()))
    freedom = len(clusters) - 1
    return math.sqrt(sum(own**2 for own in clusters) * (freedom + 1) / freedom) / len(values), freedom


def choose(outcomes: list[Outcome], allowed: float) -> Outcome | None:
    """The best of `outcomes` by the rule above; `allowed` is the tolerance in units of the held-out reward."""
    fit = [outcome for outcome in outcomes if outcome.gain > 0 and outcome.least >= -allowed]
    return max(fit, key=lambda outcome: outcome.gain, default=None)


def judge(names: tuple[str, str], scores: Mapping[Cell, Scores], tolerance: float, prompts: str) -> Recommendation:
    """The recommendation from the `scores` of all cells, among them the base model's, on the noise that may choose.

    names: of the training and the held-out reward; prompts: what was drawn, as text.
    """
    of_base = scores[BASE]
    base, *outcomes = [outcome_of(cell, own, of_base) for cell, own in scores.items()]
    assert base.cell == BASE, "the base model comes first"
    spread = stdev(held_out for _, held_out in of_base.values())
    allowed = tolerance * spread
    images = min(map(len, scores.values()))
    return Recommendation(*names, prompts, images, spread, allowed, base, outcomes, choose(outcomes, allowed))
