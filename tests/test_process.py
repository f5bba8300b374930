"""One denoising step against torch.distributions and diffusers' DDIMScheduler, both in float64."""

import json

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from comfy_tdpo.process import make_process
from comfy_tdpo.process.ddim import ddim_tables, step_sigma
from comfy_tdpo.process.flow_schedule import FlowSchedule
from comfy_tdpo.process.gaussian import gaussian_kl, guide, log_prob, scaled_clip_range

SHAPE = (4, 8, 8)

# float32. From a predicted noise or v, the first step divides 6e-8 * 4 sigma by the signal of 0.068: 4e-6. From a
# predicted sample, the last step divides latents of 5 sigma by the noise of 0.041, and the 0.0206 by which it
# multiplies that again carries the 3.5e-5 of its sigma: 5 / 0.041 * 0.0206 * 3.5e-5 = 9e-5.
MEAN_TOLERANCE = {"epsilon": 1e-5, "v_prediction": 1e-5, "sample": 1e-4}


def draw(generator, *shape) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


# --- densities


@pytest.mark.parametrize("scale", [0.02065, 0.454, 3.0])
def test_log_prob_is_the_mean_of_the_normal_log_density(generator, scale):
    mean, sigma = draw(generator, 5, *SHAPE), scale * torch.tensor([1.0, 1.1, 0.9, 1.3, 0.7]).view(-1, 1, 1, 1)
    sample = mean + sigma * draw(generator, 5, *SHAPE)
    expected = Normal(mean.double(), sigma.double().expand_as(mean)).log_prob(sample.double()).mean((1, 2, 3))
    got = log_prob(sample, mean, sigma)
    assert got.shape == (5,) and got.dtype == torch.float32
    # float32: z = (x - mean) / sigma carries 6e-8 |x| / sigma <= 1e-5 an element at the smallest sigma, of random sign
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)


def test_log_prob_does_not_grow_with_the_latent(generator):
    small, large = draw(generator, 1, 4, 8, 8), draw(generator, 1, 4, 64, 64)
    got = [log_prob(x, torch.zeros_like(x), torch.ones(1, 1, 1, 1)).item() for x in (small, large)]
    # the entropy of N(0, 1) is 1.4189; a mean of 256 squares / 2 has a standard deviation of 0.044: five of them
    assert got == pytest.approx([-1.4189, -1.4189], abs=0.22)


def test_kl_is_that_of_normal_distributions_summed(generator):
    mean, reference = draw(generator, 3, *SHAPE), draw(generator, 3, *SHAPE)
    sigma = torch.tensor([0.02, 0.4, 1.0]).view(-1, 1, 1, 1)
    wide = sigma.double().expand_as(mean)
    expected = kl_divergence(Normal(mean.double(), wide), Normal(reference.double(), wide)).sum((1, 2, 3))
    got = gaussian_kl(mean, reference, sigma)
    assert got.shape == (3,)
    # a float32 sum of 256 terms: 256 * 6e-8 = 1.5e-5 at worst
    torch.testing.assert_close(got.double(), expected, rtol=1.5e-5, atol=0)
    assert torch.equal(gaussian_kl(mean, mean, sigma), torch.zeros(3))


# --- the step


def ddim_in_float64(scheduler, output, latents, timestep) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sigma of diffusers' own step at eta = 1, from its result for two known noises."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    output, latents = output.double(), latents.double()
    mean, above = (
        scheduler.step(output, timestep, latents, eta=1.0, variance_noise=torch.full_like(latents, noise)).prev_sample
        for noise in (0.0, 1.0)
    )
    return mean, above - mean


@pytest.mark.parametrize("steps", [50, 20, 7])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("prediction_type", MEAN_TOLERANCE)
def test_every_step_is_diffusers_ddim_at_eta_1(make_scheduler, generator, prediction_type, steps_offset, steps):
    settings = {"prediction_type": prediction_type, "steps_offset": steps_offset}
    schedule = ddim_tables(make_scheduler(**settings), steps)
    reference = make_scheduler(**settings)
    reference.set_timesteps(steps)
    assert len(schedule) == steps and torch.equal(schedule.times, reference.timesteps)
    latents, output = draw(generator, steps, *SHAPE), draw(generator, steps, *SHAPE)
    mean, sigma, _ = schedule.step(output, latents, torch.arange(steps))
    assert sigma.shape == (steps, 1, 1, 1)
    for k, timestep in enumerate(reference.timesteps):
        expected_mean, expected_sigma = ddim_in_float64(reference, output[k], latents[k], timestep)
        # variance = a product with 1 - abar / abar_prev, which is 8.6e-4 at the last step: float32's 6e-8 becomes
        # 7e-5 of the variance there and half of that of sigma
        torch.testing.assert_close(sigma[k].double().expand(SHAPE), expected_sigma, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mean[k].double(), expected_mean, rtol=0, atol=MEAN_TOLERANCE[prediction_type])


def test_positions_may_be_in_any_order(make_scheduler, generator):
    schedule = ddim_tables(make_scheduler(), 10)
    latents, output = draw(generator, 10, *SHAPE), draw(generator, 10, *SHAPE)
    mean, sigma, _ = schedule.step(output, latents, torch.arange(10))
    order = torch.randperm(10, generator=generator)
    shuffled = schedule.step(output[order], latents[order], order)
    assert torch.equal(shuffled[0], mean[order]) and torch.equal(shuffled[1], sigma[order])


def test_half_precision_outputs_are_computed_in_float32(make_scheduler, generator):
    schedule = ddim_tables(make_scheduler(), 10)
    latents, output = draw(generator, 10, *SHAPE), draw(generator, 10, *SHAPE).bfloat16()
    got, expected = (schedule.step(o, latents, torch.arange(10))[0] for o in (output, output.float()))
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_the_last_step_keeps_its_noise_where_the_final_alpha_is_one(make_scheduler):
    """The stated deviation from diffusers: its variance of the last step is zero there."""
    schedule, usual = (ddim_tables(make_scheduler(set_alpha_to_one=one), 20) for one in (True, False))
    assert torch.equal(schedule.sigma, usual.sigma) and schedule.sigma[-1] > 0


def test_sd1_figures(sd1_scheduler_config):
    """SD 1.x: at 50 steps sigma runs from 0.454 to 0.02065."""
    config = json.loads(sd1_scheduler_config.read_text())
    schedule = ddim_tables(DDIMScheduler.from_config(config), 50)
    assert schedule.times[[0, -1]].tolist() == [981, 1]
    assert schedule.sigma[0].item() == pytest.approx(0.454, abs=5e-4)  # half of the last digit given
    assert schedule.sigma[-1].item() == pytest.approx(0.02065, abs=5e-6)


def test_sigma_by_hand():
    # (1 - 0.8) / (1 - 0.5) * (1 - 0.5 / 0.8) = 0.4 * 0.375 = 0.15
    sigma = step_sigma(torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64))
    assert sigma.item() == pytest.approx(0.15**0.5, rel=1e-15)  # float64


@pytest.mark.parametrize("steps", [0, 1001])
def test_an_impossible_number_of_steps_is_refused(make_scheduler, steps):
    with pytest.raises(ValueError, match=f"got {steps} denoising steps; expected 1 to 1000"):
        ddim_tables(make_scheduler(), steps)


def test_a_schedule_without_noise_at_its_end_is_refused(make_policy):
    with pytest.raises(ValueError, match=r"step 4 of 4 has no noise.*sigma > 0.*steps_offset to 1.*it is 0"):
        make_policy(schedule={"steps_offset": 0})


# --- guidance and the clip range


def test_guidance(generator):
    unconditional, conditional = draw(generator, 2, *SHAPE), draw(generator, 2, *SHAPE)
    # float32: |values| < 5 and a scale of 5 give 25 * 6e-8 = 1.5e-6
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional, rtol=0, atol=1.5e-6)
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)
    expected = 5 * conditional - 4 * unconditional
    torch.testing.assert_close(guide(unconditional, conditional, 5.0), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("size", "factor"), [(4 * 64 * 64, 1.0), (4 * 8 * 8, 64.0), (4 * 128 * 128, 0.25)])
def test_clip_range_scales_with_the_latent(size, factor):
    assert scaled_clip_range(1e-4, size) == pytest.approx(1e-4 * factor, rel=1e-15)  # one float64 product
    # the same nats on the whole step: +-1.64
    assert scaled_clip_range(1e-4, size) * size == pytest.approx(1.6384, rel=1e-15)


# --- sensitivity


@pytest.mark.parametrize("prediction_type", [*MEAN_TOLERANCE, "flow_prediction"])
def test_sensitivity_is_the_derivative_of_the_mean_by_the_output_over_sigma(make_scheduler, generator, prediction_type):
    if prediction_type == "flow_prediction":
        schedule = make_process("flow-ddim", FlowSchedule(shift=3.0), 10, torch.device("cpu"))
    else:
        schedule = ddim_tables(make_scheduler(prediction_type=prediction_type), 10)
    latents, output = draw(generator, 10, *SHAPE), draw(generator, 10, *SHAPE).requires_grad_()
    mean, sigma, _ = schedule.step(output, latents, torch.arange(10))
    (gradient,) = torch.autograd.grad(mean.sum(), output)  # each element of a mean depends on its own output alone
    expected = gradient[:, 0, 0, 0].abs() / sigma.flatten()
    # float32; from a predicted sample, the noise of 0.041 at the last step divides 6e-8
    torch.testing.assert_close(schedule.sensitivity, expected, rtol=1e-4, atol=0)
    assert schedule.sensitivity.isinf().tolist() == (~schedule.stochastic).tolist()
