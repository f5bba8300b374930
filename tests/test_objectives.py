"""The clipped objectives against derivatives and cases worked out by hand, in float64."""

import math

import pytest
import torch

from comfy_tdpo.methods.objectives import (
    approximate_kl,
    critic_loss,
    explained_variance,
    outside,
    policy_loss,
    ratio_of,
)
from comfy_tdpo.process.gaussian import log_prob

CLIP = 0.1


# --- the policy (Eq. 8)

# (ratio, temporal reward, whether its gradient flows): a sample is clipped where it has moved the way it is pushed.
POLICY_CASES = {
    "good, unmoved": (1.0, 0.7, True),
    "good, inside": (1.05, 0.7, True),
    "good, moved too far up": (1.5, 0.7, False),
    "good, moved down": (0.5, 0.7, True),
    "bad, unmoved": (1.0, -1.3, True),
    "bad, inside": (0.95, -1.3, True),
    "bad, moved up": (1.5, -1.3, True),
    "bad, moved too far down": (0.5, -1.3, False),
}


class LinearPolicy:
    """x_{k+1} ~ N(W x + b, sigma^2) over latents of 2 x 2 x 2, with samples at prescribed ratios."""

    def __init__(self, cases: list[tuple[float, float, bool]]):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).double()  # float32 values: `log_prob` casts samples to it

        self.x, self.y = draw(len(cases), 8), draw(len(cases), 8)
        self.weight, self.bias = draw(8, 8).requires_grad_(), draw(8).requires_grad_()
        self.sigma = 0.8
        self.ratio, self.reward, self.flows = (torch.tensor(column).double() for column in zip(*cases, strict=True))

    def loss(self):
        mean = (self.x @ self.weight.T + self.bias).view(-1, 2, 2, 2)
        new = log_prob(self.y.view_as(mean), mean, torch.full((1, 1, 1, 1), self.sigma).double())
        old = new.detach() - self.ratio.log()
        return policy_loss((new - old).exp(), self.reward, CLIP).mean()

    def gradients(self):
        """d loss / dW and / db: -T rho (y - mean) / (8 sigma^2) x^T, averaged over the samples; zero where clipped."""
        error = (self.y - self.x @ self.weight.T - self.bias).detach()
        by_mean = -(self.flows * self.reward * self.ratio)[:, None] * error / (8 * self.sigma**2) / len(self.x)
        return by_mean.T @ self.x, by_mean.sum(0)


@pytest.mark.parametrize("cases", [*[[case] for case in POLICY_CASES.values()], [*POLICY_CASES.values()]])
def test_policy_gradient_of_a_linear_policy(cases):
    policy = LinearPolicy(cases)
    policy.loss().backward()
    by_weight, by_bias = policy.gradients()
    if any(flows for *_, flows in cases):
        assert by_weight.norm() > 1e-3
    # float64 sums of eight products; sigma = 0.8 is float32's nearest on one side, hence 6e-8
    torch.testing.assert_close(policy.weight.grad, by_weight, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(policy.bias.grad, by_bias, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "reward", "expected"),
    [(1.5, 0.7, -0.77), (0.5, 0.7, -0.35), (1.5, -1.3, 1.95), (0.5, -1.3, 1.17), (1.0, 0.7, -0.7), (0.95, -1.3, 1.235)],
)
def test_policy_loss_by_hand(ratio, reward, expected):
    got = policy_loss(torch.tensor([ratio]).double(), torch.tensor([reward]).double(), CLIP)
    assert got.tolist() == pytest.approx([expected], rel=1e-6)  # the inputs went through float32


# --- the critic (Eq. 10)

# (prediction, old prediction, return) -> (loss, d loss / d prediction), clip range 0.2.
CRITIC_CASES = {
    "inside": ((0.1, 0.0, 1.0), (0.5 * 0.9**2, -0.9)),
    "moved far towards the return": ((0.5, 0.0, 1.0), (0.5 * 0.8**2, 0.0)),
    "moved far away from it": ((-0.5, 0.0, 1.0), (0.5 * 1.5**2, -1.5)),
    "moved far past it": ((2.5, 0.0, 1.0), (0.5 * 1.5**2, 1.5)),
    "downwards towards it": ((-0.5, 0.0, -1.0), (0.5 * 0.8**2, 0.0)),
    "downwards inside": ((0.9, 1.0, -1.0), (0.5 * 1.9**2, 1.9)),
    "the old one was right": ((0.3, 0.0, 0.0), (0.5 * 0.3**2, 0.3)),
}


@pytest.mark.parametrize("case", CRITIC_CASES)
def test_critic_loss_by_hand(case):
    inputs, expected = CRITIC_CASES[case]
    prediction, old, target = (torch.tensor([value], dtype=torch.float64) for value in inputs)
    prediction.requires_grad_()
    loss = critic_loss(prediction, old, target, 0.2)
    loss.sum().backward()
    assert (loss.item(), prediction.grad.item()) == pytest.approx(expected, rel=1e-12, abs=1e-12)  # float64


# --- what is watched


def test_approximate_kl_by_hand():
    assert approximate_kl(torch.tensor([0.1, -0.3])).item() == pytest.approx(0.5 * (0.01 + 0.09) / 2)


def test_approximate_kl_estimates_that_of_two_normal_distributions(generator):
    shift = 0.1  # KL(N(0, 1) || N(shift, 1)) = shift^2 / 2
    samples = torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    log_ratio = shift * samples - shift**2 / 2
    # its bias is shift^4 / 8, a quarter of a percent; its standard error sqrt(2 / 1e6) = 0.14 percent, times five
    assert approximate_kl(log_ratio).item() == pytest.approx(shift**2 / 2, rel=0.0025 + 0.007)


def test_both_sides_are_outside():
    ratio = torch.tensor([1.0, 1.05, 0.95, 1.2, 0.8, 3.0, 0.1, 1.0])
    assert outside(ratio, CLIP).tolist() == [False, False, False, True, True, True, True, False]
    assert not outside(torch.ones(4), 1e-4).any()


def test_explained_variance():
    returns = torch.tensor([-1.0, 0.0, 2.0, 3.0])
    assert explained_variance(returns, returns).item() == 1
    assert explained_variance(returns + 5, returns).item() == 1  # a constant offset is no variance
    # float32 arithmetic on values near 1: a few times 6e-8
    assert explained_variance(torch.full((4,), 0.3), returns).item() == pytest.approx(0, abs=5e-7)
    assert explained_variance(returns / 2, returns).item() == pytest.approx(1 - 1 / 4, abs=5e-7)
    assert explained_variance(-returns, returns).item() == pytest.approx(1 - 4, abs=2e-6)


def test_explained_variance_of_equal_returns_is_finite():
    assert math.isfinite(explained_variance(torch.tensor([0.0, 1.0]), torch.zeros(2)).item())


def test_a_ratio_stays_finite_and_still_pushes_back():
    log_ratio = torch.tensor([-3.0, 0.0, 20.0, 1e4], requires_grad=True)
    ratio = ratio_of(log_ratio)
    assert torch.equal(ratio[:3], log_ratio[:3].exp()) and ratio[3] == ratio[2]
    policy_loss(ratio, torch.full((4,), -1.0), CLIP).sum().backward()  # bad, moved up
    assert torch.isfinite(log_ratio.grad).all() and log_ratio.grad[3] == log_ratio.grad[2] > 0
