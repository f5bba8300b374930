"""What of a network is trained, by the settings."""

from collections.abc import Callable
from typing import Any

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
