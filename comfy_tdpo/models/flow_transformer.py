"""What the families of transformers on flow matching share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..process.flow_schedule import PATCH, FlowSchedule
from ..settings import PolicySettings
from . import LatentDecoder, PromptEncoder, Trainable, move_to
from .adapt import adapt
from .conditioning import Conditioning
from .lora import TransformerLora


class FlowTransformer(ABC):
    """A DiffusionModel whose network is a transformer that predicts the flow.

    Args:
        transformer: of diffusers; frozen, and later modified in place.
        scheduler: its noise schedule.
        encode: prompts to conditioning; decode: latents to images.
        source: the model's name in messages.

    packing: inputs of the transformer for each channel of a latent.
    """

    process, prediction_type, patch = "flow-ddim", "flow_prediction", PATCH
    packing = 1

    def __init__(
        self, transformer: Any, scheduler: FlowSchedule, encode: PromptEncoder, decode: LatentDecoder, source: str
    ):
        self.network, self.scheduler, self.source = transformer.requires_grad_(False).eval(), scheduler, source
        self.encode, self.decode, self.channels = encode, decode, transformer.config.in_channels // self.packing
        self.networks: dict[str, nn.Module] = {"transformer": transformer} | getattr(encode, "networks", {})
        if hasattr(decode, "network"):
            self.networks["vae"] = decode.network

    @property
    def schedule(self) -> Tensor:
        return torch.tensor(self.scheduler.numbers)

    @abstractmethod
    def denoise(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor: ...

    @abstractmethod
    def lora_modules(self, targets: str) -> tuple[str, ...]:
        """The ends of the names of the layers that get a LoRA; `targets` as in the settings of the policy."""

    def adapt(self, settings: PolicySettings, seed: int) -> Trainable:
        def add_lora(rank: int, alpha: float) -> TransformerLora:
            return TransformerLora(self.network, rank, alpha, self.lora_modules(settings.targets), seed)

        return adapt(self.network, settings, add_lora)

    def to(self, device: torch.device) -> Self:
        move_to(device, self.networks)
        return self


def check_no_prediction(prediction_type: str | None, family: str) -> None:
    """Raise ValueError if a user says what a model of `family` predicts, which is always the flow."""
    if prediction_type:
        raise ValueError(
            f"prediction_type is {prediction_type!r}, and {family} predicts the flow; expected none: remove "
            "prediction_type"
        )
