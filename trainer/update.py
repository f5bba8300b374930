"""The gradient updates of an epoch (arXiv 2402.08552, Eq. 8-10).

Shapes: N samples of an epoch in this process, T denoising steps, M (sample, step) pairs of one gradient update, B pairs
of a micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from comfy_tdpo import objectives
from comfy_tdpo.diffusion import log_prob, scaled_clip_range
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.rollout import Trajectories

from .config import TrainConfig
from .memory import smaller_micro_batch
from .state import Targets, TensorGroup, TrainState


@dataclass(frozen=True)
class Updater:
    """Updates policy and critic, one group of (sample, step) pairs after the other.

    Args:
        config, state, accelerator: of the training.
        samples, samples_per_update: N of an epoch and of one update, in this process.
        check: asked between micro-batches; what it raises leaves policy and critic at the last whole update.
    """

    config: TrainConfig
    state: TrainState
    accelerator: Accelerator
    samples: int
    samples_per_update: int
    check: Callable[[], None]

    @property
    def policy(self) -> DiffusionPolicy:
        return self.state.policy

    @property
    def clip_range(self) -> float:
        return scaled_clip_range(self.config.policy.clip_range, self.policy.latent_size)

    def groups(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """The epoch's gradient updates as (rows, steps), int64 (M,) each, on the CPU: naming prompts needs no sync."""
        generator = generator_at(self.config.seed, "order", epoch, self.accelerator.process_index)
        rows = torch.randperm(self.samples, generator=generator)
        steps = torch.arange(len(self.policy.schedule)).repeat(self.samples, 1)  # (N, T)
        if self.config.policy.timestep_order == "shuffled":
            steps = torch.rand(steps.shape, generator=generator).argsort(dim=1)
        parts = rows.split(self.samples_per_update)
        if self.config.updates == "trajectory":
            return [(part.repeat_interleave(steps.shape[1]), steps[part].flatten()) for part in parts]
        return [(part, steps[part, j]) for j in range(steps.shape[1]) for part in parts]

    def update(self, batch: Trajectories, targets: Targets, rows: Tensor, steps: Tensor) -> None:
        """One gradient update of policy and critic on the pairs (`rows`, `steps`), (M,) each."""
        self.update_policy(batch, targets, rows, steps)
        if targets.residuals is not None:
            self._update_critic(batch, targets, rows, steps)
        self.state.progress.updates += 1

    # --- the policy

    def update_policy(self, batch: Trajectories, targets: Targets, rows: Tensor, steps: Tensor) -> None:
        """Eq. 8, averaged over the M pairs, a micro-batch at a time."""
        state = self.state
        while True:
            state.optimizer.zero_grad()
            sums = dict(state.progress.sums)
            try:
                self._accumulate_policy(batch, targets, rows, steps, sums)
                break
            except torch.cuda.OutOfMemoryError:
                state.micro_batch = smaller_micro_batch(state.micro_batch, self.samples_per_update)
        state.progress.sums = sums
        self._optimizer_step(state.optimizer, self.config.policy.max_grad_norm)

    def _accumulate_policy(
        self, batch: Trajectories, targets: Targets, rows: Tensor, steps: Tensor, sums: TensorGroup
    ) -> None:
        """Add the gradients to those of the parameters, and the metrics to `sums`."""
        size = self.state.micro_batch
        for micro_rows, micro_steps in zip(rows.split(size), steps.split(size), strict=True):
            self.check()
            ratio, log_ratio = self.ratio(batch, micro_rows, micro_steps)
            advantage = targets.temporal_rewards[micro_rows, micro_steps]
            loss = objectives.policy_loss(ratio, advantage, self.clip_range).sum() / len(rows)
            loss.backward()
            share, ratio, log_ratio = len(micro_rows) / len(rows), ratio.detach(), log_ratio.detach()
            _add(sums, "policy/loss", loss.detach())
            _add(sums, "policy/approx_kl", share * objectives.approximate_kl(log_ratio * self.policy.latent_size))
            _add(sums, "policy/clip_fraction", share * objectives.clip_fraction(ratio, self.clip_range))
            if self.state.progress.updates == 0:  # of the epoch: the policy is still the one that sampled
                _raise_to(sums, "policy/ratio_drift", (ratio - 1).abs().max())

    def ratio(self, batch: Trajectories, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """rho of Eq. 8 and its logarithm for pairs of samples and steps, (B,) each."""
        prompt_embeds = self.policy.encode_prompts([batch.prompts[row] for row in rows.tolist()])
        rows, steps = rows.to(self.policy.device), steps.to(self.policy.device)
        mean, sigma = self.policy.step(batch.latents[rows, steps], steps, prompt_embeds)
        log_ratio = log_prob(batch.latents[rows, steps + 1], mean, sigma) - batch.log_probs[rows, steps]
        return log_ratio.exp(), log_ratio

    # --- the critic

    def _update_critic(self, batch: Trajectories, targets: Targets, rows: Tensor, steps: Tensor) -> None:
        """Eq. 9-10 over the M pairs at once: the critic is small, and its dropout then knows no micro-batches."""
        state, config = self.state, self.config
        assert state.critic is not None and batch.image_embeds is not None and targets.residuals is not None
        state.critic_optimizer.zero_grad()
        seed = (config.seed, "dropout", state.epoch + 1, state.progress.updates, self.accelerator.process_index)
        residuals = state.critic(batch.image_embeds[rows, steps], dropout=generator_at(*seed))
        loss = objectives.critic_loss(
            residuals, targets.residuals[rows, steps], targets.returns[rows, steps], config.critic.clip_range
        ).mean()
        loss.backward()
        _add(state.progress.sums, "critic/loss", loss.detach())
        self._optimizer_step(state.critic_optimizer, config.critic.max_grad_norm)

    def _optimizer_step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        parameters = optimizer.param_groups[0]["params"]
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()


def _add(sums: TensorGroup, name: str, value: Tensor) -> None:
    sums[name] = sums.get(name, 0) + value


def _raise_to(sums: TensorGroup, name: str, value: Tensor) -> None:
    sums[name] = torch.maximum(sums.get(name, value), value)
