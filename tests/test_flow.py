"""Processes of flow matching: each step against an independent truth in float64, and diffusers' own scheduler."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.distributions import Normal

from comfy_tdpo.process import make_process
from comfy_tdpo.process.flow import make_cps, make_flow_ddim, make_flow_sde
from comfy_tdpo.process.flow_schedule import DynamicShift, FlowSchedule
from comfy_tdpo.process.gaussian import TableProcess, log_prob

SHAPE = (16, 4, 4)
CPU = torch.device("cpu")
SD3, SCHNELL, DEV = FlowSchedule(shift=3.0), FlowSchedule(), FlowSchedule(shift=DynamicShift())
SIZE = (128, 64)  # of latents, for schedules that depend on it: 1024 x 512 px
PROCESSES = ("flow-ddim", "flow-sde", "cps")
# float32: latents of 5 sigma, of which 6e-8 in each of a few sums and products
FLOAT32 = {"rtol": 0, "atol": 3e-6}


def made(name: str, schedule: FlowSchedule = SD3, steps: int = 10) -> TableProcess:
    return make_process(name, schedule, steps, CPU, SIZE)


def drawn(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(steps, *SHAPE, generator=generator) for _ in range(2))


def theirs(schedule: FlowSchedule, steps: int) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' own scheduler, with the levels of FLUX.1's pipeline."""
    if schedule is DEV:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        mu = calculate_shift(SIZE[0] * SIZE[1] // 4)
    else:
        scheduler, mu = FlowMatchEulerDiscreteScheduler(shift=schedule.shift), None
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler


# --- the levels


@pytest.mark.parametrize("schedule", [SD3, SCHNELL, DEV], ids=["sd3", "schnell", "dev"])
@pytest.mark.parametrize("steps", [4, 10, 28])
def test_levels_are_diffusers(schedule, steps):
    process, scheduler = made("flow-ddim", schedule, steps), theirs(schedule, steps)
    # they compute in float32: 6e-8 of 1000
    torch.testing.assert_close(process.times, scheduler.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(process.noise, scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    assert process.times[0] == 1000 and process.signal[0] == 0


def test_a_dynamic_shift_by_hand():
    """FLUX.1 dev: mu is 1.15 at 1024 px and 0.63 at 512 px."""
    for side, mu in ((1024, 1.15), (512, 0.63)):
        assert math.log(DEV.at(side // 8, side // 8).shift) == pytest.approx(mu, abs=5e-3)
    assert DynamicShift(256, 0.5, 4096, 1.15, exponential=False).at(4096) == pytest.approx(1.15)
    assert SD3.at(*SIZE) is SD3


def test_the_numbers_of_a_schedule_distinguish_it():
    schedules = [SD3, SCHNELL, DEV, FlowSchedule(3.0, 999), FlowSchedule(DynamicShift(most=1.16))]
    assert len({tuple(schedule.numbers) for schedule in schedules}) == len(schedules)


# --- the steps


def posterior(x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
    """p(x_s | x_t, x_0) of the Markov chain with x_t = (1 - t) x_0 + t eps, by Bayes' rule."""
    clean = x - t * v
    if s == 0:
        return clean, 0.0
    scale = (1 - t) / (1 - s)  # x_t = scale x_s + noise
    noise = t**2 - (scale * s) ** 2
    precision = 1 / s**2 + scale**2 / noise
    return ((1 - s) * clean / s**2 + scale * x / noise) / precision, precision**-0.5


def flow_grpo(x: Tensor, v: Tensor, t: float, s: float, second: float) -> tuple[Tensor, float]:
    """The authors' step: x + drift dt + std sqrt(-dt) noise."""
    dt = s - t
    std = 0.7 * math.sqrt(t / (1 - (second if t == 1 else t)))
    mean = x * (1 + std**2 / (2 * t) * dt) + v * (1 + std**2 * (1 - t) / (2 * t)) * dt
    return mean, std * math.sqrt(-dt)


def cps(x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
    std = s * math.sin(0.7 * math.pi / 2)
    return (1 - s) * (x - t * v) + math.sqrt(s**2 - std**2) * (x + (1 - t) * v), std


def in_float64(name: str, process: TableProcess, output: Tensor, latents: Tensor, k: int) -> tuple[Tensor, float]:
    """Mean and std of step k at the levels of the shift, 3 u / (1 + 2 u)."""
    t, s, second = (
        3 * u / (1 + 2 * u) for u in (1 - k / len(process), 1 - (k + 1) / len(process), 1 - 1 / len(process))
    )
    x, v = latents[k].double(), output[k].double()
    if s == 0:
        return x - t * v, 0.0
    if name == "flow-sde":
        return flow_grpo(x, v, t, s, second)
    return posterior(x, v, t, s) if name == "flow-ddim" else cps(x, v, t, s)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [1, 4, 10, 28])
def test_mean_and_std_are_those_of_an_independent_transcription(name, steps):
    process = made(name, steps=steps)
    latents, output = drawn(steps)
    mean, std, clean = process.step(output, latents, torch.arange(steps))
    assert mean.dtype == std.dtype == torch.float32 and process.stochastic.tolist() == [True] * (steps - 1) + [False]
    for k in range(steps):
        expected, deviation = in_float64(name, process, output, latents, k)
        torch.testing.assert_close(mean[k].double(), expected, **FLOAT32)
        assert std[k].item() == pytest.approx(deviation, rel=1e-6)  # float32
    torch.testing.assert_close(mean[-1], clean[-1], rtol=0, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_log_density_is_that_of_a_normal_distribution(name):
    process = made(name)
    latents, output = drawn(10)
    mean, std, _ = process.step(output, latents, torch.arange(10))
    sample = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    got = log_prob(sample, mean, std)
    for k in range(9):
        expected, deviation = in_float64(name, process, output, latents, k)
        density = Normal(expected, deviation).log_prob(sample[k].double()).mean()
        # (x - mean) / std carries 1e-6 / 0.1 an element, of random sign, where std is smallest
        assert got[k].item() == pytest.approx(density.item(), abs=1e-5)


@pytest.mark.parametrize("make", [make_flow_ddim, make_flow_sde, make_cps])
@pytest.mark.parametrize("schedule", [SD3, SCHNELL, DEV], ids=["sd3", "schnell", "dev"])
def test_without_noise_sampling_is_that_of_diffusers(make, schedule):
    process, scheduler = make(schedule.at(*SIZE), 10, CPU, 0.0), theirs(schedule, 10)
    (ours, _), weight = drawn(1), torch.randn(16, 16, generator=torch.Generator().manual_seed(2)) / 4

    def predicted(x: Tensor, time: Tensor) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", weight, x).tanh() + time / 1000

    expected = ours = process.initial(ours)
    assert not process.stochastic.any()
    for k, time in enumerate(scheduler.timesteps):
        expected = scheduler.step(predicted(expected, time), time, expected).prev_sample
        ours, sigma, _ = process.step(predicted(ours, process.times[k]), ours, torch.tensor([k]))
        assert sigma == 0
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # ten steps of 1e-6


@pytest.mark.parametrize("name", PROCESSES)
def test_noised_is_the_forward_process(name):
    process, (clean, noise) = made(name), drawn(3)
    got = process.noised(clean, noise, torch.tensor([0, 4, 9]))
    for row, u in enumerate((1.0, 0.6, 0.1)):
        t = 3 * u / (1 + 2 * u)
        torch.testing.assert_close(got[row], (1 - t) * clean[row] + t * noise[row], **FLOAT32)


# --- what does not fit together


@pytest.mark.parametrize("name", ["ddim", "few-steps", "lcm"])
def test_a_process_of_discrete_levels_is_refused(name):
    with pytest.raises(ValueError, match="a model of flow matching; expected flow-ddim, flow-sde or cps: choose"):
        made(name)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_model_of_discrete_levels_is_refused(name, make_scheduler):
    with pytest.raises(ValueError, match="a model with discrete noise levels; expected ddim, few-steps or lcm: choose"):
        make_process(name, make_scheduler(), 10, CPU)
