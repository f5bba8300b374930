"""The rule that says when a run overoptimises: its estimates, and how often and when it rings on known curves."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from comfy_tdpo.settings import OveroptimisationSettings
from comfy_tdpo.trainer import overoptimisation
from comfy_tdpo.trainer.overoptimisation import (
    Levels,
    Overoptimisation,
    Ratios,
    as_normal,
    grouped_ratios,
    largest_fall,
    latest_epochs,
    levels,
    levels_given,
    variance_ratio,
)

SAMPLES, PROMPTS = 96, 45  # of the preset shapes
NAMES = [str(i) for i in range(PROMPTS)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(
    curve: Tensor, seed: int, prompt_std: float = 1.0, noise_std: float = 1.0, each: int = 1, interaction: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Scores (E, N) of random prompts, and the prompts' numbers: the curve, an effect of each prompt, and noise.

    each: images of a prompt in a row; interaction: standard deviation of the effect of a prompt in an epoch.
    """
    g = generator(seed)
    prompts = torch.randint(PROMPTS, (len(curve), SAMPLES // each), generator=g).repeat_interleave(each, dim=1)
    effects = prompt_std * torch.randn(PROMPTS, generator=g)
    noise = noise_std * torch.randn(prompts.shape, generator=g)
    shared = interaction * torch.randn(len(curve), PROMPTS, generator=g)
    return curve[:, None].float() + effects[prompts] + shared.gather(1, prompts) + noise, prompts


# --- the levels


@pytest.mark.parametrize(("prompt", "interaction"), [(0.7, 0.0), (0.7, 0.3), (0.0, 2.0)])
def test_levels_are_those_of_dense_generalised_least_squares(prompt, interaction):
    scores, prompts = drawn(torch.arange(4.0), seed=0)
    scores, prompts = scores[:, :20].double(), prompts[:, :20] % 12
    x = torch.eye(4, dtype=torch.float64).repeat_interleave(20, dim=0)
    z = torch.nn.functional.one_hot(prompts.flatten(), PROMPTS).double()
    shared = prompt * z @ z.T + interaction * (z @ z.T) * (x @ x.T)  # one epoch and one prompt
    inverse = torch.linalg.inv(torch.eye(80, dtype=torch.float64) + shared)
    covariance = torch.linalg.inv(x.T @ inverse @ x)
    mean = covariance @ x.T @ inverse @ scores.flatten()
    residual = scores.flatten() - x @ mean
    found = levels_given(scores, prompts, Ratios(prompt, interaction))
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, covariance * (residual @ inverse @ residual) / (80 - 4))


def test_the_ratio_of_variances_is_that_within_the_epochs_by_hand():
    """Within a prompt 2; among all of an epoch 20 / 3, wherever its level is."""
    scores = torch.tensor([[1.0, 3.0, 5.0, 7.0], [11.0, 13.0, 15.0, 17.0]])
    ratio = variance_ratio(scores, torch.tensor([[0, 0, 1, 1]] * 2))
    assert ratio == pytest.approx((20 / 3 - 2) / 2)


def test_without_noise_the_prompts_of_an_epoch_make_no_difference():
    curve = torch.tensor([0.0, 0.5, -0.25, 1.0])
    scores, prompts = drawn(curve, seed=1, prompt_std=5.0, noise_std=0.0)
    assert (scores.mean(1) - scores.mean(1)[0] - curve).abs().max() > 0.5, "the plain means are far off"
    mean = levels(scores, prompts).mean
    torch.testing.assert_close(mean - mean[0], curve.double(), atol=1e-4, rtol=0)  # the ratio of variances is capped


def test_prompts_that_never_occur_twice_leave_the_plain_means():
    scores = torch.randn(3, 20, generator=generator(2)).double()
    found = levels(scores, torch.arange(60).reshape(3, 20))
    torch.testing.assert_close(found.mean, scores.mean(1))
    torch.testing.assert_close(found.covariance, torch.eye(3).double() * scores.var(1).mean() / 20)


def test_errors_are_as_large_as_they_say_and_smaller_than_those_of_plain_means():
    """Over 500 draws, the error of a change in standard errors has a standard deviation of 1, to 3 / sqrt(1000)."""
    wrong, plain = [], []
    for seed in range(500):
        scores, prompts = drawn(torch.zeros(6), seed)
        mean, covariance, _ = levels(scores, prompts)
        error = (covariance[5, 5] + covariance[0, 0] - 2 * covariance[0, 5]).sqrt()
        wrong.append((mean[5] - mean[0]) / error)
        plain.append((scores[5].mean() - scores[0].mean()) / error)
    assert torch.stack(wrong).std().item() == pytest.approx(1, abs=0.1)
    assert torch.stack(plain).std().item() > 1.2  # the variance of prompts adds to that of the noise


def test_what_lasts_is_told_from_what_changes_with_the_epoch_or_called_the_latter():
    """The effects of 45 prompts have a variance of 1 to 2 sqrt(2 / 45), and the interaction one of 0.5 squared."""
    scores, prompts = drawn(torch.zeros(100), seed=3, each=4, interaction=0.5)
    found = grouped_ratios(scores.double(), prompts)
    assert found.prompt == pytest.approx(1, abs=0.4) and found.interaction == pytest.approx(0.25, abs=0.1)


def test_few_degrees_of_freedom_count_less_as_student_says():
    for freedom, within in ((4, 0.02), (12, 0.005), (60, 0.001)):  # how exact the approximation is
        for t in (0.5, 2.0, 3.5, 6.0):
            exact = stats.norm.isf(stats.t.sf(t, freedom))
            assert as_normal(t, freedom) == pytest.approx(exact, rel=within)
            assert as_normal(-t, freedom) == -as_normal(t, freedom)
    assert as_normal(1e5, 12) < 30 and as_normal(3.5, math.inf) == 3.5


# --- the rule, on curves with the noise of an epoch's mean

NOISE = 0.1  # standard deviations of the first epoch: about 1 / sqrt(96)
RISING = 1.5 * (1 - torch.exp(-torch.arange(100.0) / 4))  # a training reward


def rings(curve: Tensor, training: Tensor, seed: int | None = 0, noise: float = NOISE, **settings) -> tuple[int, int]:
    """After which epoch the rule is met, and since which epoch the run then overoptimises; (0, 0) if never."""
    rule = OveroptimisationSettings(**settings)
    levels = curve.double() + (0 if seed is None else noise * torch.randn(len(curve), generator=generator(seed)))
    covariance = noise**2 * torch.eye(len(curve), dtype=torch.float64)
    for epoch in range(2 * rule.window, len(curve) + 1):
        found = Levels(levels[:epoch], covariance[:epoch, :epoch])
        fall = largest_fall(found, training[:epoch], latest_epochs(rule, epoch))
        if fall and fall.exceeds(rule):
            return epoch, fall.last + 2
    return 0, 0


def share(curve: Tensor, training: Tensor, runs: int, **settings) -> float:
    return sum(rings(curve, training, seed, **settings)[0] > 0 for seed in range(runs)) / runs


def gao(alpha: float, beta: float, epochs: int = 40) -> Tensor:
    """Gao et al. (2210.10760): d (alpha - beta log d), where d, the root of the KL, grows by 0.25 an epoch."""
    d = 0.25 * torch.arange(1, epochs + 1)
    return d * (alpha - beta * d.log())


def test_it_rings_soon_after_the_peak_of_a_curve_that_rises_then_falls():
    """The peak is at d = exp(alpha / beta - 1) = 3, epoch 12; the training reward keeps rising."""
    beta = 0.7
    curve, training = gao(beta * (1 + math.log(3)), beta), gao(2.0, 0.3)
    assert curve.argmax() + 1 == 12 and (training.diff() > 0).all()
    found = [rings(curve, training, seed) for seed in range(100)]
    assert all(12 < epoch <= 12 + 11 for epoch, _ in found)
    assert sum(9 <= since <= 17 for _, since in found) >= 90
    assert curve[11] - curve[22] < 0.8, "the fall that is noticed is of the noise's size"


def test_without_noise_it_never_rings_on_a_curve_that_does_not_fall():
    for curve in (torch.zeros(60), torch.arange(60.0), RISING[:60]):
        assert rings(curve, RISING[:60], seed=None) == (0, 0)


def test_noise_rarely_rings():
    """What docs/overoptimisation.md states of 15 epochs: of 1000 flat curves at most 2 %, of rising ones none."""
    assert share(torch.zeros(15), RISING[:15], 1000) <= 0.02
    assert share(0.05 * torch.arange(15.0), RISING[:15], 300) == 0


@pytest.mark.full
def test_noise_rarely_rings_in_long_runs():
    """The same of 100 epochs: of flat curves at most 15 %, of rising ones none."""
    assert share(torch.zeros(100), RISING, 100) <= 0.15
    assert share(0.02 * torch.arange(100.0), RISING, 30) == 0


def test_a_held_out_reward_that_falls_with_the_training_reward_is_no_overoptimisation():
    assert rings(-0.1 * torch.arange(15.0), -RISING[:15], seed=None) == (0, 0)
    assert rings(-0.1 * torch.arange(15.0), RISING[:15], seed=None)[0] > 0


def test_a_fall_must_be_large_and_certain():
    curve = torch.tensor([0.0] * 6 + [-0.3] * 4)
    assert rings(curve, RISING[:10], seed=None, noise=0.01) == (7, 6), "the latest epochs begin with 6"
    assert rings(curve, RISING[:10], seed=None, noise=0.01, fall=0.2) == (8, 6 + 1)
    assert rings(curve, RISING[:10], seed=None, noise=0.01, fall=0.31) == (0, 0)
    assert rings(curve, RISING[:10], seed=None, noise=0.5) == (0, 0)


# --- the watch over a run


def watched(curve: Tensor, seed: int = 0, begin: int = 0, watch: Overoptimisation | None = None) -> list[dict]:
    scores, prompts = drawn(curve, seed)
    watch = watch or Overoptimisation(OveroptimisationSettings(reward="shapes-alignment"), NAMES)
    return [
        watch.end_epoch(i + 1, RISING[i].item(), scores[i], [NAMES[p] for p in prompts[i]])
        for i in range(begin, len(curve))
    ]


FALLING = torch.cat([torch.zeros(5), -0.3 * torch.arange(1.0, 11.0)])


def test_once_it_overoptimises_a_run_stays_overoptimised():
    recovered = torch.cat([FALLING, torch.full((10,), 3.0)])
    since = [line.get("overoptimisation/since") for line in watched(recovered)]
    first = next(i for i, epoch in enumerate(since) if epoch)
    assert 5 < first + 1 <= 10 and 5 <= since[first] <= 7
    assert since[first:] == [since[first]] * (25 - first)
    assert watched(recovered)[-1]["overoptimisation/fall"] < 0


def test_a_run_longer_than_its_history_counts_epochs_from_its_start(monkeypatch):
    monkeypatch.setattr(overoptimisation, "HISTORY", 12)
    lines = watched(torch.cat([torch.zeros(20), FALLING]))
    since = next(line["overoptimisation/since"] for line in lines if "overoptimisation/since" in line)
    assert 25 <= since <= 27


@pytest.mark.parametrize(("each", "interaction"), [(1, 0.0), (4, 0.0), (4, 0.5), (8, 0.5), (24, 0.3)])
def test_images_of_one_prompt_that_share_an_effect_rarely_ring(each, interaction):
    """What docs/overoptimisation.md states of flat curves: of 15 epochs at most 2 %, of 150 runs at most 3 ring."""
    assert sum(rang(torch.zeros(15), seed, each, interaction) > 0 for seed in range(150)) <= 3


def test_a_fall_is_noticed_with_several_images_of_a_prompt():
    """Of a fall by 0.15 standard deviations of the noise in each epoch after the fifth."""
    falling = torch.cat([torch.zeros(5), -0.15 * torch.arange(1.0, 11.0)])
    found = [rang(falling, seed, each=4, interaction=0.3) for seed in range(50)]
    assert min(found) > 5 and sum(found) / len(found) < 10


def rang(curve: Tensor, seed: int, each: int, interaction: float) -> int:
    """After which epoch a run with so many images of a prompt in a row meets the rule; 0 if never."""
    scores, prompts = drawn(curve, seed, each=each, interaction=interaction)
    watch = Overoptimisation(OveroptimisationSettings(reward="shapes-alignment"), NAMES, each)
    for i, epoch in enumerate(scores):
        watch.end_epoch(i + 1, RISING[i].item(), epoch, [NAMES[p] for p in prompts[i]])
        if watch.since is not None:
            return i + 1
    return 0


def test_one_prompt_an_epoch_has_no_verdict_unless_it_is_always_the_same():
    def lines(names: list[str]) -> list[dict]:
        watch = Overoptimisation(OveroptimisationSettings(reward="shapes-alignment"), names, samples_per_prompt=8)
        scores = torch.randn(6, 8, generator=generator(0))
        return [watch.end_epoch(i + 1, float(i), scores[i], [names[i % len(names)]] * 8) for i in range(6)]

    assert lines(["a", "b", "c"]) == [{}] * 6
    assert "overoptimisation/fall" in lines(["a"])[-1]


def test_the_first_epochs_have_no_verdict_and_one_score_for_all_never_has():
    assert [bool(line) for line in watched(FALLING)[:5]] == [False, False, False, True, True]
    watch = Overoptimisation(OveroptimisationSettings(reward="shapes-alignment"), NAMES)
    assert [watch.end_epoch(i + 1, float(i), torch.ones(4), NAMES[:4]) for i in range(6)] == [{}] * 6


@pytest.mark.parametrize("epoch", [1, 4, 7, 12])
def test_what_was_saved_goes_on_exactly(epoch):
    first = Overoptimisation(OveroptimisationSettings(reward="shapes-alignment"), NAMES)
    before = watched(FALLING[:epoch], watch=first)
    again = Overoptimisation(OveroptimisationSettings(reward="shapes-alignment"), NAMES)
    again.load(first.tensors(), first.plain())
    scores, prompts = drawn(FALLING, 0)
    lines = [
        again.end_epoch(i + 1, RISING[i].item(), scores[i], [NAMES[p] for p in prompts[i]]) for i in range(epoch, 15)
    ]
    assert before + lines == _same_draws(epoch)


def _same_draws(epoch: int) -> list[dict]:
    watch = Overoptimisation(OveroptimisationSettings(reward="shapes-alignment"), NAMES)
    return watched(FALLING[:epoch], watch=watch) + watched(FALLING, begin=epoch, watch=watch)
