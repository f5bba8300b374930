"""DDPO, TDPO and TDPO-R (arXiv 2402.08552, Algorithm 1), GRPO and DPOK: one method in several configurations.

Without a critic it is DDPO, where the temporal reward is the normalised reward at every step. DDPO-2 is DDPO with one
update for all steps of a trajectory, and GRPO is that with rewards compared within a prompt's images of the epoch. DPOK
(arXiv 2305.16381) has a critic that reads the latent, and the KL in the loss alone.

Deviations from DPOK's code: temporal rewards are normalised over the epoch, as in TDPO; the ratio is clipped by Eq. 8,
whereas its clamp without a maximum has no gradient outside the range, even where the advantage would bring the ratio
back; the reference is the model with the LoRA turned off, not a second U-Net; an epoch has many prompts, not one.

Shapes: N samples of an epoch in this process, T denoising steps, M (sample, step) pairs of one gradient update, B pairs
of a micro-batch, D embedding width.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..process import Step
from ..process.gaussian import gaussian_kl, log_prob, scaled_clip_range
from ..randomness import Coordinates, generator_at
from ..rollout import Sampled, Sampler, Trajectories, draw_noise_of
from . import Metrics, TensorGroup, advantages, groups, objectives
from .context import Context
from .critic_training import CriticTraining
from .drift import measure_drift
from .kl_penalty import KLPenalty
from .neuron_states import NeuronStates
from .normalised import NormalisedRewards
from .replay import Replay
from .window import trained_steps, update_order, window

Pairs = tuple[Tensor, Tensor]  # rows and steps, int64 (M,) each, on the CPU; rows of replayed samples come last


class PolicyGradient:
    """A Method: clipped policy gradients on temporal rewards, and the critic from which these are computed."""

    samples_first = True

    def __init__(self, context: Context):
        self.context, self.config, self.policy = context, context.config, context.policy
        context.order = lambda epoch: self._order(epoch)[0]
        config = self.config
        window(config.policy, self.policy.process.stochastic)  # raises ValueError if there is nothing to train
        self.critic = CriticTraining(context) if config.critic.enabled else None
        self.rewards = NormalisedRewards(context)
        self.kl = KLPenalty(context)
        self.replay = Replay(context)
        self.neurons = NeuronStates(context, self.critic)
        if config.favour_diversity and context.reward.embed_dim is None:
            raise ValueError(
                f"got favour_diversity with reward {context.reward.name!r}, which has no image encoder; expected a "
                "training reward that has one: choose another, or set favour_diversity to false"
            )

    @property
    def clip_range(self) -> float:
        return scaled_clip_range(self.config.policy.clip_range, self.policy.latent_size)

    # --- samples and their targets

    def sample(self, prompts: list[str], seeds: Sequence[Coordinates]) -> Sampled:
        context = self.context
        sampler = Sampler(
            context.decoder,
            context.reward,
            context.eval_rewards,
            reading=self.critic.reading(self.rewards.models) if self.critic else None,
            kl=self.kl.form,
            check=context.check,
            tell=context.tell,
            guards=context.guards,
        )
        return sampler.sample(prompts, seeds)

    def targets(self, batch: Trajectories, prompts: list[str]) -> TensorGroup:
        """Eq. 5-7: temporal_rewards, returns and, with a critic, residuals; kl_weight with the KL in the loss; (N, T)
        each. For a critic that reads scores also these, normalised like the rewards: scores, (N, K, S).

        Moments are computed over all processes; each process keeps its own rows.
        """
        gather, own = self.context.gather, self.context.own
        self.kl.measure(batch)  # may be stopped too
        kl, rewards = gather(batch.kl), gather(batch.rewards)
        guards = {name: gather(scores) for name, scores in batch.guard_rewards.items()}
        self.rewards.start(prompts, guards)  # may be stopped, so that nothing may have changed before it
        self.context.processes.meet()
        self.kl.begin(kl, rewards, guards)
        normalised = self.rewards.of_images(prompts, rewards, guards)
        returns = self.kl.returns(normalised, kl, self.config.gamma)
        targets = {"returns": own(returns)}
        if self.critic is None:
            temporal, scale = returns, torch.ones_like(returns[0, 0])
        else:
            if self.config.critic.scores:
                targets["scores"] = self.rewards.of_steps(batch)
            targets["residuals"] = self.critic.predict(batch, targets["returns"], targets.get("scores"))
            trained = self._trained(self.context.epoch + 1)
            temporal, scale = advantages.temporal_rewards(
                returns,
                gather(targets["residuals"]),
                trained,
                self.config.gamma,
                self.critic.gae_lambda,
                known=self.critic.known(trained),
            )
        if self.config.favour_diversity:
            assert batch.final_embeds is not None, "checked at the start"
            factors = groups.diversity_factors(gather(batch.final_embeds), self.config.samples_per_prompt)
            temporal = groups.favour_diversity(temporal, factors)
        if self.critic is None:
            clip = self.config.advantage_clip or torch.inf
            temporal = temporal.clamp(-clip, clip)
        targets["temporal_rewards"] = own(temporal)
        if self.kl.in_loss:
            targets["kl_weight"] = own(self.kl.loss_weights(scale).expand_as(returns)).contiguous()
        return targets

    # --- updates

    def groups(self, epoch: int) -> list[Pairs]:
        """The epoch's gradient updates, kept on the CPU so that looking up prompts does not wait for the GPU."""
        rows, steps = self._order(epoch)
        parts = rows.split(self.config.samples_per_update)
        width = steps.shape[1] if self.config.updates == "trajectory" else 1
        new = [(part, columns[part]) for columns in steps.split(width, dim=1) for part in parts]
        own = (self.replay.extend(*samples, epoch, update) for update, samples in enumerate(new))
        return [(part.repeat_interleave(steps.shape[1]), steps.flatten()) for part, steps in own]

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of the epoch's updates in all processes: of the samples, int64 (B,), and of the K trained steps of
        each, (B, K)."""
        generator = generator_at(self.config.seed, "order", epoch, 0)
        return update_order(self.config.policy, self._trained(epoch), self.config.samples_per_epoch, generator)

    def _trained(self, epoch: int) -> Tensor:
        """Which steps the epoch trains, bool (T,)."""
        return trained_steps(self.config.policy, self.policy.process.stochastic, self.config.seed, epoch)

    def update(self, group: Pairs) -> None:
        """Eq. 8-10: one gradient update of the policy and the critic on the pairs in `group`."""
        progress = self.context.progress
        batch, targets = progress.batch(), progress.targets
        assert targets is not None, "targets are computed before the updates"
        if progress.updates == 0:
            measure_drift(self.context, self._trained(self.context.epoch + 1), partial(self._ratio_now, batch))
        self.update_policy(batch, targets, *group)
        if self.critic is not None:
            rows, steps = group
            new = self.replay.new(rows)
            self.critic.update(batch, targets, rows[:new], steps[:new])

    def update_policy(self, batch: Trajectories, targets: TensorGroup, rows: Tensor, steps: Tensor) -> None:
        """Eq. 8, averaged over the M pairs."""
        new = self.replay.new(rows)

        def accumulate(part: slice) -> None:
            self._accumulate(batch, targets, rows[part], steps[part], new, len(rows))

        self.context.update_policy(len(rows), accumulate)

    def _accumulate(
        self, batch: Trajectories, targets: TensorGroup, rows: Tensor, steps: Tensor, new: int, total: int
    ) -> None:
        """Add the gradients and metrics of B of the update's M = `total` pairs, of which `new` are of new samples."""
        context, pick = self.context, self.replay.pick
        inputs = self._inputs(batch, rows, steps)
        step = self.policy.step(*inputs)
        log_ratio = self._log_ratio(batch, rows, steps, step)
        temporal = pick("temporal_rewards", targets["temporal_rewards"], rows, steps)
        losses, outside = self._policy_losses(batch, rows, steps, step, log_ratio, temporal)
        loss = losses.sum() / total
        context.add("policy/loss", loss)
        if self.kl.in_loss:
            weights = pick("kl_weight", targets["kl_weight"], rows, steps)
            known = batch.reference_means
            known = None if known is None else pick("reference_means", known, rows, steps)
            penalties = weights * self.kl.now(step, inputs, known)
            context.add("kl/loss", penalties.sum() / total)
            loss = loss + penalties.sum() / total
        context.backward(loss)
        log_ratio, here = log_ratio.detach(), self.replay.new(rows)
        groups = {"policy": (slice(here), new), "replay": (slice(here, None), total - new)}
        for name, (part, count) in groups.items():
            if pairs := len(rows[part]):
                kl = objectives.approximate_kl(log_ratio[part] * self.policy.latent_size)
                context.add(f"{name}/approx_kl", pairs / count * kl)
                context.add(f"{name}/clip_fraction", pairs / count * outside[part].float().mean())

    def _policy_losses(
        self, batch: Trajectories, rows: Tensor, steps: Tensor, step: Step, log_ratio: Tensor, temporal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The policy's loss of B pairs and whether each is outside the range that the objective allows, (B,) each."""
        objective = self.config.policy.objective
        if objective == "clip":
            return self._clipped(objectives.ratio_of(log_ratio), temporal, self.clip_range)
        noise = self._noise(rows, steps)
        old_mean = self.replay.pick("latents", batch.latents, rows, steps + 1) - step.std * noise
        if objective == "step-normalised":
            ratio = objectives.ratio_of(objectives.step_normalised_log_ratio(step.mean, old_mean, noise))
            return self._clipped(ratio, temporal, self.clip_range * self._median_std)
        kl, limit = gaussian_kl(step.mean.detach(), old_mean, step.std), self.config.policy.trust_region
        return objectives.trust_region_loss(log_ratio, temporal, kl, limit), kl >= limit

    @staticmethod
    def _clipped(ratio: Tensor, temporal: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
        return objectives.policy_loss(ratio, temporal, clip_range), objectives.outside(ratio, clip_range)

    def _noise(self, rows: Tensor, steps: Tensor) -> Tensor:
        """The noise with which B steps were sampled, (B, C, H, W), drawn again."""
        return draw_noise_of(self.policy, [self.replay.noise_of(row) for row in rows.tolist()], steps)

    @cached_property
    def _median_std(self) -> float:
        """The median std of the stochastic steps, trained or not: what turns a clip range for ratios into one for
        normalised ratios."""
        return self.policy.process.sigma[self.policy.process.stochastic].median().item()

    def _ratio_now(self, batch: Trajectories, rows: Tensor, steps: Tensor) -> Tensor:
        """log rho of Eq. 8 under the current policy, (B,), for B pairs."""
        return self._log_ratio(batch, rows, steps, self.policy.step(*self._inputs(batch, rows, steps)))

    def _log_ratio(self, batch: Trajectories, rows: Tensor, steps: Tensor, step: Step) -> Tensor:
        """log rho of Eq. 8, (B,), for B pairs and the current policy's `step` at them."""
        pick = self.replay.pick
        log_probs = log_prob(pick("latents", batch.latents, rows, steps + 1), step.mean, step.std)
        return log_probs - pick("log_probs", batch.log_probs, rows, steps)

    def _inputs(self, batch: Trajectories, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        conditioning = self.policy.encode_prompts([self.replay.prompt(batch, row) for row in rows.tolist()])
        latents = self.replay.pick("latents", batch.latents, rows, steps)
        return latents, steps.to(self.policy.device), conditioning

    # --- after the updates

    def metrics(self, batch: Trajectories) -> Metrics:
        metrics = self.kl.metrics(batch)
        if self.critic is not None:
            assert self.context.progress.targets is not None
            metrics |= self.critic.metrics(self.context.progress.targets, self._trained(self.context.epoch + 1))
        return metrics

    def finish(self, batch: Trajectories) -> Metrics:
        """Eq. 11-12: measure the neurons every epoch and reset them every F epochs."""
        metrics, targets = self.rewards.finish(batch), self.context.progress.targets
        assert targets is not None
        self.replay.add(batch, targets)
        if self.critic is not None:
            self.critic.finish(batch, targets)
            rows, steps = self._order(self.context.epoch + 1)
            metrics |= self.neurons.of_critic(self.critic.inputs(batch), (rows, steps[rows, -1]))
        if self.config.neurons.policy_reset != "none" or self.config.neurons.policy_measure:
            metrics |= self.neurons.of_policy(batch)
        self.kl.finish(batch)  # last, so that a new reference is the policy that samples next
        return metrics

    # --- saved state

    def state(self) -> tuple[dict[str, TensorGroup], dict[str, Any]]:
        tensors, plain = self.kl.state()
        tensors |= self.critic.state() if self.critic is not None else {}
        tensors |= {"replay": self.replay.samples} if self.replay.samples else {}
        tensors |= {f"active_{group}": masks for group, masks in self.neurons.active.items()}
        return tensors, plain | self.rewards.state()

    def load_state(self, tensors: dict[str, TensorGroup], plain: dict[str, Any]) -> None:
        if self.critic is not None:
            self.critic.load_state(tensors)
        prefix = "active_"
        self.neurons.active = {
            name.removeprefix(prefix): masks for name, masks in tensors.items() if name.startswith(prefix)
        }
        self.kl.load_state(tensors, plain)
        self.replay.load(tensors.get("replay", {}))
        self.rewards.load_state(plain)
