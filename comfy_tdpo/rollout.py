"""Sampling trajectories with the current policy, and recording what Eq. 6 needs of each step.

Nothing here enables or disables gradients. If they are enabled, `denoise` keeps the graph of the whole trajectory.

Shapes: B samples, T denoising steps, C H W latent, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .interrupts import Meanwhile
from .memory.running_out import smaller_decode_batch, within_memory
from .models import LatentDecoder
from .policy import DiffusionPolicy
from .process.gaussian import gaussian_kl, log_prob
from .randomness import Coordinates, generator_at
from .rewards import RewardModel, embed_images, score_images, score_with_parts, scored_elsewhere, terms_of
from .swapping import brought

if TYPE_CHECKING:
    from .reading import Reading

LARGEST = ("latents", "reference_means")  # of an epoch's tensors; they may be in main memory


@dataclass
class Trajectories:
    """B sampled trajectories; tensors are float32 on the policy's device, but the LARGEST may be in main memory.

    latents (B, T + 1, C, H, W): x_0 ... x_T in sampling order, so step k's sample is `latents[:, k + 1]`.
    log_probs (B, T): under the policy that sampled.
    kl (B, T): nats against the reference, see `denoise`.
    Of a method that needs no steps after its update, these three have none: (B, 0, ...).
    rewards (B,); eval_rewards, guard_rewards: name -> (B,).
    part_rewards: name -> (B,), those that `rewards` is a weighted sum of; empty for a single reward.
    image_embeds (B, K, D): what the critic reads at the first K steps, see `Reading`; None without a critic.
    step_scores (B, K, S): of what the critic reads at those, by each of `Reading.rewards`; None without any.
    dense_rewards (B, T): of each step, by `Sampler.dense`; None for methods without.
    final_embeds (B, D): of the images, by the training reward's encoder; None if it has none.
    reference_means (B, T, C, H, W): of the KL's reference at each step, where `KLPenalty.measure` keeps them.
    """

    prompts: list[str]
    latents: Tensor
    log_probs: Tensor
    kl: Tensor
    rewards: Tensor
    image_embeds: Tensor | None = None
    step_scores: Tensor | None = None
    dense_rewards: Tensor | None = None
    final_embeds: Tensor | None = None
    reference_means: Tensor | None = None
    eval_rewards: dict[str, Tensor] = field(default_factory=dict)
    guard_rewards: dict[str, Tensor] = field(default_factory=dict)
    part_rewards: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def in_main_memory(self) -> Trajectories:
        """The same with its largest tensors in main memory."""
        return replace(self, **{name: value.cpu() for name in LARGEST if (value := getattr(self, name)) is not None})

    @classmethod
    def concatenate(cls, parts: list[Trajectories]) -> Trajectories:
        """All samples of `parts`, in order; of the rewards that are only tracked, those that all parts have.

        A run that was stopped in the middle of an epoch may measure others when it resumes.
        """
        first = parts[0]
        tensors = {
            f.name: torch.cat([getattr(part, f.name) for part in parts])
            for f in fields(cls)
            if isinstance(getattr(first, f.name), Tensor)
        }
        prompts = [prompt for part in parts for prompt in part.prompts]
        by_name = {
            kind: _joined([getattr(part, kind) for part in parts])
            for kind in ("eval_rewards", "guard_rewards", "part_rewards")
        }
        return cls(prompts=prompts, **by_name, **tensors)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The scores of all parts, by name, of the rewards that they all have."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


@dataclass
class Calls:
    """Called before each of `total` model calls: asks `check`, which may raise, and tells which share is done."""

    total: int
    check: Callable[[], None]
    tell: Callable[[float], None]
    done: int = 0

    def __call__(self) -> None:
        self.check()
        if self.done:
            self.tell(min(self.done / self.total, 1.0))  # there are more calls where memory runs out
        self.done += 1


@dataclass
class Decoder:
    """Decodes latents `batch` at a time; halves `batch` when memory runs out."""

    policy: DiffusionPolicy
    batch: int

    def calls(self, rows: int) -> int:
        """How many batches `rows` latents are."""
        return -(-rows // self.batch)

    def __call__(
        self,
        latents: Tensor,
        image_size: int | None = None,
        read: Callable[[Tensor, slice], Tensor] = lambda images, rows: images,
        check: Callable[[], None] = lambda: None,
        decode: LatentDecoder | None = None,
    ) -> Tensor:
        """Decode latents (B, C, H, W) to images (B, 3, h, w) and return what `read` makes of them, batch by batch.

        `read` is given the images and which rows of `latents` they are. `check` is called before each batch. `decode`:
        a decoder to use in place of the model's own.
        """
        parts, begin = [], 0

        def decode_batch() -> Tensor:
            check()
            rows = slice(begin, begin + self.batch)
            return read(self.policy.decode(latents[rows], image_size, decode), rows)

        while begin < len(latents):
            parts.append(within_memory(decode_batch, self._shrink))
            begin += self.batch
        return torch.cat(parts)

    def _shrink(self) -> None:
        self.batch = smaller_decode_batch(self.batch)


@dataclass(frozen=True)
class Sampler:
    """Samples, decodes and scores, given prompts and seeds.

    Args:
        reading: what the critic reads of the steps, or None without a critic that sees images.
        dense: gives each step its reward, (B, T), from the clean latents predicted, (B, T, C, H, W), the prompts and
            the rewards of the images, (B,).
        kl: what Trajectories.kl holds, see `denoise`.
        check: called between model calls; may raise an exception to stop; tell: called with the share of them that is
            done, from 0 to 1.
    """

    decoder: Decoder
    reward: RewardModel
    eval_rewards: dict[str, RewardModel]
    reading: Reading | None = None
    dense: Callable[[Tensor, list[str], Tensor], Tensor] | None = None
    kl: str = "none"
    check: Callable[[], None] = lambda: None
    tell: Callable[[float], None] = lambda share: None
    guards: dict[str, RewardModel] = field(default_factory=dict)

    def sample(
        self, prompts: list[str], seeds: Sequence[Coordinates], starts: Sequence[Coordinates] | None = None
    ) -> Sampled:
        """One trajectory per prompt, each with noise drawn from its coordinates in `seeds`; the initial noise from
        those in `starts`, if they are given. The rewards that other programs compute have not been asked yet."""
        policy, decoder, reading = self.decoder.policy, self.decoder, self.reading
        noise = draw_noise(policy, seeds)
        if starts is not None:
            noise[:, 0] = draw_noise(policy, starts)[:, 0]
        steps = len(policy.process)
        reads = len(prompts) * len(reading.positions(steps)) if reading else 0
        calls = Calls(steps + decoder.calls(len(prompts)) + decoder.calls(reads), self.check, self.tell)
        path = denoise(policy, prompts, noise, self.kl, calls)
        images = decoder(path.latents[:, -1], check=calls)
        embeds, step_scores = reading.read(decoder, path, prompts, calls) if reading else (None, None)
        return Sampled(
            self,
            prompts,
            images,
            path,
            scores={id(term): score_images(term, images, prompts) for term in self.terms(elsewhere=False)},
            image_embeds=embeds,
            step_scores=step_scores,
            final_embeds=None if self.reward.embed_dim is None else embed_images(self.reward, images).float(),
        )

    def terms(self, elsewhere: bool) -> list[RewardModel]:
        """The rewards to score images by, without sums, in the order in which they are asked: those that other programs
        compute, or the others."""
        models = [self.reward, *self.eval_rewards.values(), *self.guards.values()]
        distinct = {id(term): term for model in models for term in terms_of(model)}
        return [term for term in distinct.values() if scored_elsewhere(term) == elsewhere]


@dataclass
class Sampled:
    """B trajectories of a Sampler; what other programs score of them may be missing still.

    images (B, 3, H, W); scores: of the rewards that are computed here, (B,) by id.
    image_embeds, step_scores, final_embeds: as in Trajectories.
    """

    sampler: Sampler
    prompts: list[str]
    images: Tensor
    path: Path
    scores: dict[int, Tensor]
    image_embeds: Tensor | None
    step_scores: Tensor | None
    final_embeds: Tensor | None
    _asked: Meanwhile[dict[int, Tensor]] | None = None
    _whole: Trajectories | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def is_scored(self) -> bool:
        """Whether nothing has to be waited for."""
        return not self.sampler.terms(elsewhere=True) or (self._asked is not None and self._asked.done)

    def ask(self) -> None:
        """Begin to ask the other programs, one after the other, on a thread of its own."""
        if not self.is_scored:
            self._asked = Meanwhile(self._answers)

    def give_up(self) -> None:
        if self._asked is not None:
            self._asked.give_up()

    @torch.no_grad()  # which a thread does not inherit
    def _answers(self) -> dict[int, Tensor]:
        return {id(term): score_images(term, self.images, self.prompts) for term in self.sampler.terms(elsewhere=True)}

    def trajectories(self) -> Trajectories:
        """The trajectories, all scored; waits for the other programs, and asks them if that has not been done.

        Raises:
            RewardError: one of them failed.
        """
        if self._whole is None:
            self._whole = self._joined(self.scores | (self._asked.result() if self._asked else self._answers()))
        return self._whole

    def _joined(self, scores: dict[int, Tensor]) -> Trajectories:
        sampler, prompts, images = self.sampler, self.prompts, self.images

        def known(model: RewardModel, images: Tensor, prompts: list[str]) -> Tensor:
            return scores[id(model)]

        def scored(models: dict[str, RewardModel]) -> dict[str, Tensor]:
            return {name: score_with_parts(model, images, prompts, known)[0] for name, model in models.items()}

        rewards, parts = score_with_parts(sampler.reward, images, prompts, known)
        return Trajectories(
            prompts=prompts,
            latents=self.path.latents,
            log_probs=self.path.log_probs,
            kl=self.path.kl,
            rewards=rewards,
            image_embeds=self.image_embeds,
            step_scores=self.step_scores,
            dense_rewards=sampler.dense(self.path.clean, prompts, rewards) if sampler.dense else None,
            final_embeds=self.final_embeds,
            eval_rewards=scored(sampler.eval_rewards),
            guard_rewards=scored(sampler.guards),
            part_rewards=parts,
        )


def draw_noise(policy: DiffusionPolicy, seeds: Sequence[Coordinates]) -> Tensor:
    """All noise of each trajectory, (B, T + 1, C, H, W): the initial noise, then one draw per step."""
    return brought(torch.stack([_noise_of(policy, seed) for seed in seeds]), policy.device)


def draw_noise_of(policy: DiffusionPolicy, seeds: Sequence[Coordinates], steps: Tensor) -> Tensor:
    """The noise of one step of each trajectory, (B, C, H, W), for the steps int64 (B,)."""
    draws = [_noise_of(policy, seed)[step + 1] for seed, step in zip(seeds, steps.tolist(), strict=True)]
    return brought(torch.stack(draws), policy.device)


def _noise_of(policy: DiffusionPolicy, seed: Coordinates) -> Tensor:
    return torch.randn((len(policy.process) + 1, *policy.latent_shape), generator=generator_at(*seed))


class Path(NamedTuple):
    """The steps of B trajectories: latents (B, T + 1, C, H, W); log_probs and kl (B, T); clean (B, T, C, H, W), the
    clean latent predicted at each step."""

    latents: Tensor
    log_probs: Tensor
    kl: Tensor
    clean: Tensor


def denoise(
    policy: DiffusionPolicy,
    prompts: list[str],
    noise: Tensor,
    kl: str = "none",
    check: Callable[[], None] = lambda: None,
) -> Path:
    """The trajectories driven by `noise`, (B, T + 1, C, H, W).

    kl: "exact" for the KL in nats of each step against the reference's; "sampled" for the log-ratio of each sample,
    whose expectation is the exact KL; "none" for zeros. Steps that are not stochastic have zeros in both tensors.
    """
    conditioning = policy.encode_prompts(prompts)
    latents = [policy.process.initial(noise[:, 0])]
    log_probs, divergences, cleans = [], [], []
    zero = noise.new_zeros(len(noise))
    for k, stochastic in enumerate(policy.process.stochastic.tolist()):
        check()
        positions = torch.full((len(noise),), k, device=policy.device)
        mean, sigma, clean = policy.step(latents[k], positions, conditioning)
        cleans.append(clean)
        latents.append(mean + sigma * noise[:, k + 1])
        log_probs.append(log_prob(latents[-1], mean, sigma) if stochastic else zero)
        divergence = zero
        if kl != "none" and stochastic:
            with policy.reference():
                reference_mean = policy.step(latents[k], positions, conditioning).mean
            if kl == "exact":
                divergence = gaussian_kl(mean, reference_mean, sigma)
            else:
                log_ratio = log_probs[-1] - log_prob(latents[-1], reference_mean, sigma)
                divergence = log_ratio * policy.latent_size
        divergences.append(divergence)
    return Path(*(torch.stack(parts, dim=1) for parts in (latents, log_probs, divergences, cleans)))


def draw_images(
    decoder: Decoder,
    prompts: list[str],
    seeds: Sequence[Coordinates],
    batch: int,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Only the images, (B, 3, H, W) in [0, 1], sampled `batch` at a time; `check` and `tell` are those of Sampler."""
    policy, images = decoder.policy, []
    parts = [slice(begin, begin + batch) for begin in range(0, len(prompts), batch)]
    calls = Calls(sum(len(policy.process) + decoder.calls(len(prompts[rows])) for rows in parts), check, tell)
    for rows in parts:
        latents = denoise(policy, prompts[rows], draw_noise(policy, seeds[rows]), check=calls).latents
        images.append(decoder(latents[:, -1], check=calls))
    return torch.cat(images)
