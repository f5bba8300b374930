"""What AlignProp, DRaFT and ReFL share: each update draws its samples and back-propagates their rewards.

The reward's gradient is taken at the latents first, a few images at a time, and then goes on through the steps of
sampling. That is the gradient of the whole, but the graphs of decoder and reward never hold more than
`decode_batch` images.

Deviations from the authors' codes: a LoRA is trained in every case; the random number that each of them draws per
micro-batch is drawn per sample, so that the micro-batch does not change the result; preprocessing is antialiased,
see rewards/pixels.py.

Shapes: N samples of an epoch in this process, M rows of one gradient update, B rows of a micro-batch, S latents to
score, E held-out rewards, D embedding width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ...randomness import Coordinates
from ...rewards import RewardError, embed_images, score_images
from ...rewards.gradients import check_has_gradient
from ...rewards.networks import networks_of
from ...rollout import Sampled, Trajectories, draw_noise
from .. import Metrics, TensorGroup
from ..context import Context
from .drawing import Drawn, TakeStep, draw
from .recompute import recomputed, recomputing

SCORED = 3  # columns: reward, loss, share of saturated pixels


class DirectGradient:
    """A Method whose updates draw their samples; subclasses say which latents are scored, and the loss."""

    samples_first = False

    def __init__(self, context: Context):
        self.context, self.config, self.policy = context, context.config, context.policy
        self.samples_per_update = context.samples_per_update
        check_has_gradient(context.reward.name, context.reward.differentiable, self.config.algorithm)

    def scored(self, prompts: list[str], seeds: Sequence[Coordinates]) -> tuple[Tensor, Tensor]:
        """The finished latents of B samples, (B, C, H, W), and the latents to score, with a graph, (S, C, H, W).

        The latter are those of all samples, once or several times over. If they are the same tensor, the images are
        decoded once.
        """
        raise NotImplementedError

    def loss(self, rewards: Tensor) -> Tensor:
        """The loss of each image, (S,), from its reward, (S,)."""
        raise NotImplementedError

    def report(self, rewards: Tensor) -> None:
        """Add metrics of the scored images' rewards, (S,)."""

    # --- updates

    def groups(self, epoch: int) -> list[range]:
        size = self.context.samples_per_update
        return [range(begin, begin + size) for begin in range(0, self.context.samples, size)]

    def update(self, group: range) -> None:
        """One gradient update on the samples of the rows in `group`."""

        def accumulate(part: slice) -> Trajectories:
            return self._accumulate(group[part])

        self.context.progress.parts += self.context.update_policy(len(group), accumulate)

    def _accumulate(self, rows: range) -> Trajectories:
        """Draw B of the update's M samples, and add their gradients and metrics."""
        context = self.context
        context.begin("training", rows.start, len(rows), context.samples)
        prompts, seeds = context.draws(rows)
        final, scored = self.scored(prompts, seeds)
        at_once = scored is final
        columns = self._backward(scored, prompts * (len(scored) // len(final)), at_once)
        measured = columns[:, SCORED:] if at_once else self._measure_all(final, prompts)
        return self._trajectories(prompts, measured)

    def _backward(self, scored: Tensor, prompts: list[str], measure: bool) -> Tensor:
        """Back-propagate the losses of S latents; their columns, (S, SCORED) or, with `measure`, those of `_measure`
        beside them."""
        leaf, total = scored.detach().requires_grad_(), self.samples_per_update

        def read(images: Tensor, rows: slice) -> Tensor:
            if leaf.grad is not None:
                leaf.grad[rows] = 0  # a retry: without the gradient of the attempt that ran out of memory
            rewards = self._rewards(images, prompts[rows])
            losses = self.config.loss_weight * self.loss(rewards)
            self.context.backward(losses.sum() / total)
            with torch.no_grad():
                images, rewards = images.detach(), rewards.detach()
                saturated = ((images <= 0) | (images >= 1)).float().mean(dim=(1, 2, 3))
                columns = torch.stack([rewards, losses.detach(), saturated], dim=1)
                return torch.cat([columns, self._measure(images, prompts[rows], rewards)], 1) if measure else columns

        with self._recomputing():
            columns = self.context.decoder(leaf, read=read, check=self.context.check)
        scored.backward(leaf.grad)
        rewards, losses, saturated = columns[:, :SCORED].unbind(1)
        self.context.add("policy/loss", losses.sum() / total)
        self.context.add("policy/saturated_pixels", saturated.sum() / (total * self.config.queries_per_sample))
        self.report(rewards)
        return columns

    def _rewards(self, images: Tensor, prompts: list[str]) -> Tensor:
        rewards = score_images(self.context.reward, images, prompts)
        if not rewards.requires_grad:
            raise RewardError(
                f"reward {self.context.reward.name!r} returned numbers that do not depend on the images by torch's "
                "operations alone, so they have no gradient; compute them with torch, without detach(), item() or "
                "no_grad()"
            )
        return rewards

    def _recomputing(self) -> AbstractContextManager[None]:
        """Inside the block, decoder and reward keep only what the settings say."""
        settings, networks = self.config.recompute, list[nn.Module]()
        if settings.decoder and hasattr(self.policy.model.decode, "network"):
            networks.append(self.policy.model.decode.network)
        if settings.reward:
            networks += networks_of(self.context.reward)
        return recomputing(networks)

    # --- samples

    def draw(self, prompts: list[str], seeds: Sequence[Coordinates], with_gradient: Tensor) -> Drawn:
        """Trajectories with a graph of the steps `with_gradient`, bool (B, T)."""
        noise = draw_noise(self.policy, seeds)
        return draw(self.policy, self.take_step, prompts, noise, with_gradient, self.context.check)

    @property
    def take_step(self) -> TakeStep:
        step = self.policy.step
        if not self.config.recompute.steps:
            return step
        return lambda latents, positions, conditioning: recomputed(step, latents, positions, conditioning)

    # --- what the images of an epoch are like

    @torch.no_grad()
    def _measure_all(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """`_measure` of finished latents that are not scored for the update."""

        def read(images: Tensor, rows: slice) -> Tensor:
            return self._measure(images, prompts[rows])

        return self.context.decoder(latents.detach(), read=read, check=self.context.check)

    def _measure(self, images: Tensor, prompts: list[str], rewards: Tensor | None = None) -> Tensor:
        """The training reward, the held-out rewards and the embeddings of B images side by side, (B, 1 + E + D)."""
        context = self.context
        if rewards is None:
            rewards = score_images(context.reward, images, prompts)
        scores = [rewards, *(score_images(model, images, prompts) for model in context.eval_rewards.values())]
        columns = torch.stack(scores, dim=1)
        if context.reward.embed_dim is None:
            return columns
        return torch.cat([columns, embed_images(context.reward, images).float()], dim=1)

    def _trajectories(self, prompts: list[str], measured: Tensor) -> Trajectories:
        """B samples with what was measured of them, and without their steps, which nothing needs afterwards."""
        names = list(self.context.eval_rewards)
        rewards, *held_out = measured[:, : 1 + len(names)].clone().unbind(1)
        steps = rewards.new_empty(len(prompts), 0)
        return Trajectories(
            prompts=prompts,
            latents=rewards.new_empty(len(prompts), 0, *self.policy.latent_shape),
            log_probs=steps,
            kl=steps,
            rewards=rewards,
            final_embeds=None if self.context.reward.embed_dim is None else measured[:, 1 + len(names) :],
            eval_rewards=dict(zip(names, held_out, strict=True)),
        )

    # --- the rest of a Method; nothing is left over from one update to the next

    def sample(self, prompts: list[str], seeds: Sequence[Coordinates]) -> Sampled:
        raise NotImplementedError("samples_first is False")

    def targets(self, batch: Trajectories, prompts: list[str]) -> TensorGroup:
        raise NotImplementedError("samples_first is False")

    def metrics(self, batch: Trajectories) -> Metrics:
        return {}

    def finish(self, batch: Trajectories) -> Metrics:
        return {}

    def state(self) -> tuple[dict[str, TensorGroup], dict[str, Any]]:
        return {}, {}

    def load_state(self, tensors: dict[str, TensorGroup], plain: dict[str, Any]) -> None:
        pass
