"""The objectives beside Eq. 8: the step-normalised ratio and the trust-region mask."""

import pytest
import torch
from accelerate import Accelerator
from toy import Brightness, new_run

from comfy_tdpo.methods.objectives import step_normalised_log_ratio, trust_region_loss
from comfy_tdpo.process.gaussian import gaussian_kl, log_prob
from comfy_tdpo.trainer.training import Training

SHAPE = (4, 3, 3)


def drawn(generator, count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=generator).double()


def column(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value).double()


def test_the_normalised_ratio_is_sigma_times_log_ratio_plus_kl(generator):
    """log rho~ = sigma (lbar + Dbar), with both averaged over elements."""
    old, new, noise, sigma = drawn(generator, 5), drawn(generator, 5), drawn(generator, 5), 0.3
    sample, std = old + sigma * noise, column(sigma)
    log_ratio = log_prob(sample, new, std) - log_prob(sample, old, std)
    kl = gaussian_kl(new, old, std) / new[0].numel()
    got = step_normalised_log_ratio(new, old, noise)
    torch.testing.assert_close(got, sigma * (log_ratio + kl), rtol=1e-5, atol=1e-6)  # log_prob casts samples to float32


def test_the_normalised_ratio_has_mean_zero_and_a_spread_without_sigma(generator):
    """Over the noise, log rho~ is Normal(0, mean(delta^2) / N)."""
    delta, draws = drawn(generator, 1), drawn(generator, 100_000)
    got = step_normalised_log_ratio(delta, torch.zeros_like(delta), draws)
    spread = (delta.square().mean() / delta.numel()) ** 0.5
    assert abs(got.mean().item()) < 5 * spread / 100_000**0.5  # five standard errors
    assert got.std().item() == pytest.approx(spread.item(), rel=5 / 200_000**0.5)


@pytest.mark.parametrize("sigma", [0.04, 0.8])
def test_its_gradient_is_sigma_times_that_of_the_log_ratio_where_the_policy_sampled(generator, sigma):
    mean, noise = drawn(generator, 3).requires_grad_(), drawn(generator, 3)
    old = mean.detach()
    (got,) = torch.autograd.grad(step_normalised_log_ratio(mean, old, noise).sum(), mean)
    (plain,) = torch.autograd.grad(log_prob(old + sigma * noise, mean, column(sigma)).sum(), mean)
    torch.testing.assert_close(got, sigma * plain, rtol=1e-5, atol=1e-7)  # log_prob casts samples to float32


# (temporal reward, ratio, KL) -> whether its gradient flows: not where it has left the region and is to move on
TRUST_CASES = {
    "good, up, inside": (0.7, 1.2, 0.1, True),
    "good, up, outside": (0.7, 1.2, 0.3, False),
    "good, down, inside": (0.7, 0.8, 0.1, True),
    "good, down, outside": (0.7, 0.8, 0.3, True),
    "bad, up, inside": (-0.7, 1.2, 0.1, True),
    "bad, up, outside": (-0.7, 1.2, 0.3, True),
    "bad, down, inside": (-0.7, 0.8, 0.1, True),
    "bad, down, outside": (-0.7, 0.8, 0.3, False),
}


@pytest.mark.parametrize("case", TRUST_CASES)
def test_the_trust_region_stops_only_what_moves_on(case):
    temporal, ratio, kl, flows = TRUST_CASES[case]
    log_ratio = torch.tensor([ratio]).log().requires_grad_()
    loss = trust_region_loss(log_ratio, torch.tensor([temporal]), torch.tensor([kl]), limit=0.2)
    loss.sum().backward()
    expected = -temporal * ratio if flows else 0  # the derivative of exp is exp
    assert (loss.item(), log_ratio.grad.item()) == pytest.approx((expected, expected))


def test_a_ratio_beyond_numbers_outside_the_region_leaves_the_gradient_whole():
    log_ratio = torch.tensor([0.0, 200.0], requires_grad=True)  # exp(200) is infinite in float32
    trust_region_loss(log_ratio, torch.tensor([1.0, 1.0]), torch.tensor([0.0, 9.0]), 0.2).sum().backward()
    assert log_ratio.grad.tolist() == [-1.0, 0.0]


def test_the_kl_is_torchs(generator):
    new, old = drawn(generator, 2), drawn(generator, 2)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(new, 0.4), normal(old, 0.4)).sum((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(new, old, column(0.4)), expected, rtol=1e-6, atol=0)  # 0.4 in float32


# --- in a training


@pytest.fixture
def make_training(make_policy, tmp_path):
    def make(**policy) -> Training:
        run = new_run(tmp_path / str(len(list(tmp_path.iterdir()))), policy=policy)
        made = make_policy(steps=run.config.steps, guidance=run.config.guidance, trained=True)
        return Training(run.config, made, Brightness(), {}, run, Accelerator(cpu=True))

    return make


def test_the_noise_of_a_step_is_drawn_again(make_training):
    training = make_training(objective="step-normalised")
    training._sample()
    method, batch = training.method, training.context.progress.batch()
    rows, steps = torch.tensor([5, 0, 3]), torch.tensor([0, 2, 1])
    with torch.no_grad():
        step = method.policy.step(*method._inputs(batch, rows, steps))
    again = step.mean + step.std * method._noise(rows, steps)
    torch.testing.assert_close(again, batch.latents[rows, steps + 1], rtol=1e-5, atol=1e-5)  # float32


def first_gradient(training: Training, step: int) -> torch.Tensor:
    training._sample()
    rows, kept = torch.arange(4), []
    training.context.optimizer.register_step_pre_hook(
        lambda *_: kept.extend(parameter.grad.flatten().clone() for parameter in training.policy.parameters)
    )
    progress = training.context.progress
    training.method.update_policy(progress.batch(), progress.targets, rows, torch.full((4,), step))
    return torch.cat(kept)


@pytest.mark.parametrize("step", [0, 2])
def test_the_first_gradient_of_each_objective(make_training, step):
    """Where the policy still is the one that sampled: a step-normalised ratio weighs a step by its sigma."""
    settings = {"max_grad_norm": 1e5}
    plain = first_gradient(make_training(objective="clip", **settings), step)
    assert plain.norm() > 0
    region = first_gradient(make_training(objective="trust-region", **settings), step)
    torch.testing.assert_close(region, plain, rtol=1e-4, atol=1e-6 * plain.abs().max().item())  # float32
    training = make_training(objective="step-normalised", **settings)
    sigma = training.policy.process.sigma[step]
    got = first_gradient(training, step)
    torch.testing.assert_close(got, sigma * plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())  # float32
