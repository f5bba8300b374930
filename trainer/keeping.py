"""Saves the results of a training as it runs: metrics, sample grids, snapshots, checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from comfy_tdpo import __version__
from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.memory.running_out import within_memory
from comfy_tdpo.methods.context import Context
from comfy_tdpo.models import denoiser_name
from comfy_tdpo.rewards.taste import Taste
from comfy_tdpo.rollout import Decoder, draw_images

from .config import TrainConfig, leaf_fields
from .overoptimisation import Overoptimisation
from .plots.image_grid import save_image_grid
from .run import EpochMetrics, RunFolder, TrainingError
from .run.checkpoint import Tensors, remove_partial
from .run.tastes import keep_tastes
from .state import TrainState


@dataclass(frozen=True)
class Keeper:
    """Writes to the run's folder and to trackers, in the first process of a training.

    If each process has a part of the model, all take part in drawing and in what is written of it.

    Args:
        config, decoder, state, accelerator: the training's; run: its folder.
        reward: the name of the training reward; tastes: those among the rewards, by name.
        grid_prompts: the prompts of a sample grid's images.
    """

    config: TrainConfig
    decoder: Decoder
    state: TrainState
    run: RunFolder
    reward: str
    tastes: dict[str, Taste]
    grid_prompts: list[str]
    accelerator: Accelerator

    @property
    def context(self) -> Context:
        return self.state.context

    @property
    def writes(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def takes_part(self) -> bool:
        return self.writes or self.context.policy.trainable.sharded

    @property
    def watched(self) -> Overoptimisation:
        return self.state.overoptimisation

    def open_trackers(self) -> None:
        if self.config.output.trackers:
            settings = {name: _setting(self.config, name) for name, _ in leaf_fields(self.config.algorithm)}
            self.accelerator.init_trackers("comfy_tdpo", config=settings)

    def end(self) -> None:
        """Close trackers, and the connection between processes: one that exits with it open may abort."""
        if self.config.output.trackers or self.context.processes.count > 1:
            self.accelerator.end_training()

    def keep_epoch(self, metrics: EpochMetrics, last: bool) -> None:
        """Save a finished epoch, which may be the `last`; the checkpoint comes after everything that it vouches for."""
        self._check_finite()
        epoch, config = self.context.epoch, self.config.output
        self.state.metrics.append(metrics)
        if self.writes:
            self.run.append_metrics(metrics)
            self.accelerator.log(metrics, step=epoch)
        if last or epoch % config.samples_every == 0:
            self.keep_grid()
            self._keep_lora(self.run.lora(epoch))
        elif self.watched.may_need(epoch):
            self._keep_lora(self.run.lora(epoch))
        unneeded = self.watched.unneeded(epoch)
        if last or epoch % config.checkpoint_every == 0:
            self._keep_checked_state()
        for old in unneeded if self.writes else []:
            self.run.lora(old).unlink(missing_ok=True)

    def put_in_order(self, restored: bool) -> None:
        """Make the folder match the settings and the checkpoint that was `restored`, or the start of the run.

        Raises:
            ValueError: the run had a checkpoint, which is gone.
        """
        if self.writes:
            self._put_in_order(restored)
        if restored:
            self._keep_lora(self.run.latest_lora)

    def _put_in_order(self, restored: bool) -> None:
        lost = self.run.latest_lora.exists() or len(self.run.metrics()) > self.config.output.checkpoint_every
        if not restored and lost:
            raise ValueError(
                f"got a run whose checkpoints are gone; expected one in {str(self.run.checkpoints)!r}: restore that "
                "folder, or start a new run"
            )
        remove_partial(self.run.checkpoints)
        self.run.make_snapshots_folder(self.config)  # some tools do not copy an empty folder
        self.run.write_metrics(self.state.metrics)
        self.run.keep_changes(self.config)
        keep_tastes(self.run, self.tastes)

    def keep_state(self, unfinished: Tensors) -> None:
        """Save the state of a run that was stopped."""
        self._check_finite()
        self._keep_checked_state(unfinished)

    def _keep_checked_state(self, unfinished: Tensors | None = None) -> None:
        self.state.save(self.run.checkpoints, self.config.output.keep_checkpoints, unfinished or {})
        self._keep_lora(self.run.latest_lora)  # last: its presence proves that there was a checkpoint

    def keep_grid(self, check: Callable[[], None] = lambda: None) -> None:
        """Draw and save images of fixed prompts from fixed noise; `check` may raise to abort."""
        prompts = self.grid_prompts
        seeds = [(self.config.seed, "grid", i) for i in range(len(prompts))]
        context = self.context
        times = max(context.policy.size_of_evaluation, 1)
        rows, images_at_once = (max(int(most / times), 1) for most in (context.micro_batch, self.decoder.batch))
        decoder = Decoder(context.policy, images_at_once)

        def shrink() -> None:
            nonlocal rows
            rows = context.fewer(rows)

        def draw() -> Tensor:
            context.begin("drawing samples", 0, len(prompts), len(prompts))
            return draw_images(decoder, prompts, seeds, rows, check, context.tell)

        with torch.no_grad(), context.policy.evaluating():
            images = within_memory(draw, shrink)
        if self.writes:
            save_image_grid(images, self.run.sample_grid(self.context.epoch))

    def _check_finite(self) -> None:
        """Raise TrainingError if the policy or what the method learns has diverged: no run could resume from that."""
        groups, _ = self.state.method.state()
        learned = {"critic": [weight for group in groups.values() for weight in group.values()]}
        for what, weights in {"policy": self.context.policy.parameters, **learned}.items():
            finite = all(torch.isfinite(weight).all() for weight in weights)
            if not (self.context.processes.least(int(finite)) if self.context.policy.trainable.sharded else finite):
                raise TrainingError(
                    f"the training has diverged, its {_called(self.config, what)} is no longer finite: start a new run "
                    f"with a lower {what}.lr; the last checkpoint and {_called(self.config)} of this run are from "
                    "before it diverged"
                )

    def _keep_lora(self, path: Path) -> None:
        metadata = {
            "base_model": model_name(self.config.model),
            "algorithm": self.config.algorithm,
            "reward": self.reward,
            "epoch": str(self.context.epoch),
            "comfy_tdpo": __version__,
            "network": denoiser_name(self.context.policy.model),
        }
        policy = self.context.policy
        export = partial(policy.trainable.export, metadata=metadata)
        with policy.averaged():
            if self.writes:
                write_atomically(path, export)
            else:
                export(path)


def _called(config: TrainConfig, what: str = "policy") -> str:
    return what if what != "policy" else "model" if config.policy.trains_all else "LoRA"


def _setting(config: TrainConfig, name: str) -> int | float | str | bool:
    """A setting by its dotted name, as a plain value that every tracker takes."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value if isinstance(value, int | float | str | bool) else str(value)


def model_name(model: str) -> str:
    """A model's name without its folders, which are private."""
    return Path(model).name if Path(model).exists() else model
