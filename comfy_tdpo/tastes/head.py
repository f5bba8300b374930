"""A taste's head: Bayesian logistic regression on a picture's embedding, fitted to all votes at once.

u(e) = w . x + b, with x = (e - center) / scale, is the log-odds that a picture is liked. A vote on one picture has the
likelihood t log s(u) + (1 - t) log s(-u), where t is 1 for a liked picture, 0 for a disliked one, or between for a
rating; a pair has log s(u(winner) - u(loser)), which is Bradley and Terry's model (1952). The prior is
w ~ N(0, strength^2 I), b ~ N(0, BIAS^2). The log-posterior is concave: Newton's method finds its only maximum, and
Laplace's approximation (MacKay, 1992) gives the covariance and the evidence, by which the strength is chosen.

The scale makes the mean square of |x| over the votes 1, so that the strength is the prior standard deviation of the
log-odds over pictures like those voted on.

Shapes: N votes, n of single pictures and m of pairs; M pictures; D embedding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # above 8, the votes of every artist would be free of doubt
BIAS = 2.0  # log-odds; half of all artists like between a fifth and four fifths of their pictures
_STEPS = 100  # of Newton's method, which needs fewer than ten
_SMALL = 1e-10  # gradient at which it ends, in log-odds per unit of a coefficient


@dataclass(frozen=True)
class Ballot:
    """All votes as tensors in float64: the embeddings of single pictures, (n, D), their targets t, (n,), and the
    embeddings of winners and losers, (m, D) each."""

    singles: Tensor
    liked: Tensor
    winners: Tensor
    losers: Tensor

    def __len__(self) -> int:
        return len(self.singles) + len(self.winners)


@dataclass(frozen=True)
class Head:
    """The fitted head, in float64 on the CPU.

    center: (D,); scale: (); mean, covariance: of (w, b), (D + 1,) and (D + 1, D + 1); strength: (), the prior's.
    """

    center: Tensor
    scale: Tensor
    mean: Tensor
    covariance: Tensor
    strength: Tensor

    def log_odds(self, embeds: Tensor) -> Tensor:
        """The mean of u, float32 (B,), of unit embeddings, (B, D), on their device; it keeps gradients."""
        w, b = self.mean[:-1] / self.scale, self.mean[-1]
        shift = b - w @ self.center
        return embeds.float() @ w.to(embeds.device, torch.float32) + shift.item()

    def doubt(self, embeds: Tensor) -> Tensor:
        """The standard deviation of u, float64 (B,) on the CPU: how unsure the taste is of each picture."""
        rows = _rows(self._inputs(embeds), 1.0)
        return _quadratic(rows, self.covariance).sqrt()

    def sureness(self, embeds: Tensor) -> float:
        """The share of pairs of these pictures, (M, D), whose order it expects to have right: from 0.5 to 1."""
        rows = _rows(self._inputs(embeds), 0.0)
        means, products = rows @ self.mean, rows @ self.covariance @ rows.T
        a, b = torch.triu_indices(len(rows), len(rows), offset=1)
        own = products.diagonal()
        spread = (own[a] + own[b] - 2 * products[a, b]).clamp(min=1e-12).sqrt()
        return torch.special.ndtr((means[a] - means[b]).abs() / spread).mean().item() if len(a) else 0.5

    def _inputs(self, embeds: Tensor) -> Tensor:
        return (embeds.detach().cpu().double() - self.center) / self.scale


def fit(ballot: Ballot) -> Head:
    """The head with the strength of the largest evidence, the smallest of equals."""
    center, scale = _frame(ballot)
    rows, targets = _design(ballot, center, scale)
    found = [(*_laplace(rows, targets, strength), strength) for strength in STRENGTHS]
    mean, covariance, _, strength = max(found, key=lambda one: one[2])
    return Head(center, scale, mean, covariance, torch.tensor(strength, dtype=torch.float64))


def predicted(head: Head, ballot: Ballot) -> int:
    """How many votes a head fitted to all the others would predict, by one Newton step from the `head` of all.

    Ratings of exactly one half count as not predicted.
    """
    rows, targets = _design(ballot, head.center, head.scale)
    u = rows @ head.mean
    p = u.sigmoid()
    leverage = _quadratic(rows, head.covariance)
    without = u - leverage * (targets - p) / (1 - p * (1 - p) * leverage)
    return int((without * (targets - 0.5) > 0).sum())


def _frame(ballot: Ballot) -> tuple[Tensor, Tensor]:
    """The center and the scale of the embeddings of all votes."""
    embeds = torch.cat([ballot.singles, ballot.winners, ballot.losers])
    center = embeds.mean(0)
    scale = (embeds - center).square().sum(1).mean().sqrt()
    return center, scale.clamp(min=1e-6)


def _design(ballot: Ballot, center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, (N, D + 1), whose product with (w, b) is each vote's log-odds, and its targets, (N,)."""
    singles = _rows((ballot.singles - center) / scale, 1.0)
    pairs = _rows((ballot.winners - ballot.losers) / scale, 0.0)
    return torch.cat([singles, pairs]), torch.cat([ballot.liked, torch.ones_like(pairs[:, 0])])


def _rows(inputs: Tensor, constant: float) -> Tensor:
    return torch.cat([inputs, torch.full_like(inputs[:, :1], constant)], dim=1)


def _laplace(rows: Tensor, targets: Tensor, strength: float) -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of the posterior, and the logarithm of the evidence."""
    precision = rows.new_full((rows.shape[1],), strength**-2)
    precision[-1] = BIAS**-2
    mean = _mode(rows, targets, precision)
    factor = torch.linalg.cholesky(_curvature(rows, mean, precision))
    evidence = _log_posterior(rows, targets, precision, mean)
    evidence += 0.5 * precision.log().sum() - factor.diagonal().log().sum()
    return mean, torch.cholesky_inverse(factor), evidence.item()


def _mode(rows: Tensor, targets: Tensor, precision: Tensor) -> Tensor:
    """The maximum of the log-posterior, by Newton's method with steps halved until they climb."""
    at = torch.zeros_like(precision)
    height = _log_posterior(rows, targets, precision, at)
    for _ in range(_STEPS):
        slope = rows.T @ (targets - (rows @ at).sigmoid()) - precision * at
        if slope.abs().max() < _SMALL:
            break
        factor = torch.linalg.cholesky(_curvature(rows, at, precision))
        step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
        while (higher := _log_posterior(rows, targets, precision, at + step)) < height and step.abs().max() > 1e-12:
            step = step / 2
        at, height = at + step, higher
    return at


def _log_posterior(rows: Tensor, targets: Tensor, precision: Tensor, at: Tensor) -> Tensor:
    """Up to a constant, at the coefficients `at`."""
    u = rows @ at
    return (targets * u - F.softplus(u)).sum() - 0.5 * (precision * at * at).sum()


def _curvature(rows: Tensor, at: Tensor, precision: Tensor) -> Tensor:
    """The negative Hessian of the log-posterior."""
    p = (rows @ at).sigmoid()
    return rows.T @ ((p * (1 - p))[:, None] * rows) + precision.diag()


def _quadratic(rows: Tensor, matrix: Tensor) -> Tensor:
    return ((rows @ matrix) * rows).sum(1)
