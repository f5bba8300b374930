"""Neuron states and resets (arXiv 2402.08552, Eq. 11-12, Section 4.3).

A neuron is one output of a hidden linear layer. Its score is the mean of |activation| over the data, divided by the
layer's mean. A neuron whose score is above a threshold is active; the others are dormant. TDPO-R resets the critic's
active neurons.

Of a policy whose weights are all trained, the neurons are the hidden ones of its transformers' feed-forward layers. A
reset takes back what they have learned: they get the base model's weights again, as a LoRA's reset takes its B to 0.

Deviations from the authors' code: overlap counts the neurons in both sets (theirs counts the mask's elements and is
always 100 %); every reset draws new random weights (theirs draws the same numbers each time); optimizer state is looked
up by parameter (theirs by position).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_z_image import FeedForward as GatedFeedForward
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models import Trainable
from .critic import TemporalCritic

# The entries of a parameter that belong to masked neurons, and what a reset gives it there: numbers drawn with this
# standard deviation, or these.
Entries = tuple[nn.Parameter, Tensor, float | Tensor]

NEURON_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "leaky_relu": F.leaky_relu}


class Neurons(Protocol):
    """One layer of neurons."""

    def watch(self, record: Callable[[Tensor], None]) -> RemovableHandle:
        """Have `record` called with the neurons' outputs, (..., H), in every forward pass."""
        ...

    def entries(self, mask: Tensor) -> Iterator[Entries]:
        """The weights of the neurons in `mask`, boolean (H,)."""
        ...


@dataclass(frozen=True)
class HiddenLayer:
    """Neurons between two linear layers, and the std that a reset gives each of these."""

    incoming: nn.Linear
    outgoing: nn.Linear
    incoming_std: float
    outgoing_std: float

    def watch(self, record: Callable[[Tensor], None]) -> RemovableHandle:
        return self.incoming.register_forward_hook(lambda _module, _inputs, output: record(output))

    def entries(self, mask: Tensor) -> Iterator[Entries]:
        yield self.incoming.weight, mask[:, None], self.incoming_std
        if self.incoming.bias is not None:
            yield self.incoming.bias, mask, 0.0
        yield self.outgoing.weight, mask[None, :], self.outgoing_std


@dataclass(frozen=True)
class TrainedLayer:
    """The hidden neurons of a transformer's feed-forward layer; base: its parameters in the base model, by name."""

    network: FeedForward
    base: dict[str, Tensor]

    def watch(self, record: Callable[[Tensor], None]) -> RemovableHandle:
        return self.network.net[0].register_forward_hook(lambda _module, _inputs, output: record(output))

    def entries(self, mask: Tensor) -> Iterator[Entries]:
        for name, parameter in self.network.named_parameters():
            if name == "net.2.weight":
                yield parameter, mask[None, :], self.base[name]
            elif name.startswith("net.0."):  # rows of the neurons, then as many of their gates if it has any
                rows = mask.repeat(len(parameter) // len(mask))
                yield parameter, rows[:, None] if parameter.ndim == 2 else rows, self.base[name]


@dataclass(frozen=True)
class TrainedGatedLayer:
    """The hidden neurons of a feed-forward layer of Z-Image, whose gates are a matrix of their own; base as above."""

    network: GatedFeedForward
    base: dict[str, Tensor]

    def watch(self, record: Callable[[Tensor], None]) -> RemovableHandle:
        return self.network.w2.register_forward_pre_hook(lambda _module, inputs: record(inputs[0]))

    def entries(self, mask: Tensor) -> Iterator[Entries]:
        for name, parameter in self.network.named_parameters():
            yield parameter, mask[None, :] if name == "w2.weight" else mask[:, None], self.base[name]


TRAINED_LAYERS: dict[type, Callable[[Any, dict[str, Tensor]], Neurons]] = {
    FeedForward: TrainedLayer,
    GatedFeedForward: TrainedGatedLayer,
}


def policy_layers(trainable: Trainable) -> Mapping[str, Neurons]:
    """The layers of neurons of what is trained, a LoRA or a whole network."""
    if not trainable.base:
        return lora_layers(trainable.network)
    layers: dict[str, Neurons] = {}
    for path, module in trainable.network.named_modules():
        if layer := TRAINED_LAYERS.get(type(module)):
            base = {name: trainable.base[f"{path}.{name}"] for name, _ in module.named_parameters()}
            layers[path] = layer(module, base)
    return layers


def critic_layers(critic: TemporalCritic) -> dict[str, HiddenLayer]:
    """The critic's hidden layers; a reset repeats its initialisation."""
    pairs = pairwise(zip(critic.layers, critic.stds, strict=True))
    return {f"layers.{i}": HiddenLayer(a, b, a_std, b_std) for i, ((a, a_std), (b, b_std)) in enumerate(pairs)}


def lora_layers(network: nn.Module, adapter: str = "default") -> dict[str, HiddenLayer]:
    """The rank-space layers of a network's LoRA; a reset repeats its initialisation: A has std 1/rank, and B = 0."""
    layers = {}
    for name, module in network.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            down, up = module.lora_A[adapter], module.lora_B[adapter]
            layers[name] = HiddenLayer(down, up, 1 / down.out_features, 0.0)
    return layers


class ActivationRecorder:
    """Sums |activation| of each layer's neurons over all forward passes inside the block."""

    def __init__(self, layers: Mapping[str, Neurons], activation: str = "relu"):
        self.layers = layers
        self.activation = NEURON_ACTIVATIONS[activation]
        self._sums: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(layers, 0)
        self._handles: list = []

    def __enter__(self) -> "ActivationRecorder":
        self._handles = [layer.watch(partial(self._add, name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, output: Tensor) -> None:
        activation = self.activation(output.detach().float()).abs().flatten(0, -2)  # (N, H)
        self._sums[name] = self._sums.get(name, 0) + activation.sum(0)
        self._counts[name] += len(activation)

    def forget(self) -> None:
        """Set all sums back to zero, as of a process that has none of the data."""
        self._sums = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        self._counts = dict.fromkeys(self._counts, 0)

    def scores(self, total: Callable[[Tensor], Tensor] = lambda own: own) -> dict[str, Tensor]:
        """Eq. 11: each neuron's mean |activation| divided by its layer's mean, (H,) per layer.

        `total` adds up a layer's sums and their count, (H + 1,), over all processes.
        """
        scores = {}
        for name, own in self._sums.items():
            sums, count = total(F.pad(own, (0, 1), value=self._counts[name])).tensor_split([-1])
            mean = sums / count
            scores[name] = mean / (mean.mean() + 1e-9)
        return scores


def active_masks(scores: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Which neurons are active, boolean (H,) per layer."""
    return {name: score > threshold for name, score in scores.items()}


def reset_masks(active: dict[str, Tensor], reset: str) -> dict[str, Tensor]:
    """Which neurons a reset of kind `reset` affects, boolean (H,) per layer."""
    choose = {
        "none": torch.zeros_like,
        "active": torch.Tensor.clone,
        "dormant": torch.logical_not,
        "all": torch.ones_like,
    }[reset]
    return {name: choose(mask) for name, mask in active.items()}


def dormant_percent(active: dict[str, Tensor]) -> float:
    """The percentage of neurons that are dormant."""
    mask = _concatenate(active)
    return 100 * (~mask).float().mean().item()


def overlap_percent(active: dict[str, Tensor], before: dict[str, Tensor]) -> float | None:
    """Eq. 12: |dormant now and before| / min(|now|, |before|) in percent; None if either set is empty."""
    now, then = ~_concatenate(active), ~_concatenate({name: before[name] for name in active})
    smaller = min(now.sum().item(), then.sum().item())
    return 100 * (now & then).sum().item() / smaller if smaller else None


def affected(layers: Mapping[str, Neurons], masks: dict[str, Tensor]) -> Iterator[Entries]:
    """The weights of the masked neurons of all layers."""
    for name, layer in layers.items():
        yield from layer.entries(masks[name])


@torch.no_grad()
def reset_neurons(
    layers: Mapping[str, Neurons],
    masks: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Reinitialise the masked neurons, zero their Adam moments, and return how many neurons were reset.

    For each masked neuron this covers its incoming weights and bias, its outgoing column, and the moments of exactly
    those entries.
    """
    for parameter, mask, fresh in affected(layers, masks):
        if not isinstance(fresh, Tensor):
            fresh = fresh * torch.randn(parameter.shape, generator=generator)
        _replace(parameter, mask, fresh, optimizer)
    return int(sum(masks[name].sum().item() for name in layers))


def _replace(parameter: nn.Parameter, mask: Tensor, fresh: Tensor, optimizer: torch.optim.Optimizer) -> None:
    parameter.copy_(torch.where(mask, fresh.to(parameter), parameter))
    state = optimizer.state.get(parameter, {})
    for moment in ("exp_avg", "exp_avg_sq"):
        if moment in state:
            low = state[moment].element_size() == 1  # float8, of which torch fills nothing; all bits 0 are 0
            (state[moment].view(torch.uint8) if low else state[moment]).masked_fill_(mask, 0)


def _concatenate(masks: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(masks.values()))
