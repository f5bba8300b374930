"""Model families: what loads, conditions, denoises, is trained and exported; and their registry.

Shapes: B batch, C H W latent, h w image.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..registry import look_up

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .conditioning import Conditioning

# On the model's device. One that reads only so much of a prompt has a method `cut`, see `describe_unread`.
PromptEncoder = Callable[[list[str]], "Conditioning"]


class LatentDecoder(Protocol):
    """From latents to pixels, `factor` of them a side for one element of a latent."""

    factor: int

    def __call__(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], float32 (B, 3, h, w), of scaled latents (B, C, H, W), noisy or clean."""
        ...


class Trainable(Protocol):
    """What of a network is trained, and how it is kept.

    network: the module whose forward it changes; parameters: by name, float32, the only ones that need gradients.
    """

    network: nn.Module
    parameters: dict[str, nn.Parameter]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave; ValueError where that was of something else."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block the network is the base model, untrained and without gradients."""
        ...

    def export(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the file that other tools load; `metadata` goes into its header."""
        ...


class DiffusionModel(Protocol):
    """A loaded model of one family, frozen and in evaluation mode.

    source: what it is called in messages; network: the one that denoises; networks: all of them, by name.
    channels: C; prediction_type: what the network's output is.
    scheduler: its noise schedule, for a process; schedule: (S,) numbers that tell that schedule from others.
    process: the name of the process it is sampled by unless another is asked for.
    """

    source: str
    network: nn.Module
    networks: dict[str, nn.Module]
    channels: int
    prediction_type: str
    scheduler: Any
    process: str
    encode: PromptEncoder
    decode: LatentDecoder

    @property
    def schedule(self) -> Tensor: ...

    def denoise(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output, (B, C, H, W), for latents x_k at the process's times, (B,); it knows no guidance."""
        ...

    def adapt(self, rank: int, alpha: float, targets: str, seed: int) -> Trainable:
        """Put LoRA adapters on the network; see the family for the names of `targets`."""
        ...

    def to(self, device: torch.device) -> Self:
        """Move all of it, in place."""
        ...


class Family(Protocol):
    """Loads models of one kind."""

    def recognizes(self, source: str) -> bool:
        """Whether `source`, as a user names a model, is of this family; cheap, and never raises."""
        ...

    def load(self, source: str, dtype: torch.dtype, prediction_type: str | None) -> DiffusionModel:
        """The model on the CPU with its weights in `dtype`; ValueError where it cannot be had."""
        ...


# name -> "module:attribute", where the attribute is a Family. The first that recognizes a source loads it; the last
# one takes everything, and says what is expected where it cannot load it.
FAMILIES = {"stable-diffusion": "comfy_tdpo.models.stable_diffusion:FAMILY"}


def describe_unread(model: DiffusionModel, prompts: list[str]) -> str:
    """One line for a user about those of `prompts` that the model would not read to their end; empty where it does."""
    cut: Callable[[list[str]], str] | None = getattr(model.encode, "cut", None)
    return cut(prompts) if cut else ""


def load_model(source: str, dtype: torch.dtype, prediction_type: str | None = None) -> DiffusionModel:
    """The model that a user calls `source`: a folder, a file or a hub id.

    Args:
        prediction_type: "epsilon", "v_prediction" or "sample", where the model itself says nothing or is wrong.

    Raises:
        ValueError: it cannot be had, or is of no family that is known here.
    """
    families: list[Family] = [look_up(place) for place in FAMILIES.values()]
    family = next(family for family in families if family.recognizes(source))
    return family.load(source, dtype, prediction_type)
