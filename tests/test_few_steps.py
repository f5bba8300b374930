"""Processes of distilled models: each step against diffusers' own sampler, and a last step that is not trained."""

import math

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from toy import new_run, toy_training

from comfy_tdpo.methods.sections import ClippedPolicySettings
from comfy_tdpo.methods.window import window
from comfy_tdpo.process import make_process
from comfy_tdpo.process.ddim import ddim_tables
from comfy_tdpo.rollout import denoise, draw_noise

SHAPE = (4, 8, 8)
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")


@pytest.fixture(params=["epsilon", "v_prediction"])
def kind(request) -> str:
    return request.param


def mean_and_std(monkeypatch, module, step) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a sampler's step, from its results for two known noises."""
    results = []
    for noise in (0.0, 1.0):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, n=noise, **_: torch.full(shape, n))
        results.append(step())
    return results[0], results[1] - results[0]


def drawn(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(steps, *SHAPE, generator=generator) for _ in range(2))


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_few_steps_are_the_ancestral_euler_method(make_scheduler, monkeypatch, kind, steps):
    process = make_process("few-steps", make_scheduler(prediction_type=kind), steps, CPU)
    theirs = EulerAncestralDiscreteScheduler(**SD1, timestep_spacing="trailing", prediction_type=kind)
    theirs.set_timesteps(steps)
    assert process.times.tolist() == theirs.timesteps.tolist()
    latents, output = drawn(steps)
    mean, std, _ = process.step(output, latents, torch.arange(steps))
    for k, time in enumerate(theirs.timesteps):
        now, then = (1 / (theirs.sigmas[i] ** 2 + 1) ** 0.5 for i in (k, k + 1))  # its latents are x / a

        def step(k=k, time=time, now=now):
            theirs._step_index, theirs.is_scale_input_called = k, True
            return theirs.step(output[k], time, latents[k] / now).prev_sample

        expected, deviation = (
            then * part for part in mean_and_std(monkeypatch, scheduling_euler_ancestral_discrete, step)
        )
        # float32: at the first step, latents of 5 sigma over a signal of 0.068 are 70, of which 6e-8 a few times
        torch.testing.assert_close(mean[k], expected, rtol=0, atol=5e-5)
        torch.testing.assert_close(std[k].expand(SHAPE), deviation, rtol=0, atol=5e-5)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_lcm_is_that_of_diffusers(make_scheduler, monkeypatch, kind, steps):
    process = make_process("lcm", make_scheduler(prediction_type=kind), steps, CPU)
    theirs = LCMScheduler(**SD1, prediction_type=kind, clip_sample=False)
    theirs.set_timesteps(timesteps=process.times.tolist(), original_inference_steps=1000)
    latents, output = drawn(steps)
    mean, std, _ = process.step(output, latents, torch.arange(steps))
    for k, time in enumerate(theirs.timesteps):

        def step(k=k, time=time):
            theirs._step_index = k
            return theirs.step(output[k], time, latents[k]).prev_sample

        expected, deviation = mean_and_std(monkeypatch, scheduling_lcm, step)
        # c_skip at timestep 124 is 1.6e-7; float32 as above
        torch.testing.assert_close(mean[k], expected, rtol=0, atol=5e-5)
        torch.testing.assert_close(std[k].expand(SHAPE), deviation, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["few-steps", "lcm"])
@pytest.mark.parametrize("steps", [4, 6, 8])
def test_no_trained_step_drowns_the_others(make_scheduler, name, steps):
    """|d mean / d output| / sigma: how far a step's mean moves with the network's output, in units of its noise."""
    process = make_process(name, make_scheduler(), steps, CPU)
    assert process.stochastic.tolist() == [True] * (steps - 1) + [False]
    assert (process.sensitivity[:-1] < 5).all()
    noisy = ddim_tables(make_scheduler(timestep_spacing="trailing"), steps)
    assert noisy.stochastic.all() and noisy.sensitivity[-1] > 8  # what the last step would have with noise


def test_the_last_step_ends_in_the_clean_latent(make_policy):
    policy = make_policy(process="few-steps", guidance=1.0)
    path = denoise(policy, ["a red circle"], draw_noise(policy, [(0, "test")]), kl="exact")
    assert torch.equal(path.latents[:, -1], path.clean[:, -1])
    assert path.log_probs[0, -1] == 0 and path.kl[0, -1] == 0 and (path.log_probs[0, :-1] != 0).all()


@pytest.mark.parametrize("name", ["few-steps", "lcm"])
@pytest.mark.parametrize("algorithm", ["tdpo-r", "ddpo-100", "tdpo-g", "sdpo", "draft"])
def test_they_train(make_policy, tmp_path, name, algorithm):
    small = {"epochs": 1, "samples_per_epoch": 4, "samples_per_update": 2, "steps": 4, "guidance": 1.0}
    small |= {} if algorithm in ("sdpo", "draft") else {"kl": {"coefficient": 0.1, "weighting": "noise"}}
    run = new_run(tmp_path / "run", algorithm=algorithm, process=name, **small)
    training = toy_training(run, lambda **settings: make_policy(process=name, **settings))
    before = [parameter.detach().clone() for parameter in training.policy.parameters]
    (metrics,) = training.epochs()
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics.get("policy/ratio_drift", 0) == 0
    moved = [not torch.equal(a, b) for a, b in zip(before, training.policy.parameters, strict=True)]
    assert any(moved) and all(parameter.isfinite().all() for parameter in training.policy.parameters)


def test_one_step_leaves_no_policy_to_train(make_scheduler):
    process = make_process("few-steps", make_scheduler(), 1, CPU)
    with pytest.raises(ValueError, match="got 1 denoising steps, of which none has noise; expected .*: raise steps"):
        window(ClippedPolicySettings(), process.stochastic)
