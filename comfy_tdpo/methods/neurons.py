"""Neuron states and resets (arXiv 2402.08552, Eq. 11-12, Section 4.3).

A neuron is one output of a hidden linear layer. Its score is the mean of |activation| over the data, divided by the
layer's mean. A neuron whose score is above a threshold is active; the others are dormant. TDPO-R resets the critic's
active neurons.

Deviations from the authors' code: overlap counts the neurons in both sets (theirs counts the mask's elements and is
always 100 %); every reset draws new random weights (theirs draws the same numbers each time); optimizer state is looked
up by parameter (theirs by position).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .critic import TemporalCritic

NEURON_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "leaky_relu": F.leaky_relu}


@dataclass(frozen=True)
class HiddenLayer:
    """One layer of neurons: the linear layers before and after it, and the std that a reset gives each."""

    incoming: nn.Linear
    outgoing: nn.Linear
    incoming_std: float
    outgoing_std: float


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

    def __init__(self, layers: dict[str, HiddenLayer], activation: str = "relu"):
        self.layers = layers
        self.activation = NEURON_ACTIVATIONS[activation]
        self._sums: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(layers, 0)
        self._handles: list = []

    def __enter__(self) -> "ActivationRecorder":
        self._handles = [layer.incoming.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable:
        def add(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            activation = self.activation(output.detach().float()).abs().flatten(0, -2)  # (N, H)
            self._sums[name] = self._sums.get(name, 0) + activation.sum(0)
            self._counts[name] += len(activation)

        return add

    def scores(self, reduce: Callable[[Tensor], Tensor] = lambda mean: mean) -> dict[str, Tensor]:
        """Eq. 11: each neuron's mean |activation| divided by its layer's mean, (H,) per layer.

        `reduce` averages a layer's means, (H,), over all processes.
        """
        means = {name: reduce(total / self._counts[name]) for name, total in self._sums.items()}
        return {name: mean / (mean.mean() + 1e-9) for name, mean in means.items()}


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


def affected(layers: dict[str, HiddenLayer], masks: dict[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
    """The weights of the masked neurons: each parameter, which of its entries, and the std that a reset gives them."""
    for name, layer in layers.items():
        mask = masks[name]
        yield layer.incoming.weight, mask[:, None], layer.incoming_std
        if layer.incoming.bias is not None:
            yield layer.incoming.bias, mask, 0.0
        yield layer.outgoing.weight, mask[None, :], layer.outgoing_std


@torch.no_grad()
def reset_neurons(
    layers: dict[str, HiddenLayer],
    masks: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Reinitialise the masked neurons, zero their Adam moments, and return how many neurons were reset.

    For each masked neuron this covers its incoming weights and bias, its outgoing column, and the moments of exactly
    those entries.
    """
    for parameter, mask, std in affected(layers, masks):
        _redraw(parameter, mask, std, optimizer, generator)
    return int(sum(masks[name].sum().item() for name in layers))


def _redraw(
    parameter: nn.Parameter,
    mask: Tensor,
    std: float,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    fresh = std * torch.randn(parameter.shape, generator=generator)
    parameter.copy_(torch.where(mask, fresh.to(parameter), parameter))
    state = optimizer.state.get(parameter, {})
    for moment in ("exp_avg", "exp_avg_sq"):
        if moment in state:
            state[moment].masked_fill_(mask, 0.0)


def _concatenate(masks: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(masks.values()))
