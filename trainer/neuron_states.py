"""The neurons of critic and policy, epoch by epoch: how many are dormant, how many stay so, and their resets.

arXiv 2402.08552, Section 4.3 and Eq. 11-12. Shapes: N samples, T denoising steps, D embedding width, H neurons of a
layer.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from comfy_tdpo import neurons
from comfy_tdpo.neurons import HiddenLayer
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.rollout import Trajectories

from .config import TrainConfig
from .run import EpochMetrics
from .state import TrainState


@dataclass(frozen=True)
class NeuronStates:
    """Measures the neurons after the updates of an epoch, and resets them every F epochs."""

    config: TrainConfig
    state: TrainState
    accelerator: Accelerator

    @torch.no_grad()
    def of_critic(self, image_embeds: Tensor) -> EpochMetrics:
        """The critic's neurons on the embeddings of the epoch, (N, T, D)."""
        config, critic = self.config.neurons, self.state.critic
        assert critic is not None, "there are embeddings for a critic alone"
        embeds = image_embeds[:, :1] if config.data == "first-step" else image_embeds
        layers, optimizer = neurons.critic_layers(critic), self.state.critic_optimizer
        with neurons.ActivationRecorder(layers, config.activation) as recorder:
            critic(embeds.flatten(0, 1))
        metrics = self._measure("neurons", recorder, config.threshold)
        return metrics | self._reset("neurons", config.reset, layers, optimizer)

    @torch.no_grad()
    def of_policy(self, batch: Trajectories) -> EpochMetrics:
        """The LoRA's neurons on the first micro-batch of the epoch, at every step."""
        config, policy, size = self.config.neurons, self.state.policy, self.state.micro_batch
        layers, embeds = neurons.lora_layers(policy.unet), policy.encode_prompts(batch.prompts[:size])
        with neurons.ActivationRecorder(layers, config.activation) as recorder:
            for k in range(len(policy.schedule)):
                policy.step(batch.latents[:size, k], torch.full((size,), k, device=policy.device), embeds)
        metrics = self._measure("policy_neurons", recorder, config.policy_threshold)
        return metrics | self._reset("policy_neurons", config.policy_reset, layers, self.state.optimizer)

    def _measure(self, group: str, recorder: neurons.ActivationRecorder, threshold: float) -> EpochMetrics:
        """Dormant neurons now, and their overlap with those of the epoch before."""
        scores = recorder.scores(reduce=lambda mean: self.accelerator.reduce(mean, "mean"))
        active, before = neurons.active_masks(scores, threshold), self.state.active.get(group)
        self.state.active[group] = active
        metrics: EpochMetrics = {f"{group}/dormant_percent": neurons.dormant_percent(active)}
        overlap = neurons.overlap_percent(active, before) if before else None
        return metrics if overlap is None else metrics | {f"{group}/overlap_percent": overlap}

    def _reset(
        self, group: str, kind: str, layers: dict[str, HiddenLayer], optimizer: torch.optim.Optimizer
    ) -> EpochMetrics:
        epoch, count = self.state.epoch + 1, 0
        if kind != "none" and epoch % self.config.neurons.every == 0:
            masks = neurons.reset_masks(self.state.active[group], kind)
            count = neurons.reset_neurons(layers, masks, optimizer, generator_at(self.config.seed, group, epoch))
        return {f"{group}/reset_count": count}
