"""The neurons of critic and policy, epoch by epoch: how many are dormant, how many stay so, and their resets.

The critic's are recorded one by one too, in the run's folder.

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
from .neuron_log import append_neurons
from .run import EpochMetrics, RunFolder
from .state import TrainState

PerLayer = dict[str, Tensor]  # (H,) each


@dataclass(frozen=True)
class NeuronStates:
    """Measures the neurons after the updates of an epoch, and resets them every F epochs."""

    config: TrainConfig
    state: TrainState
    accelerator: Accelerator
    run: RunFolder

    @torch.no_grad()
    def of_critic(self, image_embeds: Tensor) -> EpochMetrics:
        """The critic's neurons on the embeddings of the epoch, (N, T, D)."""
        config, critic = self.config.neurons, self.state.critic
        assert critic is not None, "there are embeddings for a critic alone"
        embeds = image_embeds[:, :1] if config.data == "first-step" else image_embeds
        layers, optimizer = neurons.critic_layers(critic), self.state.critic_optimizer
        with neurons.ActivationRecorder(layers, config.activation) as recorder:
            critic(embeds.flatten(0, 1))
        scores = self._scores(recorder)
        metrics = self._measure("neurons", scores, config.threshold)
        masks = self._to_reset("neurons", config.reset)
        if self.accelerator.is_main_process:
            append_neurons(self.run.path, self.state.epoch + 1, scores, masks)
        return metrics | self._reset("neurons", masks, layers, optimizer)

    @torch.no_grad()
    def of_policy(self, batch: Trajectories) -> EpochMetrics:
        """The LoRA's neurons on the first micro-batch of the epoch, at every step."""
        config, policy, size = self.config.neurons, self.state.policy, self.state.micro_batch
        layers, embeds = neurons.lora_layers(policy.unet), policy.encode_prompts(batch.prompts[:size])
        with neurons.ActivationRecorder(layers, config.activation) as recorder:
            for k in range(len(policy.schedule)):
                policy.step(batch.latents[:size, k], torch.full((size,), k, device=policy.device), embeds)
        metrics = self._measure("policy_neurons", self._scores(recorder), config.policy_threshold)
        masks = self._to_reset("policy_neurons", config.policy_reset)
        return metrics | self._reset("policy_neurons", masks, layers, self.state.optimizer)

    def _scores(self, recorder: neurons.ActivationRecorder) -> PerLayer:
        return recorder.scores(reduce=lambda mean: self.accelerator.reduce(mean, "mean"))

    def _measure(self, group: str, scores: PerLayer, threshold: float) -> EpochMetrics:
        """Dormant neurons now, and their overlap with those of the epoch before."""
        active, before = neurons.active_masks(scores, threshold), self.state.active.get(group)
        self.state.active[group] = active
        metrics: EpochMetrics = {f"{group}/dormant_percent": neurons.dormant_percent(active)}
        overlap = neurons.overlap_percent(active, before) if before else None
        return metrics if overlap is None else metrics | {f"{group}/overlap_percent": overlap}

    def _to_reset(self, group: str, kind: str) -> PerLayer:
        """Which neurons are reset in this epoch, (H,) per layer; nothing where no reset is due."""
        due = kind != "none" and (self.state.epoch + 1) % self.config.neurons.every == 0
        return neurons.reset_masks(self.state.active[group], kind) if due else {}

    def _reset(
        self, group: str, masks: PerLayer, layers: dict[str, HiddenLayer], optimizer: torch.optim.Optimizer
    ) -> EpochMetrics:
        draw = generator_at(self.config.seed, group, self.state.epoch + 1)
        count = neurons.reset_neurons(layers, masks, optimizer, draw) if masks else 0
        return {f"{group}/reset_count": count}
