"""Which decoder decodes the latents that the critic reads. Cheap to import, since settings are checked with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..shapes import TINY_DECODER
from .encoder import is_model_of_shapes

if TYPE_CHECKING:
    from ..models.tiny_decoder import TinyDecoder
    from ..policy import DiffusionPolicy
    from .sections import CriticSettings

FULL, TINY = "full", "tiny"  # the model's own decoder, and the tiny one that ships for Shapes


def decoder_file(critic: CriticSettings) -> Path | None:
    """The file of the critic's own decoder; None if it uses the model's, or sees no images."""
    if critic.decoder == FULL or not critic.sees_images:
        return None
    return TINY_DECODER if critic.decoder == TINY else Path(critic.decoder)


def check_decoder(critic: CriticSettings, model: str) -> None:
    """Raise ValueError if the critic is to use the decoder of Shapes with the latents of another model."""
    if critic.decoder == TINY and critic.sees_images and not is_model_of_shapes(model):
        raise ValueError(
            f"critic.decoder is tiny, which ships for Shapes only, but the model is {model!r}; set it to the file of a "
            "tiny decoder for this model, such as taesd_decoder.safetensors for Stable Diffusion 1.x, or to full"
        )


def load_decoder(critic: CriticSettings, policy: DiffusionPolicy) -> TinyDecoder | None:
    """The critic's own decoder, on the policy's device and in the precision of its arithmetic; None without one.

    Raises:
        ValueError: it cannot be loaded, or is for other latents than the model's.
    """
    file = decoder_file(critic)
    if file is None:
        return None
    import torch

    from ..models.adapt import lay_out
    from ..models.tiny_decoder import check_tiny_decoder, load_tiny_decoder

    decoder = load_tiny_decoder(file, policy.autocast or torch.float32)
    check_tiny_decoder(decoder, file, policy.model.channels, policy.model.decode.factor)
    lay_out([decoder.network.to(policy.device)])
    return decoder
