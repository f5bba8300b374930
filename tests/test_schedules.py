"""The schedules of published folders: read as diffusers reads them, and every step can be trained."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from comfy_tdpo.models.scheduler import load_scheduler
from comfy_tdpo.process.ddim import ddim_tables
from comfy_tdpo.process.gaussian import log_prob

# As published with Stable Diffusion 1.x; what a folder says beside the sampler's name.
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

SAMPLERS = [
    *("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep"),
    *("DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver", "HeunDiscrete", "KDPM2Discrete"),
    *("KDPM2AncestralDiscrete", "LCM", "TCD"),
]
MULTISTEP = ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver"]


def load(folder: Path, config: dict, prediction_type: str | None = None) -> DDIMScheduler:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(config))
    return load_scheduler(path, prediction_type)


def saved(folder: Path, sampler: str, **settings) -> dict:
    """The configuration that diffusers saves for `sampler`."""
    getattr(diffusers, f"{sampler}Scheduler")(**settings).save_pretrained(folder)
    return json.loads((folder / "scheduler_config.json").read_text())


# --- what is read


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_levels_are_those_of_the_samplers_own_class(tmp_path, sampler):
    cls = getattr(diffusers, f"{sampler}Scheduler")
    betas = torch.linspace(0.001, 0.02, 1000).tolist()
    for settings in (SD1, {}, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": betas}, {"beta_end": 0.015}):
        for config in (saved(tmp_path, sampler, **settings), {"_class_name": cls.__name__} | settings):
            assert torch.equal(load(tmp_path, config).alphas_cumprod, cls(**settings).alphas_cumprod)


@pytest.mark.parametrize("sampler", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "LCM"])
def test_zero_terminal_snr_is_read(tmp_path, sampler):
    config = saved(tmp_path, sampler, **SD1, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    levels = load(tmp_path, config).alphas_cumprod
    expected = getattr(diffusers, f"{sampler}Scheduler")(**SD1, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(levels, expected, rtol=0, atol=2**-24)  # diffusers' Euler has 2**-24 for the last 0
    assert levels[-1] == 0


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_a_samplers_own_sigmas_change_nothing(tmp_path, flag):
    plain, changed = (load(tmp_path, saved(tmp_path, "EulerDiscrete", **SD1) | {flag: on}) for on in (False, True))
    assert torch.equal(ddim_tables(plain, 10).sigma, ddim_tables(changed, 10).sigma)


@pytest.mark.parametrize(
    ("config", "spacing"),
    [
        ({}, "leading"),
        ({"_class_name": "PNDMScheduler"}, "leading"),
        ({"_class_name": "FlaxPNDMScheduler"}, "leading"),
        ({"_class_name": "EulerDiscreteScheduler"}, "linspace"),
        ({"_class_name": "EulerDiscreteScheduler", "steps_offset": 1}, "leading"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": None}, "linspace"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 1}, "trailing"),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, "linspace"),
        ({"_class_name": "LCMScheduler", "timestep_spacing": "leading"}, "trailing"),
    ],
)
def test_how_timesteps_are_spaced_where_a_folder_does_not_say(tmp_path, config, spacing):
    assert load(tmp_path, SD1 | config).config.timestep_spacing == spacing


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch.*other models .flow.*save its folder with"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler.*other models"),
        ({"_class_name": None}, "the scheduler None"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "continuous noise levels"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "continuous noise levels"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'; expected one of epsilon"),
        ({"prediction_type": None}, "prediction_type None; expected one of epsilon"),
        ({"timestep_spacing": "even"}, "timestep_spacing 'even'; expected one of leading"),
        ({"steps_offset": -1}, "steps_offset -1; expected 0 or 1"),
        ({"steps_offset": "1"}, "steps_offset '1'; expected 0 or 1"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas and num_train_timesteps 1000"),
        ({"beta_end": 1.5}, "betas that make no noise schedule.*1.5"),
        ({"beta_start": -0.1, "beta_end": 0.1, "beta_schedule": "linear"}, "betas that make no noise schedule"),
        ({"beta_start": float("nan")}, "betas that make no noise schedule"),
        ({"beta_start": -0.1, "beta_end": 0.1, "beta_schedule": "scaled_linear"}, "betas that make no noise schedule"),
        ({"beta_start": 0.012, "beta_end": 0.00085}, "beta_start 0.012 above beta_end 0.00085; .*swap them"),
        ({"beta_start": "0.00085"}, "beta_start '0.00085'; expected a number"),
        ({"beta_end": None}, "beta_end None; expected a number"),
        ({"trained_betas": "none"}, "trained_betas 'none'; expected null, or a list"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps 1000.0; expected a whole number from 2 to 100000"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps 'many'; expected a whole number"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0; expected a whole number"),
        ({"num_train_timesteps": True}, "num_train_timesteps True; expected a whole number"),
        ({"num_train_timesteps": 200_000}, "num_train_timesteps 200000; expected a whole number"),
    ],
)
def test_what_is_no_schedule_of_stable_diffusion_is_named(tmp_path, config, message):
    with pytest.raises(ValueError, match=f"scheduler_config.json has .*{message}"):
        load(tmp_path, SD1 | config)


def test_the_argument_stands_in_for_an_odd_prediction_type(tmp_path):
    scheduler = load(tmp_path, SD1 | {"prediction_type": "flow_prediction"}, "v_prediction")
    assert scheduler.config.prediction_type == "v_prediction"


# --- the steps


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 50, 61])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_are_diffusers_ddims(make_scheduler, spacing, steps_offset, steps):
    settings = {"timestep_spacing": spacing, "steps_offset": steps_offset}
    expected = make_scheduler(**settings)
    expected.set_timesteps(steps)
    got = ddim_tables(make_scheduler(**settings), steps).times
    assert torch.equal(got, expected.timesteps[:steps])
    assert steps == len(got) and (expected.timesteps[steps:] < 0).all()  # diffusers sets 62 for 61, the last is -1


@pytest.mark.parametrize("sampler", MULTISTEP)
@pytest.mark.parametrize("steps", [1, 4, 7, 20, 50])
def test_timesteps_spaced_as_linspace_are_the_multistep_solvers(tmp_path, sampler, steps):
    config = saved(tmp_path, sampler, **SD1, timestep_spacing="linspace")
    expected = getattr(diffusers, f"{sampler}Scheduler").from_config(config)
    expected.set_timesteps(steps)
    assert torch.equal(ddim_tables(load(tmp_path, config), steps).times, expected.timesteps)


@pytest.mark.parametrize("sampler", ["EulerDiscrete", "LMSDiscrete", "UniPCMultistep", "DDPM"])
def test_trailing_timesteps_are_the_samplers_own(tmp_path, sampler):
    config = saved(tmp_path, sampler, **SD1, timestep_spacing="trailing")
    expected = getattr(diffusers, f"{sampler}Scheduler").from_config(config)
    expected.set_timesteps(4)
    assert ddim_tables(load(tmp_path, config), 4).times.tolist() == expected.timesteps.tolist()
    assert expected.timesteps.tolist() == [999, 749, 499, 249]  # SD-Turbo's


@pytest.mark.parametrize("steps", [4, 7, 30])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_step_leads_to_the_next_ones_noise_level_and_the_last_to_timestep_0(make_scheduler, spacing, steps):
    scheduler = make_scheduler(timestep_spacing=spacing)
    schedule = ddim_tables(scheduler, steps)
    assert torch.equal(schedule.signal, scheduler.alphas_cumprod[schedule.times].sqrt())
    assert torch.equal(schedule.next_signal[:-1], schedule.signal[1:])
    assert schedule.next_signal[-1] == scheduler.alphas_cumprod[0].sqrt()
    assert (schedule.sigma > 0).all()


@pytest.mark.parametrize("steps", [7, 9, 30, 50, 300])
def test_leading_tables_are_as_they_were(make_scheduler, steps):
    """To the bit: they were made with the fixed distance of 1000 // steps."""
    scheduler = make_scheduler()
    schedule = ddim_tables(scheduler, steps)
    previous = (schedule.times - 1000 // steps).clamp(min=0)
    assert torch.equal(schedule.next_signal, scheduler.alphas_cumprod[previous].sqrt())


# --- training on them


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_folder_as_diffusers_saves_it_trains_or_names_a_remedy_that_works(tmp_path, make_policy, sampler):
    config = saved(tmp_path, sampler, **SD1)
    settings = {"schedule": dict(load(tmp_path, config).config)}
    if sampler in ("DDIM", "DDPM", "PNDM"):  # spaced as leading, without an offset
        with pytest.raises(ValueError, match="set steps_offset to 1 in the model's scheduler_config.json .it is 0"):
            make_policy(**settings)
        settings = {"schedule": dict(load(tmp_path, config | {"steps_offset": 1}).config)}
    assert trains(make_policy(**settings))


def trains(policy) -> bool:
    """Sampling is finite, the ratio of a fresh sample is 1, and so is the gradient of its log-probability finite."""
    embeds, positions = policy.encode_prompts(["a red circle"]), torch.arange(len(policy.process))
    generator, latents, log_probs = torch.Generator().manual_seed(0), [], []
    x = torch.randn(1, *policy.latent_shape, generator=generator)
    for k in positions:
        with torch.no_grad():
            mean, sigma, _ = policy.step(x, k[None], embeds)
        latents.append(x)
        x = mean + sigma * torch.randn(mean.shape, generator=generator)
        log_probs.append(log_prob(x, mean, sigma))
    mean, sigma, _ = policy.step(torch.cat(latents), positions, embeds.expand(len(positions)))
    again = log_prob(torch.cat([*latents[1:], x]), mean, sigma)
    again.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters]
    # a batch of T sums in another order than one of 1: float32's 1e-6 of the mean, over the least sigma of 0.02
    torch.testing.assert_close((again - torch.cat(log_probs)).exp(), torch.ones(len(again)), rtol=0, atol=1e-4)
    return bool(x.isfinite().all()) and all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("spacing", "steps", "step"), [("trailing", 1000, 1000), ("trailing", 667, 667), ("linspace", 1000, r"\d+")]
)
def test_too_many_steps_are_refused_with_a_remedy_that_works(make_policy, spacing, steps, step):
    schedule = {"timestep_spacing": spacing}
    with pytest.raises(ValueError, match=f"step {step} of {steps} has no noise.*: choose at most 500 steps$"):
        make_policy(schedule=schedule, steps=steps)
    assert len(make_policy(schedule=schedule, steps=500).process) == 500


def test_noise_prediction_without_any_signal_is_refused_with_remedies_that_work(make_policy):
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="gives no image; expected prediction_type v_prediction.*leading in the model"):
        make_policy(schedule=schedule)
    for change in (
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "leading"},
        {"rescale_betas_zero_snr": False},
    ):
        assert trains(make_policy(schedule=schedule | change))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_zero_terminal_snr_trains(make_policy, prediction_type, spacing):
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": spacing, "prediction_type": prediction_type}
    policy = make_policy(schedule=schedule)
    assert policy.process.signal[0] == 0
    assert trains(policy)
