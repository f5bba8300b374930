"""What a critic reads of trajectories: embeddings of the decoded latents, of all steps or of some.

Shapes: B samples, T denoising steps, of which the critic reads the first K and R of these are decoded, C H W latent, D
embedding width, S scores of each step.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import LatentDecoder
from .rewards import RewardModel, score_images
from .rollout import Decoder, Path


@dataclass(frozen=True)
class Reading:
    """How a critic reads the steps.

    Args:
        embed: its encoder, images (B, 3, H, W) -> unit embeddings (B, D).
        decode: the decoder of what it reads, or None for the model's own.
        image_size: pixels at which latents are decoded for it, or None for full size.
        clean: whether it reads, at each step, the predicted clean latent instead of the noisy x_k.
        steps: K; None for all.
        every: of how many steps one is decoded; the first and the last of K always are.
        held: whether the steps between have the embedding of the last one decoded before them, instead of one
            interpolated between that and the next. The next depends on the noise of the steps in between.
        rewards: those that score what it reads; only where every step is decoded.
    """

    embed: Callable[[Tensor], Tensor]
    decode: LatentDecoder | None = None
    image_size: int | None = None
    clean: bool = False
    steps: int | None = None
    every: int = 1
    held: bool = False
    rewards: Sequence[RewardModel] = ()

    def positions(self, steps: int) -> list[int]:
        """Which of T steps are decoded, ascending (R,)."""
        return positions(min(self.steps or steps, steps), self.every)

    def read(
        self, decoder: Decoder, path: Path, prompts: list[str], check: Callable[[], None]
    ) -> tuple[Tensor, Tensor | None]:
        """Unit embeddings (B, K, D) and scores (B, K, S) of a path's steps; None if there are no rewards."""
        latents = path.clean if self.clean else path.latents[:, :-1]
        read, count = self.positions(latents.shape[1]), len(self.rewards)
        of_each = [prompt for prompt in prompts for _ in read]

        def see(images: Tensor, rows: slice) -> Tensor:
            scores = [score_images(reward, images, of_each[rows]) for reward in self.rewards]
            return torch.cat([self.embed(images).float(), *(column[:, None] for column in scores)], dim=1)

        chosen = torch.stack([latents[:, k] for k in read], dim=1)
        found = decoder(chosen.flatten(0, 1), self.image_size, see, check, self.decode)
        found = found.unflatten(0, (len(latents), len(read)))
        if count:
            return found[..., :-count].contiguous(), found[..., -count:].contiguous()
        return self._filled(found, read), None

    def _filled(self, embeds: Tensor, read: list[int]) -> Tensor:
        """The embeddings of all K steps, (B, K, D), from those of the steps `read`, (B, R, D)."""
        if len(read) == read[-1] + 1:
            return embeds
        shares = shares_of(read, self.held).to(embeds.device)
        return F.normalize(shares @ embeds, dim=-1)


def positions(steps: int, every: int) -> list[int]:
    """Which of the K steps that are read are decoded: one of `every`, and the first and the last."""
    return sorted({*range(0, steps, every), steps - 1})


def shares_of(read: list[int], held: bool) -> Tensor:
    """What each of the K steps up to the last one read has of each of those read, (K, R)."""
    shares = torch.zeros(read[-1] + 1, len(read))
    for k in range(len(shares)):
        after = bisect_left(read, k)
        shares[k, after] = 1
        if k < read[after]:
            before = after - 1
            share = 0.0 if held else (k - read[before]) / (read[after] - read[before])
            shares[k, before], shares[k, after] = 1 - share, share
    return shares
