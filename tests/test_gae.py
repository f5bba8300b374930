"""Generalised advantage estimation: against its recursion, and on a chain whose values are known."""

from itertools import pairwise

import pytest
import torch

from comfy_tdpo.methods.advantages import generalised_advantages, temporal_rewards


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_the_sum_of_temporal_differences(generator, gae_lambda):
    """Schulman et al., Eq. 16, with reward only at the end: written out as the double sum."""
    gamma, steps = 0.9, 5
    values = torch.randn(4, steps, generator=generator).double()
    reward = torch.randn(4, generator=generator).double()
    returns = torch.stack([reward * gamma ** (steps - 1 - k) for k in range(steps)], 1)
    following = torch.cat([values[:, 1:], reward[:, None] / gamma], 1)  # the last difference is R - V
    differences = gamma * following - values
    expected = torch.zeros_like(values)
    for k in range(steps):
        for j in range(k, steps):
            expected[:, k] += (gamma * gae_lambda) ** (j - k) * differences[:, j]
    got = generalised_advantages(returns - values, gamma, gae_lambda, range(steps))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64 sums of five


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.9])
def test_the_closed_form_of_undiscounted_advantages(generator, gae_lambda):
    """-V_k + (1 - lambda) sum_j lambda^(j-1) V_{k+j} + lambda^(T-1-k) R."""
    steps = 6
    values, reward = torch.randn(3, steps, generator=generator).double(), torch.randn(3, generator=generator).double()
    got = generalised_advantages(reward[:, None] - values, 1.0, gae_lambda, range(steps))
    for k in range(steps):
        later = [gae_lambda ** (j - 1) * values[:, k + j] for j in range(1, steps - k)]
        expected = -values[:, k] + (1 - gae_lambda) * sum(later) + gae_lambda ** (steps - 1 - k) * reward
        torch.testing.assert_close(got[:, k], expected, rtol=1e-12, atol=1e-12)  # float64


def chain(count: int, steps: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """x_{k+1} = x_k + z_k with reward x_T: states x_0 ... x_{T-1} and noise z, (count, steps) each."""
    noise = torch.randn(count, steps, generator=generator, dtype=torch.float64)
    start = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return torch.cat([start, start + noise.cumsum(1)[:, :-1]], 1), noise


def test_with_the_true_values_every_lambda_has_the_same_gradient_and_0_the_least_variance(generator):
    """E[A_k s_k] with the score s_k = z_k; here V_k = x_k, and the gradient is 1 at every step."""
    states, noise = chain(200_000, 4, generator)
    rewards = states[:, -1:] + noise[:, -1:]
    variances = []
    for gae_lambda in (0.0, 0.5, 1.0):
        products = generalised_advantages(rewards - states, 1.0, gae_lambda, range(4)) * noise
        # five standard errors of the mean
        tolerance = 5 * (products.var(0).max().item() / len(products)) ** 0.5
        torch.testing.assert_close(products.mean(0), torch.ones(4).double(), rtol=0, atol=tolerance)
        variances.append(products.var(0)[0].item())
    assert variances == sorted(variances) and variances[0] < 0.5 * variances[-1]


def test_a_value_that_is_off_biases_all_but_lambda_1(generator):
    """With V_k = x_k + w x_k the bias is (1 - lambda) sum_j lambda^(j-1) E[w x_{k+j} z_k], and E[x_{k+j} z_k] = 1."""
    states, noise = chain(200_000, 4, generator)
    rewards, w, gae_lambda = states[:, -1:] + noise[:, -1:], 0.5, 0.6
    products = generalised_advantages(rewards - (1 + w) * states, 1.0, gae_lambda, range(4)) * noise
    bias = [w * (1 - gae_lambda) * sum(gae_lambda ** (j - 1) for j in range(1, 4 - k)) for k in range(4)]
    tolerance = 5 * (products.var(0).max().item() / len(products)) ** 0.5
    torch.testing.assert_close(products.mean(0), 1 + torch.tensor(bias).double(), rtol=0, atol=tolerance)
    exact = generalised_advantages(rewards - (1 + w) * states, 1.0, 1.0, range(4)) * noise
    tolerance = 5 * (exact.var(0).max().item() / len(exact)) ** 0.5
    torch.testing.assert_close(exact.mean(0), torch.ones(4).double(), rtol=0, atol=tolerance)


def test_steps_that_the_critic_does_not_know_are_left_out(generator):
    returns, residuals = torch.randn(2, 6, 5, generator=generator)
    trained = torch.tensor([True, False, True, True, False])
    expected, _ = temporal_rewards(returns[:, trained], residuals[:, trained], gae_lambda=0.7)
    got, _ = temporal_rewards(returns, residuals, trained, gae_lambda=0.7, known=trained)
    assert torch.equal(got[:, trained], expected)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7])
def test_a_step_that_is_left_out_is_discounted(generator, gae_lambda):
    """With reward only at the end, which is gamma^(T-1-k) of it at step k: the double sum over the known steps."""
    gamma, places, length = 0.8, [0, 1, 4], 6
    known = torch.tensor([step in places for step in range(length)])
    values = torch.randn(5, length, generator=generator).double()
    reward = torch.randn(5, generator=generator).double()
    returns = torch.stack([reward * gamma ** (length - 1 - k) for k in range(length)], 1)
    ends = [gamma ** (after - before) * values[:, after] for before, after in pairwise(places)] + [returns[:, 4]]
    differences = [end - values[:, place] for end, place in zip(ends, places, strict=True)]
    expected = torch.zeros(5, 3).double()
    for i in range(3):
        for j in range(i, 3):
            expected[:, i] += gamma ** (places[j] - places[i]) * gae_lambda ** (j - i) * differences[j]
    got, std = temporal_rewards(returns, values, known, gamma, gae_lambda, known)
    torch.testing.assert_close(got[:, known] * std, expected - expected.mean(), rtol=1e-12, atol=1e-12)  # float64


def test_a_known_step_after_the_trained_ones_ends_their_noise(generator):
    """With lambda 0, the last trained step is compared with the prediction that follows it, not with the return."""
    returns, residuals = torch.randn(6, 1, generator=generator).expand(6, 5), torch.randn(6, 5, generator=generator)
    trained = torch.tensor([True, True, True, False, False])
    got, std = temporal_rewards(returns, residuals, trained, gae_lambda=0.0)
    raw = residuals[:, 1:4] - residuals[:, :3]
    torch.testing.assert_close(got[:, :3], (raw - raw.mean()) / std)
