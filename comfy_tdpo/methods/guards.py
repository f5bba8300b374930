"""Guards: rewards that are not trained on and restrain the training.

Two uses. The penalty subtracts, from a sample's normalised reward, how far each guard's score is below its level of the
first epoch; on request, a score above that level counts in favour of the sample. The gate of GARDO (arXiv 2512.24138)
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

Scores = dict[str, Tensor]  # guard -> (B,)


def share_beaten(scores: Tensor) -> Tensor:
    """The share of the other samples that each sample's score exceeds, (B,) float64; an equal score counts half."""
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
        chosen = torch.zeros_like(rewards, dtype=torch.float32)
        count = round(self.share * len(rewards))
        chosen[uncertain.argsort(descending=True, stable=True)[:count]] = 1
        return torch.where(uncertain > 0, chosen, 0.0)

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
    """A guard's scores in the first epoch: their mean and standard deviation, and the level of each prompt drawn in it.

    A prompt's level is the mean of its scores and of two more at the overall mean, so that one lucky or unlucky image
    does not set it.
    """

    mean: float
    std: float
    prompts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: list[str], scores: Tensor) -> "Level":
        mean, std = scores.double().mean().item(), scores.double().std(correction=0).item()
        values: dict[str, list[float]] = {}
        for prompt, score in zip(prompts, scores.tolist(), strict=True):
            values.setdefault(prompt, [mean, mean]).append(score)
        return cls(mean, std, {prompt: fmean(found) for prompt, found in values.items()})

    def fall(self, prompts: list[str], scores: Tensor, both_ways: bool) -> Tensor:
        """How far each score, (B, ...), is below its prompt's level, or below the overall mean for a prompt that was
        not drawn, float64 in standard deviations; for scores above it 0, or with `both_ways` a negative fall."""
        levels = torch.tensor([self.prompts.get(prompt, self.mean) for prompt in prompts], dtype=torch.float64)
        below = levels.to(scores.device).view(-1, *[1] * (scores.ndim - 1)) - scores.double()
        return (below if both_ways else below.clamp(min=0)) / (self.std + 1e-6)


class GuardLevels:
    """The guards' levels in the first epoch, and how far scores are below them.

    both_ways: whether a score above its level counts as a negative fall.
    """

    def __init__(self, both_ways: bool = False) -> None:
        self.both_ways = both_ways
        self.levels: dict[str, Level] = {}

    def fall(self, prompts: list[str], guards: Scores) -> Tensor:
        """How far each guard's scores, (B, ...), are below their levels, (B, ..., G) float64 in standard deviations.

        The first call, in the first epoch, sets the levels; its scores must be (B,).
        """
        if not self.levels:
            self.levels = {name: Level.of(prompts, scores) for name, scores in guards.items()}
        falls = [self.levels[name].fall(prompts, scores, self.both_ways) for name, scores in guards.items()]
        return torch.stack(falls, dim=-1)

    def state(self) -> dict[str, Any]:
        return {name: vars(level) for name, level in self.levels.items()}

    def load(self, state: dict[str, Any]) -> None:
        self.levels = {name: Level(**level) for name, level in state.items()}
