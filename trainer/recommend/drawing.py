"""Draws and scores the images of a recommendation, as far as that has not been done before."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from comfy_tdpo.memory import first_micro_batch, out_of_memory, smaller_micro_batch
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rewards import RewardModel, score_images
from comfy_tdpo.rollout import Decoder, draw_images

from ..config import TrainConfig
from ..run.files import write_atomically
from ..run.folder import spread
from ..run.loras import read_lora
from ..state import Watch
from .files import Cell, Draw, Table, image_file

SHOWN = 4  # images of a cell in the picture, of different prompts if there are as many
FRESH = 10**6  # the first noise number of a prompt that never chooses; no cell has as many images


def draws_of(prompts: list[str], images: int, first: int = 0) -> list[Draw]:
    """The images of a cell: spread evenly over `prompts`, each prompt with its own noise number from `first` on.

    Those of fewer images are among those of a multiple.
    """
    seen: Counter[str] = Counter()
    draws = []
    for prompt in spread(prompts, images):
        draws.append(Draw(prompt, first + seen[prompt]))
        seen[prompt] += 1
    return draws


def shown_of(draws: list[Draw]) -> list[Draw]:
    """Those in the picture: of prompts spread over all, each with its first noise."""
    first = [draw for draw in draws if draw.noise == 0]
    more = [draw for draw in draws if draw.noise > 0]
    return [first[i * len(first) // SHOWN] for i in range(SHOWN)] if len(first) >= SHOWN else (first + more)[:SHOWN]


@dataclass
class Artist:
    """Draws cells with a policy, whose LoRA is replaced.

    Args:
        rewards: that score the images; shown: those in the picture, which are kept in `folder`.
        check: called between model calls; may raise an exception to stop.
    """

    config: TrainConfig
    policy: DiffusionPolicy
    rewards: tuple[RewardModel, ...]
    shown: list[Draw]
    table: Table
    folder: Path
    check: Callable[[], None]
    watch: Watch

    def __post_init__(self) -> None:
        config, device = self.config, self.policy.device
        self._decoder = Decoder(self.policy, config.decode_batch)
        self._batch = first_micro_batch(config.micro_batch, config.samples_per_update, device)

    def draw(self, cells: Mapping[Cell, list[Draw]], phase: str) -> None:
        """Draw and score what is missing of these images of `cells`; every batch is saved at once."""
        missing = {cell: [draw for draw in draws if self._is_missing(cell, draw)] for cell, draws in cells.items()}
        total = sum(map(len, missing.values()))
        done = 0
        for cell, draws in missing.items():
            if not draws:
                continue
            with self._applied(cell):
                while draws:
                    self.watch(phase, done, total)
                    drawn = self._draw(cell, draws)
                    draws, done = draws[drawn:], done + drawn
        self.watch(phase, done, total)

    def _is_missing(self, cell: Cell, draw: Draw) -> bool:
        scores = self.table.scores(cell, draw)
        scored = all(reward.name in scores for reward in self.rewards)
        return not scored or (draw in self.shown and not image_file(self.folder, cell, draw).exists())

    def _applied(self, cell: Cell) -> AbstractContextManager[None]:
        """Apply a cell's LoRA at its strength; inside the block, the policy is what the cell says."""
        if cell.file is None:
            return self.policy.trainable.reference()  # `policy.reference` may be a tuned one
        self.policy.trainable.load_exported(read_lora(cell.file), cell.strength)
        return nullcontext()

    @torch.no_grad()
    def _draw(self, cell: Cell, draws: list[Draw]) -> int:
        """Draw the first of `draws`, as many as fit into memory, and return how many these are."""
        batch = draws[: self._batch]
        prompts = [draw.prompt for draw in batch]
        seeds = [(self.config.seed, "recommend", draw.prompt, draw.noise) for draw in batch]
        try:
            with self.policy.guided_for_evaluation():
                images = draw_images(self._decoder, prompts, seeds, len(batch), self.check)
            scores = {reward.name: score_images(reward, images, prompts).tolist() for reward in self.rewards}
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._batch = smaller_micro_batch(self._batch, self.config.samples_per_update)
            return 0
        for draw, image in zip(batch, images, strict=True):
            if draw in self.shown:
                write_atomically(image_file(self.folder, cell, draw), _as_picture(image).save)
        self.table.append(
            cell, {draw: {name: values[i] for name, values in scores.items()} for i, draw in enumerate(batch)}
        )
        return len(batch)


def _as_picture(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1]."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())
