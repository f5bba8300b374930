"""The neurons of the critic and the policy, epoch by epoch: how many are dormant, how many stay dormant, and resets.

arXiv 2402.08552, Section 4.3 and Eq. 11-12. Shapes: N samples in this process, B in all of them, T denoising steps, D
width of the critic's input, H neurons of a layer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..randomness import generator_at
from ..rollout import Trajectories
from ..swapping import brought
from . import Metrics, TensorGroup, neurons
from .context import Context
from .critic_training import CriticTraining

BATCHES = 4  # in which the authors draw an epoch's samples


class NeuronStates:
    """Measures the neurons after the updates of an epoch, and resets them every F epochs.

    active: the previous epoch's masks, (H,) per layer, of the critic ("neurons") and the policy ("policy_neurons").
    """

    def __init__(self, context: Context, critic: CriticTraining | None):
        self.context, self.config, self.critic = context, context.config.neurons, critic
        self.active: dict[str, TensorGroup] = {}

    def of_critic(self, inputs: Tensor, last: tuple[Tensor, Tensor]) -> Metrics:
        """Measure and reset the critic's neurons, on the epoch's inputs, (N, T, D).

        last: the samples of all processes in the order of the epoch's updates, and the step on which each was last
            trained, int64 (B,).
        """
        assert self.critic is not None, "there are embeddings only if there is a critic"
        layers = neurons.critic_layers(self.critic.network)
        with neurons.ActivationRecorder(layers, self.config.activation) as recorder:
            self.critic.network(self._data(inputs, *last))
        scores = self._scores(recorder)
        metrics = self._measure("neurons", scores, self.config.threshold)
        masks = self._to_reset("neurons", self.config.reset)
        self.context.record(self.context.epoch + 1, scores, masks)
        return metrics | self._reset("neurons", masks, layers, self.critic.optimizer)

    def _data(self, inputs: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
        """The inputs, (M, D), on which the critic's neurons are scored.

        "batch" is the authors' choice: the first of an epoch's four sampling batches, after its samples and the steps
        of each were shuffled for the updates, at the last position. That is a quarter of the samples; if steps are
        shuffled, each sample has a step of its own. The micro-batch, which depends on memory, plays no part.
        """
        if self.config.data == "batch":
            size, epoch = max(1, len(rows) // BATCHES), self.context.epoch + 1
            mine = torch.isin(rows[:size], self.context.rows(epoch))
            return inputs[self.context.local(rows[:size][mine], epoch), steps[:size][mine]]
        return (inputs[:, :1] if self.config.data == "first-step" else inputs).flatten(0, 1)

    def of_policy(self, batch: Trajectories) -> Metrics:
        """Measure and reset the policy's neurons, on the first of BATCHES parts of the epoch's samples, at every step.

        The micro-batch only decides how many of these rows are in one forward pass.
        """
        policy, size = self.context.policy, self.context.micro_batch
        layers, samples = neurons.policy_layers(policy.trainable), self.context.config.samples_per_epoch
        first = self.context.rows(self.context.epoch + 1) < max(1, samples // BATCHES)
        mine = int(first.sum())  # own samples are in order
        count = max(1, mine)  # the layers' sizes are seen in a forward pass
        with policy.uncompiled(), neurons.ActivationRecorder(layers, self.config.activation) as recorder:
            for begin in range(0, count, size):
                rows = slice(begin, min(begin + size, count))
                latents = brought(batch.latents[rows], policy.device)
                conditioning = policy.encode_prompts(batch.prompts[rows])
                for k in range(len(policy.process)):
                    positions = torch.full((len(latents),), k, device=policy.device)
                    policy.step(latents[:, k], positions, conditioning)
        if not mine:
            recorder.forget()
        metrics = self._measure("policy_neurons", self._scores(recorder), self.config.policy_threshold)
        masks = self._to_reset("policy_neurons", self.config.policy_reset)
        self.context.record_policy(self.context.epoch + 1, self.active["policy_neurons"], masks)
        metrics |= self._reset("policy_neurons", masks, layers, self.context.optimizer)
        if masks and policy.average:  # a mean over the old neuron and the new one would be neither
            for parameter, mask, _ in neurons.affected(layers, masks):
                policy.average.restart(parameter, mask)
        return metrics

    def _scores(self, recorder: neurons.ActivationRecorder) -> TensorGroup:
        return recorder.scores(total=self.context.processes.add_up)

    def _measure(self, group: str, scores: TensorGroup, threshold: float) -> Metrics:
        """The percentage of dormant neurons, and their overlap with those of the previous epoch."""
        active, before = neurons.active_masks(scores, threshold), self.active.get(group)
        self.active[group] = active
        metrics: Metrics = {f"{group}/dormant_percent": neurons.dormant_percent(active)}
        overlap = neurons.overlap_percent(active, before) if before else None
        return metrics if overlap is None else metrics | {f"{group}/overlap_percent": overlap}

    def _to_reset(self, group: str, kind: str) -> TensorGroup:
        """Which neurons are reset in this epoch, (H,) per layer; empty if no reset is due."""
        due = kind != "none" and (self.context.epoch + 1) % self.config.every == 0
        return neurons.reset_masks(self.active[group], kind) if due else {}

    def _reset(
        self,
        group: str,
        masks: TensorGroup,
        layers: Mapping[str, neurons.Neurons],
        optimizer: torch.optim.Optimizer,
    ) -> Metrics:
        draw = generator_at(self.context.config.seed, group, self.context.epoch + 1)
        count = neurons.reset_neurons(layers, masks, optimizer, draw) if masks else 0
        return {f"{group}/reset_count": count}
