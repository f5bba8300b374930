"""A training on what a graph's wires carry; called from ComfyUI's executor, before it trains on a thread of its own."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from comfy_tdpo.policy import DiffusionPolicy

from ..trainer.assemble import DTYPES, assemble, policy_settings
from ..trainer.config import TrainConfig
from ..trainer.job import ENDED, TrainingFactory
from ..trainer.run import RunFolder
from . import native, quitting
from .choosing import choose, is_done
from .configure import Wanted
from .place import all_runs, tell
from .starting import check_device_free, prepare, start, wait_for
from .words import AS_IT_IS


@dataclass(frozen=True)
class Wires:
    """MODEL, CLIP and VAE as they come in."""

    model: Any
    clip: Any
    vae: Any

    def wanted(self, **inputs: Any) -> Wanted:
        """What is asked for of this MODEL.

        Raises:
            ValueError: a wire carries nothing, or a MODEL that cannot be trained.
        """
        for name, part in (("CLIP", self.clip), ("VAE", self.vae)):
            if part is None:
                raise ValueError(
                    f"got no {name}, as the checkpoint has none; expected one: load it from a file of its own"
                )
        native.diffusers_config(self.model)
        return Wanted(model=native.model_name(self.model), shapes=native.is_shapes(self.model), **inputs)

    def factory(self, config: TrainConfig, prompts: list[str], device: torch.device) -> TrainingFactory:
        """What makes the Training, on copies of all that is in the wires."""
        make_policy = partial(
            _policy,
            native.diffusers_unet(self.model, DTYPES[config.precision]),
            native.scheduler_of(self.model),
            native.EncodedPrompts(self.clip, prompts, device),
            native.ComfyDecoder(self.vae, self.model, device),
        )
        return lambda run, stop, watch: assemble(run.config, run, stop, watch, make_policy, cpu=device.type == "cpu")


def _policy(unet, scheduler, encode, decode, config: TrainConfig, device: torch.device) -> DiffusionPolicy:
    settings = policy_settings(config, device)
    return DiffusionPolicy(unet, scheduler, encode, decode, source=config.model, **settings)


def train(wires: Wires, wanted: Wanted, name: str, resume: str, wait: bool, node: str) -> RunFolder:
    """The run that is meant, trained to its end where it `wait`s, and begun where it does not."""
    runs, device = all_runs(), comfy.model_management.get_torch_device()
    config, prompts = wanted.config(), wanted.prompts()
    run = choose(runs, name, resume, config, prompts)
    if resume == AS_IT_IS or is_done(run, config):
        return run
    job = runs.job(run)
    if job is None or job.status.state in ENDED:
        check_device_free(run, device)
        factory = wires.factory(config, prompts, device)
        prepare(runs, run, config, prompts)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        quitting.save_before()
        job = start(runs, run, factory, device, node, tell)
    if wait:
        bar = comfy.utils.ProgressBar(100 * config.epochs)
        wait_for(job, bar.update_absolute)
    return run
