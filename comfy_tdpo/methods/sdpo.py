"""SDPO (arXiv 2411.11727): each step has its own reward, and two trajectories of a prompt are compared step by step.

Two trajectories of one prompt start from the same noise. The reward scores three images of each: the clean images that
the model predicts at the first step and at the anchor, the step whose prediction is least like the first and the last,
and the final image. The rewards of the other steps are means of these, weighted by how similar the predictions are.

The loss fits the difference of two log-ratios to the difference of two advantages. The first is about as large as the
clip range and the second about 1, so that its gradient is nearly that of a policy gradient in which the partner is the
baseline.

Deviations from the authors' code: the final image is scored in place of the prediction of the last step, from which it
differs by that step's noise; the anchor is neither the first step nor the last; similarities below SIMILAR count as
SIMILAR, so that no sum of weights is near 0. Guidance, and SD-Turbo as the base model, are left to the presets.

Shapes: N samples of an epoch in this process, the partners of a pair in consecutive rows; B of all processes, or of a
micro-batch; P pairs; T denoising steps, K of them trained, Q queries of a trajectory.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..process.gaussian import log_prob, scaled_clip_range
from ..randomness import Coordinates, generator_at
from ..rewards import score_images
from ..rollout import Sampled, Sampler, Trajectories
from ..swapping import brought
from . import Metrics, TensorGroup, advantages, objectives
from .advantages import RewardMoments
from .context import Context
from .drift import measure_drift
from .sdpo_settings import SDPOSettings
from .window import trained_steps, update_order, window

SIMILAR = 1e-3
PAIR = SDPOSettings.rows_together

Pairs = tuple[Tensor, Tensor]  # pairs and the step of each, int64 (P,) each, on the CPU


def similarities(clean: Tensor, queried: Tensor) -> Tensor:
    """Cosines, (B, T, Q), of the clean latents predicted at each step, (B, T, C, H, W), and at the steps `queried`,
    int64 (B, Q)."""
    unit = F.normalize(clean.flatten(2), dim=-1)
    return unit @ unit.gather(1, queried[..., None].expand(-1, -1, unit.shape[-1])).mT


def anchors(clean: Tensor) -> Tensor:
    """The step between the first and the last whose clean latent is least similar to theirs, int64 (B,).

    clean: (B, T, C, H, W), of at least three steps.
    """
    count, steps = clean.shape[:2]
    ends = torch.tensor([0, steps - 1], device=clean.device).expand(count, -1)
    return similarities(clean, ends).sum(-1)[:, 1:-1].argmin(dim=1) + 1


def dense_rewards(clean: Tensor, queried: Tensor, rewards: Tensor) -> Tensor:
    """The reward r_k of each step, (B, T): that of the query or, elsewhere, the sum of s_kq r_q over the sum of s_kq.

    clean: (B, T, C, H, W); queried, rewards: the steps q, int64, and what was found there, (B, Q) each.
    """
    weights = similarities(clean, queried).clamp(min=SIMILAR)
    between = (weights * rewards[:, None]).sum(-1) / weights.sum(-1)
    return between.scatter(1, queried, rewards)


def pair_loss(log_ratios: Tensor, advantages: Tensor, weights: Tensor, clip_range: float) -> Tensor:
    """The loss of each pair, (P,): the larger of (w d - dA)^2 with d the difference of the log-ratios and of those
    clipped.

    log_ratios, advantages: (P, 2); weights: w, (P,).
    """
    clipped = log_ratios.clamp(-clip_range, clip_range)
    target = advantages[:, 0] - advantages[:, 1]
    errors = (weights * (both[:, 0] - both[:, 1]) - target for both in (log_ratios, clipped))
    return torch.maximum(*(error**2 for error in errors))


class SDPO:
    """A Method: reward differences of pairs, step by step.

    moments: one RewardMoments for each step.
    """

    samples_first = True

    def __init__(self, context: Context):
        self.context, self.config, self.policy = context, context.config, context.policy
        window(self.config.policy, self.policy.process.stochastic)  # raises ValueError if there is nothing to train
        self.config.check_updates(context.samples_per_update)  # of this process
        context.order = lambda epoch: _rows_of(self._order(epoch)[0])
        settings = self.config.moments
        self.moments = [RewardMoments(settings.buffer_size, settings.min_count) for _ in self.policy.process.times]

    # --- samples and their targets

    def sample(self, prompts: list[str], seeds: Sequence[Coordinates]) -> Sampled:
        context = self.context
        sampler = Sampler(
            context.decoder, context.reward, context.eval_rewards, dense=self._dense_rewards, check=context.check
        )
        return sampler.sample(prompts, seeds, [_first_of_pair(seed) for seed in seeds])

    def _dense_rewards(self, clean: Tensor, prompts: list[str], rewards: Tensor) -> Tensor:
        """(B, T), from the clean latents, (B, T, C, H, W), and the rewards of the final images, (B,)."""
        count, steps = clean.shape[:2]
        anchor, reward = anchors(clean), self.context.reward
        queried = torch.stack([torch.zeros_like(anchor), anchor, torch.full_like(anchor, steps - 1)], dim=1)
        of_each = [prompt for prompt in prompts for _ in range(2)]
        predicted = clean[torch.arange(count, device=clean.device)[:, None], queried[:, :2]]
        scores = self.context.decoder(
            predicted.flatten(0, 1),
            read=lambda images, rows: score_images(reward, images, of_each[rows]),
            check=self.context.check,
        )
        return dense_rewards(clean, queried, torch.cat([scores.unflatten(0, (count, 2)), rewards[:, None]], dim=1))

    def targets(self, batch: Trajectories, prompts: list[str]) -> TensorGroup:
        """(N, T) each: returns, the discounted sums of dense rewards, and advantages, these normalised per prompt and
        step."""
        assert batch.dense_rewards is not None
        dense = self.context.gather(batch.dense_rewards)
        returns = advantages.returns(torch.zeros_like(dense[:, 0]), -dense, self.config.gamma)
        columns = zip(self.moments, returns.unbind(1), strict=True)
        normalised = torch.stack([moments.add(prompts, column)(column) for moments, column in columns], dim=1)
        return {"returns": self.context.own(returns), "advantages": self.context.own(normalised)}

    # --- updates

    def groups(self, epoch: int) -> list[Pairs]:
        """The epoch's gradient updates, one step of each pair at a time."""
        order, steps = self._order(epoch)
        parts = [self.context.share(part) for part in order.split(self.config.samples_per_update // PAIR)]
        local = [self.context.local(PAIR * part, epoch) // PAIR for part in parts]
        return [(own, steps[part, j]) for j in range(steps.shape[1]) for part, own in zip(parts, local, strict=True)]

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of the epoch's updates in all processes: of the pairs, int64, and of the trained steps of each."""
        generator = generator_at(self.config.seed, "order", epoch, 0)
        return update_order(self.config.policy, self._trained(epoch), self.config.samples_per_epoch // PAIR, generator)

    def _trained(self, epoch: int) -> Tensor:
        """Which steps the epoch trains, bool (T,)."""
        return trained_steps(self.config.policy, self.policy.process.stochastic, self.config.seed, epoch)

    def update(self, group: Pairs) -> None:
        """One gradient update of the policy, averaged over the pairs in `group`."""
        pairs, steps = group
        progress = self.context.progress
        batch, targets = progress.batch(), progress.targets
        assert targets is not None, "targets are computed before the updates"
        rows, steps = _rows_of(pairs), steps.repeat_interleave(PAIR)
        if progress.updates == 0:
            measure_drift(self.context, self._trained(self.context.epoch + 1), partial(self._log_ratio, batch))

        def accumulate(part: slice) -> None:
            self._accumulate(batch, targets["advantages"], rows[part], steps[part], len(rows))

        self.context.update_policy(len(rows), accumulate)

    def _accumulate(self, batch: Trajectories, advantages: Tensor, rows: Tensor, steps: Tensor, total: int) -> None:
        """Add the gradients and metrics of B of the update's `total` rows, partner beside partner."""
        context, share = self.context, len(rows) / total
        log_ratio = self._log_ratio(batch, rows, steps)
        weights = (self.config.gamma ** steps[::PAIR].float()).to(log_ratio.device)
        ratios, aims = log_ratio.view(-1, PAIR), advantages[rows, steps].view(-1, PAIR)
        clip_range = scaled_clip_range(self.config.policy.clip_range, self.policy.latent_size)
        loss = pair_loss(ratios, aims, weights, clip_range).sum() / (total // 2)
        context.backward(loss)
        log_ratio = log_ratio.detach()
        outside = objectives.outside(objectives.ratio_of(log_ratio), clip_range)
        context.add("policy/loss", loss)
        context.add("policy/approx_kl", share * objectives.approximate_kl(log_ratio * self.policy.latent_size))
        context.add("policy/clip_fraction", share * outside.float().mean())

    def _log_ratio(self, batch: Trajectories, rows: Tensor, steps: Tensor) -> Tensor:
        """log p_theta - log p_theta_old of B steps, (B,)."""
        conditioning = self.policy.encode_prompts([batch.prompts[row] for row in rows.tolist()])
        before, after = (brought(batch.latents[rows, at], self.policy.device) for at in (steps, steps + 1))
        step = self.policy.step(before, steps.to(self.policy.device), conditioning)
        return log_prob(after, step.mean, step.std) - batch.log_probs[rows, steps]

    # --- after the updates

    def metrics(self, batch: Trajectories) -> Metrics:
        return {}

    def finish(self, batch: Trajectories) -> Metrics:
        return {}

    # --- saved state

    def state(self) -> tuple[dict[str, TensorGroup], dict[str, Any]]:
        return {}, {"step_moments": [moments.state_dict() for moments in self.moments]}

    def load_state(self, tensors: dict[str, TensorGroup], plain: dict[str, Any]) -> None:
        for moments, state in zip(self.moments, plain["step_moments"], strict=True):
            moments.load_state_dict(state)


def _rows_of(pairs: Tensor) -> Tensor:
    return torch.stack([PAIR * pairs, PAIR * pairs + 1], dim=1).flatten()


def _first_of_pair(seed: Coordinates) -> Coordinates:
    """The coordinates of the noise of a sample's pair; the last of them is the sample's place in the epoch."""
    *rest, place = seed
    assert isinstance(place, int)
    return (*rest, place - place % 2)
