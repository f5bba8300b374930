"""When a run begins to overoptimise: a rule that watches one held-out reward.

The prompts of an epoch are drawn at random, and some prompts score higher than others. So the rule compares epochs
after an adjustment for their prompts: a score is the level of its epoch plus the effect of its prompt plus noise, where
prompt effects are random. The best linear unbiased levels have a closed form.

If a prompt is drawn several times in a row (samples_per_prompt above 1), its images of an epoch have a random effect in
common too, the interaction: a policy that changes from epoch to epoch draws some prompts better and others worse. What
an epoch knows is then limited by its prompts and not by its images.

The rule: a run overoptimises if the held-out level, averaged over the latest epochs, is lower than its average over an
earlier stretch of epochs by more than a number of standard errors and by more than a fraction of the first epoch's
standard deviation, while the mean training reward is higher than in that stretch. Of all stretches, the one with the
most standard errors counts. It then has overoptimised since the epoch after the stretch, and does so for good.

Shapes: E epochs, N samples of an epoch in all processes, P prompts, R stretches. A cell is a prompt in an epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comfy_tdpo.settings import OveroptimisationSettings

SHARE = 10  # the latest epochs are at least one in ten, so that a long run can tell a smaller fall from noise
PARTS = 3  # an earlier stretch is at least a third of the epochs before; with any stretch, long runs ring by chance
HISTORY = 100  # latest epochs that are compared, so that the work of an epoch stays small in long runs
MOST = 1e6  # largest ratio of variances; only scores without any noise reach it
ROUNDING = 1e-6  # standard deviations; differences of less are rounding errors of float32 scores


# --- the levels of the epochs -----------------------------------------------------------------------------------------


class Levels(NamedTuple):
    """The held-out reward of each epoch, adjusted for its prompts: mean (E,) and their covariance (E, E), float64.

    freedom: degrees of freedom of the variance that the covariance is estimated from, if they may be few.
    """

    mean: Tensor
    covariance: Tensor
    freedom: float = math.inf


class Ratios(NamedTuple):
    """The variance of prompt effects, and of the interaction of prompts and epochs, over that of the noise."""

    prompt: float
    interaction: float = 0.0


def levels(scores: Tensor, prompts: Tensor, grouped: bool = False) -> Levels:
    """Generalised least squares with random prompt effects, from scores (E, N) and the numbers of their prompts.

    grouped: whether prompts were drawn several times in a row, so that there is an interaction.
    """
    scores = scores.double()
    if not grouped:
        return levels_given(scores, prompts, Ratios(variance_ratio(scores, prompts)))
    _, count = _by_prompt(scores, prompts)
    found = levels_given(scores, prompts, grouped_ratios(scores, prompts))
    return found._replace(freedom=int((count > 0).sum()) - len(scores))


def levels_given(scores: Tensor, prompts: Tensor, ratios: Ratios) -> Levels:
    """The same with known ratios of the variances.

    The samples have the covariance s^2 (I + interaction Y Y^T + prompt Z Z^T), where Y (E N, E P) and Z (E N, P) say
    which cell and which prompt each has. So the n samples of a cell weigh as much as n / (1 + interaction n) without
    the interaction. The inverse without it is I - Z diag(shrinkage) Z^T, shrinkage = prompt / (1 + prompt n), with n
    samples of a prompt.
    """
    epochs, samples = scores.shape
    total, count = _by_prompt(scores, prompts)  # (E, P)
    share = 1 / (1 + ratios.interaction * count)
    weight, weighed = share * count, share * total
    shrinkage = ratios.prompt / (1 + ratios.prompt * weight.sum(0))
    information = torch.diag(weight.sum(1)) - weight * shrinkage @ weight.T
    moments = weighed.sum(1) - weight * shrinkage @ weighed.sum(0)
    mean = torch.linalg.solve(information, moments)
    inside = scores.square().sum() - ((1 - share) * total.square() / count.clamp(min=1)).sum()
    squares = inside - (shrinkage * weighed.sum(0).square()).sum()
    noise = ((squares - mean @ moments) / max(epochs * (samples - 1), 1)).clamp(min=0)
    return Levels(mean, noise * torch.linalg.inv(information))


def variance_ratio(scores: Tensor, prompts: Tensor) -> float:
    """The variance between prompts over that within a prompt, both within an epoch; 0 if no prompt occurs twice."""
    within = _within(scores, prompts)
    if within is None:
        return 0.0
    overall = scores.var(dim=1).mean()
    return _ratio(overall - within, within, overall)


def grouped_ratios(scores: Tensor, prompts: Tensor) -> Ratios:
    """The ratios of scores in which prompts occur several times in a row.

    How much cells differ within an epoch is known well. How much of that lasts, as effects of the prompts, is only seen
    where a prompt recurs in another epoch: in the products of a prompt's deviations in two epochs. As lasting counts
    what is left of their sum less two of its standard errors; all else counts as interaction, which is the safe side.
    """
    within = _within(scores, prompts)
    assert within is not None, "a prompt is drawn several times in a row"
    samples, overall = scores.shape[1], scores.var(dim=1).mean()
    total, count = _by_prompt(scores, prompts)
    share = count / samples
    pairs = (1 - share.square().sum(1)).mean() * samples / (samples - 1)  # that are of two prompts
    between = ((overall - within) / pairs.clamp(min=1 / samples)).clamp(min=0)

    deviations = total / samples - share * scores.mean(1, keepdim=True)
    variances = share.square() * between + share * within / samples  # of the deviations if nothing lasts
    overlap, own = share @ share.T, share.square() @ share.T
    expected = _across_epochs(overlap - own - own.T + overlap.square())  # of the products, over the lasting variance
    error = (2 * _across_epochs(variances @ variances.T)).sqrt()
    lasting = (_across_epochs(deviations @ deviations.T) - 2 * error) / expected.clamp(min=1e-12)
    lasting = lasting.clamp(min=0).minimum(between)
    return Ratios(_ratio(lasting, within, overall), _ratio(between - lasting, within, overall))


def _within(scores: Tensor, prompts: Tensor) -> Tensor | None:
    """The variance within a prompt in an epoch; None if no prompt occurs twice."""
    total, count = _by_prompt(scores, prompts)
    cells = total.square() / count.clamp(min=1)
    repeats = scores.numel() - (count > 0).sum()
    return (scores.square().sum() - cells.sum()).clamp(min=0) / repeats if repeats and scores.shape[1] > 1 else None


def _ratio(variance: Tensor, within: Tensor, overall: Tensor) -> float:
    return (variance / within.clamp(min=overall / MOST + 1e-300)).clamp(0, MOST).item()


def _across_epochs(products: Tensor) -> Tensor:
    """The sum of (E, E) products of two different epochs."""
    return products.sum() - products.trace()


def _by_prompt(scores: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and numbers of the scores by epoch and prompt, (E, P) each."""
    zeros = scores.new_zeros(len(scores), int(prompts.max()) + 1)
    return zeros.scatter_add(1, prompts, scores), zeros.scatter_add(1, prompts, torch.ones_like(scores))


# --- the rule ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fall:
    """How far the latest epochs are below an earlier stretch: its last epoch as an index, the size, the size in errors.

    A negative size is a rise. If the errors are estimated from few prompts, they count less: as many as are as rare
    in a normal distribution.
    """

    last: int
    size: float
    errors: float

    def exceeds(self, settings: OveroptimisationSettings) -> bool:
        """Whether it is large and certain enough to be overoptimisation."""
        return self.size > settings.fall and self.errors > settings.standard_errors


def largest_fall(found: Levels, training: Tensor, window: int) -> Fall | None:
    """The fall with the most standard errors, among earlier stretches in which the training reward was lower.

    training: its mean in each epoch, (E,). None if there is no such stretch. The latest `window` epochs are compared
    with stretches of at least as many, see `_stretches`.
    """
    epochs = len(training)
    stretches = _stretches(epochs, window)  # (R, E)
    latest = torch.zeros(epochs, dtype=torch.float64)
    latest[-window:] = 1 / window
    contrasts = stretches - latest
    contrasts = contrasts[contrasts @ training.double() < 0]
    if not len(contrasts):
        return None
    sizes = contrasts @ found.mean
    errors = (contrasts @ found.covariance * contrasts).sum(1).clamp(min=ROUNDING**2).sqrt()
    best = int((sizes / errors).argmax())
    last = int((contrasts[best, :-window] > 0).nonzero().max())
    return Fall(last, sizes[best].item(), as_normal((sizes[best] / errors[best]).item(), found.freedom))


def as_normal(t: float, freedom: float) -> float:
    """The quantile of the normal distribution that is as rare as `t` of Student's; Wallace's (1959) approximation."""
    if math.isinf(freedom):
        return t
    size = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return math.copysign(size, t)


def latest_epochs(settings: OveroptimisationSettings, epoch: int) -> int:
    """How many epochs up to `epoch` are compared with earlier ones."""
    return min(max(settings.window, epoch // SHARE), HISTORY // 2)


def _stretches(epochs: int, window: int) -> Tensor:
    """Every long enough stretch of the epochs before the latest `window`, as weights of its mean."""
    place = torch.arange(epochs)
    first, last = torch.meshgrid(place, place, indexing="ij")
    fits = (last - first + 1 >= max(window, (epochs - window) // PARTS)) & (last < epochs - window)
    first, last = first[fits][:, None], last[fits][:, None]
    return ((place >= first) & (place <= last)).double() / (last - first + 1)


# --- a run ------------------------------------------------------------------------------------------------------------


class Overoptimisation:
    """The held-out scores of a run so far, and whether it overoptimises; part of the run's checkpoint.

    since: the first epoch whose images are worse; None as long as the rule sees no overoptimisation.
    best: the last epoch of the stretch that the latest epochs are furthest below; 0 before there is one.
    """

    def __init__(self, settings: OveroptimisationSettings, prompts: Sequence[str], samples_per_prompt: int = 1):
        self.settings = settings
        self._numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self._grouped = samples_per_prompt > 1 and len(self._numbers) > 1
        self._scores: list[Tensor] = []
        self._prompts: list[Tensor] = []
        self._training: list[float] = []
        self._std = 0.0  # of the scores of the first epoch that was watched
        self.since: int | None = None
        self.best = 0
        self._spare: list[int] = []  # epochs whose LoRA is kept only until it is known whether it will be needed

    def end_epoch(self, epoch: int, training: float, scores: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Add an epoch, and return its metrics; they have `overoptimisation/since` once the rule has been met.

        training: the epoch's mean training reward; scores: the held-out reward, (N,); prompts: of these samples.
        """
        scores = scores.cpu().float()
        if not self._scores:
            self._std = scores.double().std(correction=0).item()
        self._scores = [*self._scores, scores][-HISTORY:]
        self._prompts = [*self._prompts, torch.tensor([self._numbers[p] for p in prompts])][-HISTORY:]
        self._training = [*self._training, training][-HISTORY:]
        fall = self._fall(latest_epochs(self.settings, epoch))
        metrics = {}
        if fall is not None:
            metrics = {"overoptimisation/fall": fall.size, "overoptimisation/standard_errors": fall.errors}
            if self.since is None:
                self.best = epoch - len(self._scores) + 1 + fall.last
                if fall.exceeds(self.settings):
                    self.since = self.best + 1
        return metrics | ({} if self.since is None else {"overoptimisation/since": self.since})

    def _fall(self, window: int) -> Fall | None:
        """The largest fall, in standard deviations of the first epoch."""
        if not self._std:
            return None
        found = levels(torch.stack(self._scores) / self._std, torch.stack(self._prompts), self._grouped)
        if found.freedom < 1:  # one prompt an epoch: the prompts cannot be told from the epochs
            return None
        return largest_fall(found, torch.tensor(self._training, dtype=torch.float64), window)

    # --- which LoRAs are kept, so that the last one from before the fall exists when the rule is met

    def may_need(self, epoch: int) -> bool:
        """Whether to keep the LoRA of this epoch, the latest, which is kept for no other reason."""
        if self.settings.reward is None or self.since is not None:
            return False
        self._spare.append(epoch)
        return True

    def unneeded(self, epoch: int) -> list[int]:
        """The epochs, of those that `may_need` kept, whose LoRA is no longer needed after the latest `epoch`.

        Needed are the LoRA of the epoch before `best`, which drew the images of `best` unless LoRAs are averaged, and
        those of the latest epochs, which may become it.
        """
        recent = epoch - latest_epochs(self.settings, epoch + 1) if self.since is None else epoch + 1
        gone = [old for old in self._spare if old < recent and old != self.best - 1]
        self._spare = [old for old in self._spare if old not in gone]
        return gone

    # --- what a checkpoint holds

    def tensors(self) -> dict[str, Tensor]:
        if not self._scores:
            return {}
        training = torch.tensor(self._training, dtype=torch.float64)
        return {"scores": torch.stack(self._scores), "prompts": torch.stack(self._prompts), "training": training}

    def plain(self) -> dict[str, Any]:
        return {"std": self._std, "since": self.since, "best": self.best, "spare": self._spare}

    def load(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        self._scores, self._prompts = list(tensors["scores"].cpu()), list(tensors["prompts"].cpu())
        self._training = tensors["training"].tolist()
        self._std, self.since, self.best = plain["std"], plain["since"], plain["best"]
        self._spare = list(plain["spare"])
