"""The family of Stable Diffusion 1.x and 2.x: a U-Net conditioned on CLIP's last hidden states.

Shapes: B batch, C H W latent, L tokens, E text width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..prompts.length import describe_cut, too_long
from ..settings import PolicySettings
from . import LatentDecoder, PromptEncoder
from .conditioning import Conditioning, TensorConditioning
from .lora import UNetLora

if TYPE_CHECKING:
    from .components import Components


class ClipText:
    """A PromptEncoder: the last hidden state of a CLIP text model, with every prompt padded to the full length."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel):
        self.tokenizer, self.network = tokenizer, text_encoder
        self.length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)

    def __call__(self, prompts: list[str]) -> TensorConditioning:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        return TensorConditioning(
            states=self.network(input_ids=tokens.input_ids.to(self.network.device)).last_hidden_state
        )

    def cut(self, prompts: list[str]) -> str:
        """One line about those of `prompts` that it truncates; empty if there are none."""
        found = too_long(self.tokenizer, prompts, self.length)
        return describe_cut(found) if found else ""


class Autoencoder:
    """A LatentDecoder: diffusers' KL autoencoder."""

    def __init__(self, vae: AutoencoderKL):
        self.network, self.factor = vae, 2 ** (len(vae.config.block_out_channels) - 1)

    def __call__(self, latents: Tensor) -> Tensor:
        vae = self.network
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


class StableDiffusion:
    """A DiffusionModel of Stable Diffusion 1.x or 2.x.

    Args:
        unet: frozen, and later modified in place; scheduler: its noise schedule.
        encode: prompts to states, (B, L, E); decode: latents to images.
        source: the model's name in messages.
    """

    process = "ddim"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        encode: PromptEncoder,
        decode: LatentDecoder,
        source: str,
    ):
        self.network, self.scheduler, self.source = unet.requires_grad_(False).eval(), scheduler, source
        self.encode, self.decode = encode, decode
        self.channels, self.prediction_type = unet.config.in_channels, scheduler.config.prediction_type
        parts = {"unet": self, "text_encoder": encode, "vae": decode}
        self.networks: dict[str, nn.Module] = {
            name: part.network for name, part in parts.items() if hasattr(part, "network")
        }

    @property
    def schedule(self) -> Tensor:
        """alpha_bar of every training timestep."""
        return self.scheduler.alphas_cumprod

    @classmethod
    def from_components(cls, components: Components) -> StableDiffusion:
        """The model made of `components`, which are frozen and used without a copy."""
        for network in (components.vae, components.text_encoder):
            network.requires_grad_(False).eval()
        encode = ClipText(components.tokenizer, components.text_encoder)
        return cls(components.unet, components.scheduler, encode, Autoencoder(components.vae), components.source)

    def denoise(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, TensorConditioning)
        states = conditioning.parts["states"]
        return self.network(latents.to(self.network.dtype), times, states, return_dict=False)[0]

    def adapt(self, settings: PolicySettings, seed: int) -> UNetLora:
        if settings.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        alpha = float(settings.rank if settings.alpha is None else settings.alpha)
        return UNetLora(self.network, settings.rank, alpha, settings.targets, seed)

    def to(self, device: torch.device) -> StableDiffusion:
        for network in self.networks.values():
            network.to(device)
        return self


class StableDiffusionFamily:
    """Loads a diffusers folder, a .safetensors checkpoint, or a hub id."""

    def recognizes(self, source: str) -> bool:
        return True  # `load` raises an error for what it cannot load

    def load(self, source: str, dtype: torch.dtype, prediction_type: str | None) -> StableDiffusion:
        from .components import load_components

        return StableDiffusion.from_components(load_components(source, dtype, prediction_type))


FAMILY = StableDiffusionFamily()
