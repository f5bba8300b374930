"""A taste's head against independent solvers, sampling and integration."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from comfy_tdpo.tastes import head as heads
from comfy_tdpo.tastes.head import BIAS, Ballot, fit, predicted

D = 6


def unit(count: int, seed: int, dim: int = D) -> Tensor:
    embeds = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return embeds / embeds.norm(dim=1, keepdim=True)


def true(embeds: Tensor) -> Tensor:
    """What an artist prefers: a direction, in log-odds."""
    return 4 * embeds[:, 0] - 3 * embeds[:, 1]


def ballot(singles: int, pairs: int, seed: int = 0, dim: int = D) -> Ballot:
    """Noisy votes of that artist, and a rating between."""
    a, b, c = (unit(count, seed + i, dim) for i, count in enumerate((singles, pairs, pairs)))
    luck = torch.rand(singles + pairs, generator=torch.Generator().manual_seed(seed + 3), dtype=torch.float64)
    liked = (luck[:singles] < true(a).sigmoid()).double()
    if singles:
        liked[-1] = 0.25
    wins = (luck[singles:] < (true(b) - true(c)).sigmoid())[:, None]
    return Ballot(a, liked, torch.where(wins, b, c), torch.where(wins, c, b))


def negative_log_posterior(votes: Ballot, strength: float):
    """Written with numpy from the formulas, as a function of (w, b), apart from a constant."""
    everything = np.concatenate([votes.singles, votes.winners, votes.losers])
    center = everything.mean(0)
    scale = np.sqrt(((everything - center) ** 2).sum(1).mean())
    x, winners, losers = ((np.asarray(part) - center) / scale for part in (votes.singles, votes.winners, votes.losers))
    liked = votes.liked.numpy()

    def value(at: np.ndarray) -> float:
        w, b = at[:-1], at[-1]
        u, between = x @ w + b, winners @ w - losers @ w
        likelihood = -(liked * np.logaddexp(0, -u) + (1 - liked) * np.logaddexp(0, u)).sum()
        likelihood -= np.logaddexp(0, -between).sum()
        return -likelihood + 0.5 * (w @ w) / strength**2 + 0.5 * b * b / BIAS**2

    return value


@pytest.mark.parametrize(("singles", "pairs"), [(12, 0), (0, 9), (30, 20)], ids=["thumbs", "pairs", "both"])
def test_the_mean_is_the_maximum_that_another_solver_finds(singles, pairs):
    votes = ballot(singles, pairs)
    head = fit(votes)
    value = negative_log_posterior(votes, head.strength.item())
    found = minimize(value, np.zeros(D + 1), method="BFGS", options={"gtol": 1e-9})
    # the error of BFGS with gradients by differences, 1e-8, over a curvature of at least 1 / 64
    np.testing.assert_allclose(head.mean.numpy(), found.x, atol=1e-4)


def test_the_covariance_is_the_inverse_of_the_curvature():
    votes = ballot(30, 20)
    head = fit(votes)
    value, at, step = negative_log_posterior(votes, head.strength.item()), head.mean.numpy(), 1e-4
    moves = step * np.eye(D + 1)
    curvature = [
        [value(at + a + b) - value(at + a - b) - value(at - a + b) + value(at - a - b) for b in moves] for a in moves
    ]
    inverse = np.linalg.inv(np.array(curvature) / (4 * step**2))
    # rounding, 1e-14, over step^2, and the step's own error of second order
    np.testing.assert_allclose(head.covariance.numpy(), inverse, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_evidence_is_the_integral(strength):
    """Over w and b on a fine grid; Laplace's approximation of 120 votes is good to a hundredth of a nat or so."""
    votes = ballot(80, 40, dim=2)
    votes = replace(votes, **{name: getattr(votes, name)[:, :1] for name in ("singles", "winners", "losers")})
    value = negative_log_posterior(votes, strength)
    center, scale = heads._frame(votes)
    *_, evidence = heads._laplace(*heads._design(votes, center, scale), strength)
    w, b = np.linspace(-9, 9, 181), np.linspace(-9, 9, 181)
    density = np.exp([[-value(np.array([x, y])) for y in b] for x in w])
    integral = density.sum() * (w[1] - w[0]) * (b[1] - b[0]) / (2 * np.pi * strength * BIAS)
    assert evidence == pytest.approx(np.log(integral), abs=0.03)


def test_the_strength_has_the_largest_evidence():
    votes = ballot(40, 40)
    design = heads._design(votes, *heads._frame(votes))
    evidence = {strength: heads._laplace(*design, strength)[2] for strength in heads.STRENGTHS}
    assert fit(votes).strength.item() == max(evidence, key=evidence.get)
    assert len(set(evidence.values())) == len(evidence)


def test_more_votes_leave_less_doubt_and_a_better_order():
    fresh, doubts, orders = unit(200, 99), [], []
    for count in (10, 40, 160, 640):
        head = fit(ballot(count, 0))
        doubts.append(head.doubt(fresh).mean().item() / head.log_odds(fresh).double().std().item())
        ranks = [values.argsort().argsort().double() for values in (head.log_odds(fresh).double(), true(fresh))]
        orders.append(torch.corrcoef(torch.stack(ranks))[0, 1].item())
    assert doubts == sorted(doubts, reverse=True) and doubts[-1] < doubts[0] / 3
    assert orders[-1] > 0.95 and orders[-1] > orders[0]


def test_doubt_and_sureness_are_those_of_samples_of_the_posterior():
    head, fresh = fit(ballot(20, 10)), unit(12, 7)
    factor = torch.linalg.cholesky(head.covariance)
    noise = torch.randn(20_000, D + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = head.mean + noise @ factor.T
    rows = torch.cat([(fresh - head.center) / head.scale, torch.ones(12, 1, dtype=torch.float64)], dim=1)
    scores = drawn @ rows.T  # (samples, pictures)
    # a standard deviation from 20,000 samples is good to half a percent, the mean to a hundredth of it
    torch.testing.assert_close(head.doubt(fresh), scores.std(0), rtol=0.03, atol=0)
    torch.testing.assert_close(head.log_odds(fresh).double(), scores.mean(0), rtol=0, atol=0.1)
    means = head.log_odds(fresh)
    a, b = torch.triu_indices(12, 12, offset=1)
    agree = (((scores[:, a] - scores[:, b]) * (means[a] - means[b])) > 0).double().mean().item()
    assert head.sureness(fresh) == pytest.approx(agree, abs=0.01)


def test_votes_predicted_from_the_others_are_those_of_heads_fitted_without_them():
    votes = ballot(25, 15)
    head = fit(votes)
    rows, targets = heads._design(votes, head.center, head.scale)
    right = 0
    for i in range(len(rows)):
        others = torch.arange(len(rows)) != i
        mean, *_ = heads._laplace(rows[others], targets[others], head.strength.item())
        right += int((rows[i] @ mean) * (targets[i] - 0.5) > 0)
    assert predicted(head, votes) == right
    assert 20 < right < 40, "neither all nor none, or the test would say little"


def test_swapped_pairs_turn_the_taste_around():
    votes = ballot(0, 20)
    head, turned = fit(votes), fit(replace(votes, winners=votes.losers, losers=votes.winners))
    torch.testing.assert_close(turned.mean[:-1], -head.mean[:-1], rtol=0, atol=1e-9)


def test_separable_votes_and_repeated_pictures_have_a_finite_head():
    a = unit(1, 0)
    votes = Ballot(a.repeat(40, 1), (torch.arange(40) % 2).double(), a[:0], a[:0])
    same = fit(votes)
    assert torch.isfinite(same.mean).all() and same.log_odds(a).abs().item() < 1e-6
    apart = Ballot(torch.cat([a, -a]), torch.tensor([1.0, 0.0], dtype=torch.float64), a[:0], a[:0])
    up, down = fit(apart).log_odds(torch.cat([a, -a])).tolist()
    assert up > 0.5 and down < -0.5


def test_gradients_reach_the_embeddings():
    head, embeds = fit(ballot(20, 0)), unit(3, 5).float().requires_grad_()
    (gradient,) = torch.autograd.grad(head.log_odds(embeds).sum(), embeds)
    w = (head.mean[:-1] / head.scale).float()
    torch.testing.assert_close(gradient, w.expand(3, D))
