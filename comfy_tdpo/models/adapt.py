"""What of a network is trained, by the settings, and how the rest of it lies in memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..settings import PolicySettings
from . import Trainable
from .full import AllWeights


def adapt(network: Any, settings: PolicySettings, add_lora: Callable[[int, float], Trainable]) -> Trainable:
    """Modify a `network` of diffusers to be trained: all its weights, or the LoRA that `add_lora` adds, which is given
    rank and alpha."""
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if settings.trains_all:
        return AllWeights(network, low_precision=settings.optimizer == "adamw-8bit")
    return add_lora(settings.rank, float(settings.rank if settings.alpha is None else settings.alpha))


def lay_out(networks: Iterable[nn.Module]) -> None:
    """Lay out the weights of convolutions in the order of memory in which they are read fastest.

    In half precision on CUDA, cuDNN's kernels read the channels last, and would transpose weights and images at every
    call. On the CPU, neither order is faster (docs/LOG.md). Trained weights stay as they are saved.
    """
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and not layer.weight.requires_grad and channels_last_pays(layer.weight):
                layer.to(memory_format=torch.channels_last)


def channels_last_pays(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16)
