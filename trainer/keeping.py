"""What a training keeps on disk as it goes: metrics, sample grids, LoRAs, checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from comfy_tdpo import __version__
from comfy_tdpo.lora import save_lora
from comfy_tdpo.rollout import draw_images

from .config import TrainConfig
from .plots import save_image_grid
from .run import EpochMetrics, RunFolder, write_atomically
from .state import TrainState, Watch


@dataclass(frozen=True)
class Keeper:
    """Writes to the run's folder; only the main process of a training asks it to.

    Args:
        config, state, accelerator, watch: of the training; run: its folder; reward: the name of what it trains on.
        grid_prompts: what the sample grids show, spread over them.
    """

    config: TrainConfig
    state: TrainState
    run: RunFolder
    accelerator: Accelerator
    reward: str
    grid_prompts: list[str]
    watch: Watch

    def keep_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is done: the checkpoint goes last, so that what it stands for is there."""
        epoch, config = self.state.epoch, self.config.output
        last = epoch == self.config.epochs
        self.run.append_metrics(metrics)
        self.accelerator.log(metrics, step=epoch)
        if last or epoch % config.samples_every == 0:
            self.keep_grid()
            self._keep_lora(self.run.lora(epoch))
        if last or epoch % config.checkpoint_every == 0:
            self.keep_state()

    def keep_state(self) -> None:
        self._keep_lora(self.run.latest_lora)
        self.state.save(self.run.checkpoints, self.config.output.keep_checkpoints)

    def keep_grid(self) -> None:
        """Images of fixed prompts from fixed noise."""
        prompts, count = self.grid_prompts, self.config.output.grid_images
        picked = [prompts[i * len(prompts) // count] for i in range(count)]
        seeds = [(self.config.seed, "grid", i) for i in range(count)]
        self.watch("drawing samples", 0, count)
        images = draw_images(self.state.policy, picked, seeds, self.state.micro_batch)
        save_image_grid(images, self.run.sample_grid(self.state.epoch))

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


def _model_name(model: str) -> str:
    """A model's name without the folders it lies in, which are nobody's business."""
    return Path(model).name if Path(model).exists() else model
