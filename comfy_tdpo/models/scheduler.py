"""The noise schedule that a model was trained on, read from the configuration of its folder's sampler.

Only the noise levels, the prediction type and the spacing of timesteps are read. The sampler's own refinements are
ignored: its order, Karras, exponential or beta sigmas, and thresholding. Latents are not limited to [-1, 1], so nothing
is clipped.
"""

import math
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from ..process.flow_schedule import DynamicShift, FlowSchedule
from .files import AGAIN, EXPECTED, naming, read_json, required
from .unsupported import EDM

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
MOST_TIMESTEPS = 100_000
SPACINGS = ("leading", "trailing", "linspace")

# Samplers of models trained on discrete noise levels -> diffusers' defaults for them that differ from DDIM's.
_LINSPACE = {"timestep_spacing": "linspace"}
_SECOND_ORDER = _LINSPACE | {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SAMPLERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM"), {}),
    **dict.fromkeys(("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "SASolver"), _LINSPACE),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"), _LINSPACE),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), _SECOND_ORDER),
    **dict.fromkeys(("LCM", "TCD"), _DISTILLED),
}

_READ = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "steps_offset", "set_alpha_to_one"),
)

# What a shift depends on that grows with the image, in the order of DynamicShift -> diffusers' defaults.
_DYNAMIC = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}


def load_scheduler(path: Path, prediction_type: str | None) -> DDIMScheduler:
    """DDIM on the noise schedule in the file `path`; `prediction_type` overrides that of the file.

    Raises ValueError if the file does not describe a schedule of Stable Diffusion.
    """
    config = read_json(path) | ({"prediction_type": prediction_type} if prediction_type else {})
    sampler = _sampler(config, path)
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"{path} has prediction_type {kind!r}; expected one of {', '.join(PREDICTION_TYPES)}")
    settings = _SAMPLERS[sampler] | {key: config[key] for key in _READ if key in config}
    _check_numbers(settings, path)
    settings |= {"timestep_spacing": _spacing(config, sampler), "clip_sample": False}
    with naming(path):
        scheduler = DDIMScheduler(**settings)
    _check(scheduler, path)
    return scheduler


def flow_schedule_in(folder: Path) -> FlowSchedule:
    """The noise levels of flow matching in a diffusers folder; raises ValueError like `load_flow_schedule`."""
    return load_flow_schedule(required(folder, "scheduler/scheduler_config.json"))


def load_flow_schedule(path: Path) -> FlowSchedule:
    """The noise levels of flow matching in the file `path`.

    Raises ValueError if the file does not describe any.
    """
    config = read_json(path)
    name = str(config.get("_class_name"))
    if not name.startswith("FlowMatch"):
        raise ValueError(
            f"{path} has the scheduler {name}; expected one of flow matching: save the folder with diffusers' "
            "FlowMatchEulerDiscreteScheduler"
        )
    count = config.get("num_train_timesteps", 1000)
    dynamic = bool(config.get("use_dynamic_shifting"))
    names = _DYNAMIC if dynamic else {"shift": 1.0}
    numbers = {key: config.get(key, default) for key, default in names.items()} | {"num_train_timesteps": count}
    for key, number in numbers.items():
        if type(number) not in (int, float) or not 0 < number < math.inf:
            raise ValueError(f"{path} has {key} {number!r:.60}; expected a number above 0; {AGAIN}")
    if not dynamic:
        return FlowSchedule(numbers["shift"], count)
    if numbers["base_image_seq_len"] >= numbers["max_image_seq_len"]:
        raise ValueError(f"{path} has a base_image_seq_len that is not below max_image_seq_len; {AGAIN}")
    exponential = config.get("time_shift_type", "exponential") == "exponential"
    least_tokens, least, most_tokens, most = (numbers[key] for key in _DYNAMIC)
    return FlowSchedule(DynamicShift(least_tokens, least, most_tokens, most, exponential), count)


def _sampler(config: dict, path: Path) -> str:
    """The class name of the folder's sampler in diffusers, without "Scheduler"."""
    given = str(config.get("_class_name", "DDIMScheduler"))
    name = given.removeprefix("Flax").removesuffix("Scheduler")
    continuous = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
    if name not in _SAMPLERS or continuous:
        raise ValueError(
            f"{path} has the scheduler {given}{' with continuous noise levels' if continuous else ''}, which is for "
            f"other models (flow matching; {EDM}); {EXPECTED}; if the model is one of these, save its folder with "
            "diffusers' DDIMScheduler"
        )
    return name


def _spacing(config: dict, sampler: str) -> str:
    """The spacing in the configuration, or diffusers' default for the sampler.

    Old folders do not name a spacing. Those with an offset mean "leading", the only spacing that uses one. LCM and TCD
    models were distilled on the timesteps of "trailing", whatever their folder says.
    """
    if sampler in ("LCM", "TCD"):
        return "trailing"
    silent = "leading" if config.get("steps_offset") else _SAMPLERS[sampler].get("timestep_spacing", "leading")
    return config.get("timestep_spacing") or silent


def _check_numbers(settings: dict[str, Any], path: Path) -> None:
    """Check before diffusers computes with the numbers: it would fail obscurely, or allocate any amount of memory."""
    count = settings.get("num_train_timesteps", 1000)
    if type(count) is not int or not 1 < count <= MOST_TIMESTEPS:
        raise ValueError(
            f"{path} has num_train_timesteps {count!r:.60}; expected a whole number from 2 to "
            f"{MOST_TIMESTEPS}, such as 1000"
        )
    start, end = ends = [settings.get(key, default) for key, default in (("beta_start", 0.0001), ("beta_end", 0.02))]
    for key, beta in zip(("beta_start", "beta_end"), ends, strict=True):
        if type(beta) not in (int, float):
            raise ValueError(f"{path} has {key} {beta!r:.60}; expected a number, such as 0.00085 or 0.012")
    trained = settings.get("trained_betas")
    if trained is not None and not (isinstance(trained, list) and all(type(beta) in (int, float) for beta in trained)):
        raise ValueError(f"{path} has trained_betas {trained!r:.60}; expected null, or a list of numbers")
    if start < 0 or end < 0:
        raise _no_schedule(path, start, end)
    if start > end and trained is None:
        raise ValueError(
            f"{path} has beta_start {start} above beta_end {end}; expected noise that grows with time: swap them"
        )


def _check(scheduler: DDIMScheduler, path: Path) -> None:
    config, betas = scheduler.config, scheduler.betas
    if config.timestep_spacing not in SPACINGS:
        raise ValueError(
            f"{path} has timestep_spacing {config.timestep_spacing!r}; expected one of {', '.join(SPACINGS)}"
        )
    if not isinstance(config.steps_offset, int) or config.steps_offset < 0:
        raise ValueError(f"{path} has steps_offset {config.steps_offset!r}; expected 0 or 1")
    if len(betas) != config.num_train_timesteps:
        raise ValueError(
            f"{path} has {len(betas)} trained_betas and num_train_timesteps {config.num_train_timesteps}; expected the "
            "same number; download or save the folder again"
        )
    if not ((betas > 0) & (betas <= 1)).all():  # the last beta is 1 with zero terminal SNR
        raise _no_schedule(path, config.beta_start, config.beta_end)


def _no_schedule(path: Path, start: float, end: float) -> ValueError:
    return ValueError(
        f"{path} has betas that make no noise schedule (beta_start {start}, beta_end {end}); expected betas between 0 "
        "and 1, such as 0.00085 and 0.012; download or save the folder again"
    )
