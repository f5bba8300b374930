"""Draws and scores the images of a recommendation, as far as that has not been done before."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.interrupts import heeding
from comfy_tdpo.memory.budget import MemoryBudget, first_micro_batch
from comfy_tdpo.memory.gauges import gauge_of
from comfy_tdpo.memory.running_out import smaller_micro_batch, within_memory
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.randomness import Coordinates
from comfy_tdpo.rehearsal import Rehearsal
from comfy_tdpo.rewards import RewardModel, score_images
from comfy_tdpo.rollout import Decoder, draw_images

from ..config import TrainConfig
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


class Painter:
    """Draws images with a policy, whose LoRA is replaced, and scores them.

    Args:
        config: of the run that the policy belongs to; check: called between model calls; may raise to stop.
    """

    def __init__(self, config: TrainConfig, policy: DiffusionPolicy, check: Callable[[], None] = lambda: None):
        self.config, self.policy, self.check = config, policy, check
        self._decoder = Decoder(policy, config.decode_batch)
        self._batch = first_micro_batch(config.micro_batch, config.samples_per_update, policy.device)
        self._settled = False

    def applied(self, cell: Cell) -> AbstractContextManager[None]:
        """Apply a cell's LoRA at its strength; inside the block, the policy is what the cell says."""
        if cell.file is None:
            return self.policy.trainable.reference()  # `policy.reference` may be a tuned one
        self.policy.trainable.load_exported(read_lora(cell.file), cell.strength)
        return nullcontext()

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[Coordinates],
        rewards: Sequence[RewardModel],
        tell: Callable[[float], None] = lambda drawn: None,
    ) -> tuple[Tensor, dict[str, list[float]]]:
        """Draw the first of `prompts`, as many as fit into memory: the images (b, 3, H, W), and their scores by reward.

        `tell` is called between model calls with the number of images drawn, of which one may be drawn in part.
        """

        def draw() -> tuple[Tensor, dict[str, list[float]]]:
            batch = list(prompts[: self._batch])
            images = draw_images(
                self._decoder,
                batch,
                seeds[: self._batch],
                len(batch),
                self.check,
                lambda share: tell(share * len(batch)),
            )
            with heeding(self.check):
                scores = {reward.name: score_images(reward, images, batch).tolist() for reward in rewards}
            return images, scores

        self.policy.encode_ahead(prompts, self.check)
        with self.policy.drawing_for_evaluation():
            self._settle(max(prompts, key=len), rewards)
            return within_memory(draw, self._shrink)

    def _settle(self, prompt: str, rewards: Iterable[RewardModel]) -> None:
        """Before the first images, choose how many are drawn at once."""
        if self._settled:
            return
        gauge, most = gauge_of(self.policy.device), self.config.samples_per_update
        budget = MemoryBudget(gauge, most, self._batch, self._decoder.batch)
        choice, _ = budget.settle(Rehearsal(self.policy, prompt, rewards), training=False)
        self._batch, self._decoder.batch, self._settled = choice.micro_batch, choice.decode_batch, True

    def _shrink(self) -> None:
        self._batch = smaller_micro_batch(self._batch, self.config.samples_per_update)


@dataclass
class Artist:
    """Draws the cells of a recommendation.

    Args:
        rewards: that score the images; shown: those in the picture, which are kept in `folder`.
    """

    painter: Painter
    rewards: tuple[RewardModel, ...]
    shown: list[Draw]
    table: Table
    folder: Path
    watch: Watch

    def draw(self, cells: Mapping[Cell, list[Draw]], phase: str) -> None:
        """Draw and score what is missing of these images of `cells`; every batch is saved at once."""
        missing = {cell: [draw for draw in draws if self._is_missing(cell, draw)] for cell, draws in cells.items()}
        total = sum(map(len, missing.values()))
        done = 0
        for cell, draws in missing.items():
            if not draws:
                continue
            with self.painter.applied(cell):
                while draws:
                    self.watch(phase, done, total)
                    drawn = self._draw(cell, draws, phase, done, total)
                    draws, done = draws[drawn:], done + drawn
        self.watch(phase, done, total)

    def _is_missing(self, cell: Cell, draw: Draw) -> bool:
        scores = self.table.scores(cell, draw)
        scored = all(reward.name in scores for reward in self.rewards)
        return not scored or (draw in self.shown and not image_file(self.folder, cell, draw).exists())

    def _draw(self, cell: Cell, draws: list[Draw], phase: str, done: int, total: int) -> int:
        """Draw the first of `draws`, and return how many these are; `done` of the `total` images are drawn already."""
        seed = self.painter.config.seed
        seeds = [(seed, "recommend", draw.prompt, draw.noise) for draw in draws]
        images, scores = self.painter.draw(
            [draw.prompt for draw in draws],
            seeds,
            self.rewards,
            lambda drawn: self.watch(phase, done + drawn, total),
        )
        batch = draws[: len(images)]
        for draw, image in zip(batch, images, strict=True):
            if draw in self.shown:
                write_atomically(image_file(self.folder, cell, draw), as_picture(image).save)
        self.table.append(
            cell, {draw: {name: values[i] for name, values in scores.items()} for i, draw in enumerate(batch)}
        )
        return len(batch)


def as_picture(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1]."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())
