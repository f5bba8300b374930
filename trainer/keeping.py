"""What a training keeps on disk as it goes: metrics, sample grids, LoRAs, checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from comfy_tdpo import __version__
from comfy_tdpo.lora import save_lora
from comfy_tdpo.rollout import Decoder, draw_images

from .config import TrainConfig, leaf_fields
from .plots import save_image_grid
from .run import EpochMetrics, RunFolder, write_atomically
from .state import TrainState, Watch


class TrainingError(RuntimeError):
    """A training cannot go on; what it saved before is whole."""


@dataclass(frozen=True)
class Keeper:
    """Writes to the run's folder and to trackers; only the main process of a training asks it to keep anything.

    Args:
        config, decoder, state, accelerator, watch: of the training; run: its folder.
        reward: the name of what it trains on; grid_prompts: what the sample grids show, spread over them.
    """

    config: TrainConfig
    decoder: Decoder
    state: TrainState
    run: RunFolder
    accelerator: Accelerator
    reward: str
    grid_prompts: list[str]
    watch: Watch

    def open_trackers(self) -> None:
        if self.config.output.trackers:
            settings = {name: _setting(self.config, name) for name, _ in leaf_fields()}
            self.accelerator.init_trackers("comfy_tdpo", config=settings)

    def close_trackers(self) -> None:
        if self.config.output.trackers:
            self.accelerator.end_training()

    def keep_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is done: the checkpoint goes last, so that what it stands for is there."""
        self._check_finite()
        epoch, config = self.state.epoch, self.config.output
        last = epoch == self.config.epochs
        self.run.append_metrics(metrics)
        self.accelerator.log(metrics, step=epoch)
        if last or epoch % config.samples_every == 0:
            self.keep_grid()
            self._keep_lora(self.run.lora(epoch))
        if last or epoch % config.checkpoint_every == 0:
            self._keep_checked_state()

    def keep_state(self) -> None:
        self._check_finite()
        self._keep_checked_state()

    def _keep_checked_state(self) -> None:
        self._keep_lora(self.run.latest_lora)
        self.state.save(self.run.checkpoints, self.config.output.keep_checkpoints)

    def keep_grid(self, check: Callable[[], None] = lambda: None) -> None:
        """Images of fixed prompts from fixed noise; `check` may raise to leave it."""
        prompts, count = self.grid_prompts, self.config.output.grid_images
        picked = [prompts[i * len(prompts) // count] for i in range(count)]
        seeds = [(self.config.seed, "grid", i) for i in range(count)]
        self.watch("drawing samples", 0, count)
        images = draw_images(self.decoder, picked, seeds, self.state.micro_batch, check)
        save_image_grid(images, self.run.sample_grid(self.state.epoch))

    def _check_finite(self) -> None:
        """What has diverged is never kept: nothing could go on from it."""
        if not all(torch.isfinite(parameter).all() for parameter in self.state.policy.parameters):
            raise TrainingError(
                "the training has diverged, its LoRA is no longer finite: start a new run with a lower policy.lr; the "
                "last checkpoint and LoRA of this one are from before"
            )

    def _keep_lora(self, path: Path) -> None:
        policy = self.state.policy
        metadata = {
            "base_model": _model_name(self.config.model),
            "algorithm": self.config.algorithm,
            "reward": self.reward,
            "epoch": str(self.state.epoch),
            "comfy_tdpo": __version__,
        }
        write_atomically(path, lambda file: save_lora(policy.unet, file, policy.alpha, metadata))


def _setting(config: TrainConfig, name: str) -> int | float | str | bool:
    """A setting by its dotted name, as a plain value that every tracker takes."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value if isinstance(value, int | float | str | bool) else str(value)


def _model_name(model: str) -> str:
    """A model's name without the folders it lies in, which are nobody's business."""
    return Path(model).name if Path(model).exists() else model
