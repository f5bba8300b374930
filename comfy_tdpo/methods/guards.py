"""Guards: rewards that are not trained on and restrain the training.

Two uses. The penalty subtracts, from a sample's normalised reward, how far each guard's score is below the level that
its prompt had before training; on request, a score above that level counts in favour of the sample, and the weight of
each prompt adapts so that it keeps its level. The gate of GARDO (arXiv 2512.24138)
chooses the samples that the KL penalty restrains: those that the training reward ranks higher than the guards do.

Deviations from GARDO:
- the sign is the paper's. The published code counts ranks from the best sample, which reverses it;
- equal scores share a rank, and a sample whose disagreement is not positive is never chosen;
- the mean of the disagreement over the whole batch, which the paper compares between epochs, is always 0, because it is
  a difference of ranks. As in the code, the mean over the samples where it is not negative takes its place. Unlike in
  the code, the share waits for a full window before it moves.

Shapes: B samples of all processes.
"""

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..exact import exact
from .advantages import beside

Scores = dict[str, Tensor]  # guard -> (B,)


def share_beaten(scores: Tensor) -> Tensor:
    """The share of the other samples that each sample's score exceeds, (B,) float64 on the CPU; an equal score counts
    half."""
    scores = exact(scores)
    ours, theirs = scores[:, None], scores[None, :]
    beaten = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    return (beaten.sum(1) - 0.5) / (len(scores) - 1)


def disagreement(rewards: Tensor, guards: Scores) -> Tensor:
    """U of GARDO, (B,) in -1 ... 1: how much higher the training reward ranks a sample than the guards do."""
    return share_beaten(rewards) - torch.stack([share_beaten(scores) for scores in guards.values()]).mean(0)


class Gate:
    """Chooses the samples with the largest positive disagreement, at most a share of the batch.

    The share grows by a tenth when the guards disagree more than in all of the last `window` epochs, and shrinks by a
    tenth when they disagree less. It stays between a fifth and twice its starting value (0.02 ... 0.2 in GARDO's code).

    share: that of the latest epoch.
    """

    def __init__(self, share: float, window: int):
        self.start, self.share, self.window = share, share, window
        self.history: list[float] = []

    def __call__(self, rewards: Tensor, guards: Scores) -> Tensor:
        """1 for the samples that are chosen and 0 for the others, float32 (B,); once per epoch."""
        uncertain = disagreement(rewards, guards)
        self._adapt(uncertain[uncertain >= 0].mean().item())
        chosen = torch.zeros(len(rewards))
        count = round(self.share * len(rewards))
        chosen[uncertain.argsort(descending=True, stable=True)[:count]] = 1
        return torch.where(uncertain > 0, chosen, 0.0).to(rewards.device)

    def _adapt(self, level: float) -> None:
        if len(self.history) == self.window:
            factor = 1.1 if level > max(self.history) else 0.9 if level < min(self.history) else 1.0
            self.share = min(max(self.share * factor, self.start / 5), 2 * self.start, 1.0)
        self.history = [*self.history, level][-self.window :]

    def state(self) -> dict[str, Any]:
        return {"share": self.share, "history": self.history}

    def load(self, state: dict[str, Any]) -> None:
        self.share, self.history = state["share"], state["history"]


@dataclass
class Level:
    """What a guard's scores are compared with: the level of each prompt, and the unit of falls below it.

    mean: the level of prompts that have none of their own; std: the unit, a standard deviation of scores.
    """

    mean: float
    std: float
    prompts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_epoch(cls, prompts: list[str], scores: Tensor) -> "Level":
        """From an epoch's scores, (B,), and their standard deviation.

        A prompt's level is the mean of its scores and of two more at the overall mean, so that one lucky or unlucky
        image does not set it.
        """
        mean, std = exact(scores).mean().item(), exact(scores).std(correction=0).item()
        values: dict[str, list[float]] = {}
        for prompt, score in zip(prompts, scores.tolist(), strict=True):
            values.setdefault(prompt, [mean, mean]).append(score)
        return cls(mean, std, {prompt: fmean(found) for prompt, found in values.items()})

    @classmethod
    def of_prompts(cls, prompts: list[str], scores: Tensor) -> "Level":
        """From n > 1 scores of each of P prompts, (P, n), and their standard deviation within a prompt, or of all
        scores if those of each prompt are equal.

        A prompt's level is its mean, drawn to the overall mean as far as its error and the spread of the prompts say
        (empirical Bayes, for normal scores).
        """
        count, scores = scores.shape[1], exact(scores)
        within, means = scores.var(1).mean(), scores.mean(1)
        error = within / count
        between = (means.var() - error).clamp(min=0) if len(prompts) > 1 else torch.zeros_like(error)
        kept = (between / (between + error)).nan_to_num()
        levels = means.mean() + kept * (means - means.mean())
        std = within.sqrt() if within > 0 else scores.std(correction=0)
        return cls(means.mean().item(), std.item(), dict(zip(prompts, levels.tolist(), strict=True)))

    def fall(self, prompts: list[str], scores: Tensor) -> Tensor:
        """How far each score, (B, ...), is below its prompt's level in units of `std`, float64 on the CPU; negative
        above it."""
        levels = torch.tensor([self.prompts.get(prompt, self.mean) for prompt in prompts], dtype=torch.float64)
        return (beside(levels, scores) - exact(scores)) / (self.std + 1e-6)


@dataclass
class Weights:
    """What a fall of one guard costs: a weight that all prompts share, and what each prompt's own differs from it, both
    within bounds."""

    shared: float
    lowest: float
    highest: float
    own: dict[str, float] = field(default_factory=dict)

    def of(self, prompt: str) -> float:
        return self._bounded(self.shared + self.own.get(prompt, 0.0))

    def move(self, shared: float, own: dict[str, float]) -> None:
        """Change all weights by `shared`, but those of the prompts in `own` by what it says."""
        moved = {prompt: self.of(prompt) + change for prompt, change in own.items()}
        self.shared = self._bounded(self.shared + shared)
        self.own |= {prompt: weight - self.shared for prompt, weight in moved.items()}

    def _bounded(self, weight: float) -> float:
        return min(max(weight, self.lowest), self.highest)


class GuardPenalty:
    """What samples lose for a guard's falls, in normalised reward.

    With `adaptation`, the weights are the multipliers of a constrained optimisation, one constraint for each prompt:
    dual ascent, after each epoch, on the mean fall of the prompt's samples. They stay between a third of `penalty` and
    four times as much. What prompts have in common moves all weights, even those of prompts that were not drawn.

    Args:
        penalty: the weight of a fall of one unit, at first.
        credit: whether a score above its level counts in favour of the sample, as a negative fall.
        adaptation: how much a weight changes per epoch for each unit of its prompt's mean fall.
        slack: the fall, in units, that adaptation allows.
    """

    def __init__(self, penalty: float, credit: bool = False, adaptation: float = 0.0, slack: float = 0.0):
        self.penalty, self.credit, self.adaptation, self.slack = penalty, credit, adaptation, slack
        self.levels: dict[str, Level] = {}
        self.weights: dict[str, Weights] = {}

    def start(self, levels: dict[str, Level]) -> None:
        """Set the levels of the guards, by name."""
        self.levels = levels
        self.weights = {name: Weights(self.penalty, self.penalty / 3, self.penalty * 4) for name in levels}

    def __call__(self, prompts: list[str], guards: Scores) -> Tensor:
        """What each sample, or each of its scores, loses for each guard, (B, ..., G) float64 on the CPU; guards:
        (B, ...) each."""
        penalties = []
        for name, scores in guards.items():
            fall = self.levels[name].fall(prompts, scores)
            weights = torch.tensor([self.weights[name].of(prompt) for prompt in prompts], dtype=torch.float64)
            penalties.append(beside(weights, fall) * (fall if self.credit else fall.clamp(min=0)))
        return torch.stack(penalties, dim=-1)

    def adapt(self, prompts: list[str], guards: Scores) -> None:
        """Once per epoch, with the guards' scores of all samples, (B,) each."""
        for name, scores in guards.items():
            falls = self.levels[name].fall(prompts, scores)
            by_prompt: dict[str, list[float]] = {}
            for prompt, fall in zip(prompts, falls.tolist(), strict=True):
                by_prompt.setdefault(prompt, []).append(fall)
            own = {prompt: self.adaptation * (fmean(found) - self.slack) for prompt, found in by_prompt.items()}
            self.weights[name].move(self.adaptation * (falls.mean().item() - self.slack), own)

    def state(self) -> dict[str, Any]:
        return {
            "levels": {name: vars(level) for name, level in self.levels.items()},
            "weights": {name: vars(weights) for name, weights in self.weights.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.levels = {name: Level(**level) for name, level in state["levels"].items()}
        self.weights = {name: Weights(**weights) for name, weights in state["weights"].items()}
