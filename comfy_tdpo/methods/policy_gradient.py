"""DDPO, TDPO and TDPO-R (arXiv 2402.08552, Algorithm 1): one method with four configurations.

Without a critic it is DDPO, where the temporal reward is the normalised reward at every step. DDPO-2 is DDPO with one
update for all steps of a trajectory.

Shapes: N samples of an epoch in this process, T denoising steps, M (sample, step) pairs of one gradient update, B pairs
of a micro-batch, D embedding width.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..optimizers import adamw, load_optimizer_tensors, optimizer_tensors
from ..process import Step
from ..process.gaussian import gaussian_kl, log_prob, scaled_clip_range
from ..randomness import Coordinates, generator_at
from ..rewards import RewardModel, encoder_name, load_reward
from ..rollout import Sampler, Trajectories
from . import Metrics, TensorGroup, advantages, objectives
from .advantages import KLCoefficient, RewardMoments
from .context import Context
from .critic import TemporalCritic
from .neuron_states import NeuronStates
from .window import trained_steps, window

logger = logging.getLogger(__name__)

Pairs = tuple[Tensor, Tensor]  # rows and steps, int64 (M,) each, on the CPU


class PolicyGradient:
    """A Method: clipped policy gradients on temporal rewards, and the critic from which these are computed."""

    samples_first = True

    def __init__(self, context: Context):
        self.context, self.config, self.policy = context, context.config, context.policy
        config = self.config
        window(config.policy, self.policy.process.stochastic)  # raises ValueError if there is nothing to train
        self.encoder = self._critic_encoder() if config.critic.enabled else None
        self.critic: TemporalCritic | None = None
        if self.encoder is not None:
            draw = generator_at(config.seed, "critic")
            logger.info("the critic uses the image encoder of %s", encoder_name(self.encoder))
            embed_dim = self.encoder.embed_dim
            assert embed_dim is not None, "checked by _critic_encoder"
            self.critic = TemporalCritic(embed_dim, config.critic.activation, draw).to(self.policy.device)
            self.critic_optimizer = adamw(list(self.critic.parameters()), config.critic)
        self.moments = RewardMoments(config.moments.buffer_size, config.moments.min_count)
        self.kl = KLCoefficient(config.kl.coefficient, config.kl.target, config.kl.horizon)
        self.neurons = NeuronStates(context, self.critic, self.critic_optimizer if self.critic else None)

    def _critic_encoder(self) -> RewardModel:
        """The reward whose image encoder the critic uses."""
        config, name = self.config, self.config.critic.encoder
        how = (self.policy.device, config.reward_precision, config.reward_weights)
        model = load_reward(name, *how) if name else self.context.reward
        if model.embed_dim is None:
            raise ValueError(
                f"reward {model.name!r} has no image encoder for the critic; set critic.encoder to a reward that "
                "has one, or choose an algorithm without a critic (ddpo-2, ddpo-100)"
            )
        return model

    @property
    def clip_range(self) -> float:
        return scaled_clip_range(self.config.policy.clip_range, self.policy.latent_size)

    # --- samples and their targets

    def sample(self, prompts: list[str], seeds: Sequence[Coordinates]) -> Trajectories:
        context, config = self.context, self.config
        sampler = Sampler(
            context.decoder,
            context.reward,
            context.eval_rewards,
            embed=self.encoder.embed if self.encoder else None,
            embed_image_size=config.critic.image_size,
            kl=config.kl.form if config.kl.coefficient else "none",
            check=context.check,
        )
        return sampler.sample(prompts, seeds)

    def targets(self, batch: Trajectories, prompts: list[str]) -> TensorGroup:
        """Eq. 5-7: temporal_rewards, returns and, with a critic, residuals, (N, T) each; and kl_weight, a number.

        Moments are computed over all processes; each process keeps its own rows. A step's exact KL depends only on the
        state, so it would have no gradient as that step's reward. It is therefore a term of the loss, and the return
        contains only the KL of later steps. kl_weight gives the KL the scale of the policy loss, whose log-probability
        is a mean over C * H * W elements and not their sum, and whose temporal rewards are divided by their standard
        deviation.
        """
        gather, own = self.context.gather, self.context.own
        kl = gather(batch.kl)
        penalties = self.kl.value * kl
        normalized = self.moments.normalize(prompts, gather(batch.rewards))
        returns_of = advantages.returns_with_later_kl if self._kl_in_loss else advantages.returns
        returns = returns_of(normalized, penalties, self.config.gamma)
        targets = {"returns": own(returns)}
        if self.critic is None:
            clip, scale = self.config.advantage_clip or torch.inf, torch.ones_like(returns[0, 0])
            targets["temporal_rewards"] = own(returns).clamp(-clip, clip)
        else:
            targets["residuals"] = self.critic(batch.image_embeds)
            trained = self._trained(self.context.epoch + 1)
            temporal, scale = advantages.temporal_rewards(returns, gather(targets["residuals"]), trained)
            targets["temporal_rewards"] = own(temporal)
        if self._kl_in_loss:
            targets["kl_weight"] = self.kl.value / (self.policy.latent_size * scale)
        self.kl.update(kl.sum(1).mean().item(), len(kl))
        return targets

    @property
    def _kl_in_loss(self) -> bool:
        return self.config.kl.coefficient > 0 and self.config.kl.form == "exact"

    # --- updates

    def groups(self, epoch: int) -> list[Pairs]:
        """The epoch's gradient updates, kept on the CPU so that looking up prompts does not wait for the GPU."""
        rows, steps = self._order(epoch)
        parts = rows.split(self.context.samples_per_update)
        if self.config.updates == "trajectory":
            return [(part.repeat_interleave(steps.shape[1]), steps[part].flatten()) for part in parts]
        return [(part, steps[part, j]) for j in range(steps.shape[1]) for part in parts]

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of the epoch's updates: of the samples, int64 (N,), and of the K trained steps of each,
        (N, K)."""
        generator = generator_at(self.config.seed, "order", epoch, self.context.accelerator.process_index)
        samples = self.context.samples
        rows = torch.randperm(samples, generator=generator)
        (trained,) = self._trained(epoch).nonzero(as_tuple=True)
        steps = trained.repeat(samples, 1)  # (N, K)
        if self.config.policy.timestep_order == "shuffled":
            steps = steps.gather(1, torch.rand(steps.shape, generator=generator).argsort(dim=1))
        return rows, steps

    def _trained(self, epoch: int) -> Tensor:
        """Which steps the epoch trains, bool (T,)."""
        return trained_steps(self.config.policy, self.policy.process.stochastic, self.config.seed, epoch)

    def update(self, group: Pairs) -> None:
        """Eq. 8-10: one gradient update of the policy and the critic on the pairs in `group`."""
        progress = self.context.progress
        batch, targets = progress.batch(), progress.targets
        assert targets is not None, "targets are computed before the updates"
        self.update_policy(batch, targets, *group)
        if self.critic is not None:
            self._update_critic(batch, targets, *group)

    def update_policy(self, batch: Trajectories, targets: TensorGroup, rows: Tensor, steps: Tensor) -> None:
        """Eq. 8, averaged over the M pairs."""

        def accumulate(part: slice) -> None:
            self._accumulate(batch, targets, rows[part], steps[part], len(rows))

        self.context.update_policy(len(rows), accumulate)

    def _accumulate(self, batch: Trajectories, targets: TensorGroup, rows: Tensor, steps: Tensor, total: int) -> None:
        """Add the gradients and metrics of B of the update's M = `total` pairs."""
        context, share = self.context, len(rows) / total
        step, log_ratio = self._step_now(batch, rows, steps)
        ratio = log_ratio.exp()
        losses = objectives.policy_loss(ratio, targets["temporal_rewards"][rows, steps], self.clip_range)
        loss = losses.sum() / total
        context.add("policy/loss", loss)
        if self._kl_in_loss:
            penalty = targets["kl_weight"] * self._kl_now(batch, rows, steps, step).sum() / total
            context.add("kl/loss", penalty)
            loss = loss + penalty
        loss.backward()
        ratio, log_ratio = ratio.detach(), log_ratio.detach()
        context.add("policy/approx_kl", share * objectives.approximate_kl(log_ratio * self.policy.latent_size))
        context.add("policy/clip_fraction", share * objectives.clip_fraction(ratio, self.clip_range))
        if context.progress.updates == 0:  # first update: the policy is still the one that sampled
            context.raise_to("policy/ratio_drift", (ratio - 1).abs().max())

    def _step_now(self, batch: Trajectories, rows: Tensor, steps: Tensor) -> tuple[Step, Tensor]:
        """The step under the current policy, and log rho of Eq. 8, (B,), for B pairs."""
        step = self.policy.step(*self._inputs(batch, rows, steps))
        log_probs = log_prob(batch.latents[rows, steps + 1], step.mean, step.std)
        return step, log_probs - batch.log_probs[rows, steps]

    def _kl_now(self, batch: Trajectories, rows: Tensor, steps: Tensor, step: Step) -> Tensor:
        """KL of the policy's `step` from the base model's, (B,), for the same pairs."""
        with self.policy.reference():
            reference = self.policy.step(*self._inputs(batch, rows, steps))
        return gaussian_kl(step.mean, reference.mean, step.std)

    def _inputs(self, batch: Trajectories, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        conditioning = self.policy.encode_prompts([batch.prompts[row] for row in rows.tolist()])
        return batch.latents[rows, steps], steps.to(self.policy.device), conditioning

    def _update_critic(self, batch: Trajectories, targets: TensorGroup, rows: Tensor, steps: Tensor) -> None:
        """Eq. 9-10 on all M pairs at once: the critic is small, and dropout then does not depend on the micro-batch."""
        context, config = self.context, self.config
        assert self.critic is not None and batch.image_embeds is not None
        self.critic_optimizer.zero_grad()
        seed = (config.seed, "dropout", context.epoch + 1, context.progress.updates, context.accelerator.process_index)
        residuals = self.critic(batch.image_embeds[rows, steps], dropout=generator_at(*seed))
        old, returns = targets["residuals"][rows, steps], targets["returns"][rows, steps]
        loss = objectives.critic_loss(residuals, old, returns, config.critic.clip_range).mean()
        loss.backward()
        context.add("critic/loss", loss)
        context.step(self.critic_optimizer, config.critic.max_grad_norm)

    # --- after the updates

    def metrics(self, batch: Trajectories) -> Metrics:
        gather, targets, metrics = self.context.gather, self.context.progress.targets, Metrics()
        if self.critic is not None:
            assert targets is not None
            trained = self._trained(self.context.epoch + 1)
            residuals, returns = (gather(targets[name][:, trained].contiguous()) for name in ("residuals", "returns"))
            explained = objectives.explained_variance(residuals, returns)
            metrics["critic/explained_variance"] = explained.item()
        if self.config.kl.coefficient > 0:
            metrics |= {"kl/nats": gather(batch.kl).sum(1).mean().item(), "kl/coefficient": self.kl.value}
        return metrics

    def finish(self, batch: Trajectories) -> Metrics:
        """Eq. 11-12: measure the neurons every epoch and reset them every F epochs."""
        metrics = Metrics()
        if batch.image_embeds is not None:
            rows, steps = self._order(self.context.epoch + 1)
            metrics |= self.neurons.of_critic(batch.image_embeds, (rows, steps[rows, -1]))
        if self.config.neurons.policy_reset != "none" or self.config.neurons.policy_measure:
            metrics |= self.neurons.of_policy(batch)
        return metrics

    # --- saved state

    def state(self) -> tuple[dict[str, TensorGroup], dict[str, Any]]:
        tensors: dict[str, TensorGroup] = {}
        if self.critic is not None:
            tensors["critic"] = self.critic.state_dict()
            tensors["critic_optimizer"] = optimizer_tensors(self.critic_optimizer, dict(self.critic.named_parameters()))
        tensors |= {f"active_{group}": masks for group, masks in self.neurons.active.items()}
        return tensors, {"kl_coefficient": self.kl.value, "moments": self.moments.state_dict()}

    def load_state(self, tensors: dict[str, TensorGroup], plain: dict[str, Any]) -> None:
        if self.critic is not None:
            self.critic.load_state_dict(tensors["critic"])
            named = dict(self.critic.named_parameters())
            load_optimizer_tensors(self.critic_optimizer, named, tensors["critic_optimizer"])
        prefix = "active_"
        self.neurons.active = {
            name.removeprefix(prefix): masks for name, masks in tensors.items() if name.startswith(prefix)
        }
        self.kl.value = plain["kl_coefficient"]
        self.moments.load_state_dict(plain["moments"])
