"""The family of Stable Diffusion: 1.x and 2.x, a U-Net conditioned on CLIP's last hidden states, and XL, whose U-Net is
conditioned on two CLIPs' states, on the pooled state of one of them, and on the size of the image.

Shapes: B batch, C H W latent, L tokens, E text width, P pooled width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..prompts.length import describe_cut, too_long
from ..settings import PolicySettings
from . import LatentDecoder, Outline, PromptEncoder, Trainable, move_to
from .adapt import adapt
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
        return TensorConditioning(states=self.outputs(prompts).last_hidden_state)

    def outputs(self, prompts: list[str], hidden_states: bool = False) -> Any:
        """What the text model returns, with the states after every layer if asked for."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        return self.network(input_ids=tokens.input_ids.to(self.network.device), output_hidden_states=hidden_states)

    def cut(self, prompts: list[str]) -> str:
        """One line about those of `prompts` that it truncates; empty if there are none."""
        found = too_long(self.tokenizer, prompts, self.length)
        return describe_cut(found) if found else ""


class ClipPair:
    """A PromptEncoder of XL: the last but one states of two CLIP text models side by side, (B, L, E), and the pooled
    and projected state of the second, (B, P). The empty prompt is encoded like any other, as in ComfyUI."""

    def __init__(self, first: ClipText, second: ClipText):
        self.first, self.second = first, second
        self.networks = {"text_encoder": first.network, "text_encoder_2": second.network}

    def __call__(self, prompts: list[str]) -> TensorConditioning:
        first, second = (text.outputs(prompts, hidden_states=True) for text in (self.first, self.second))
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return TensorConditioning(states=states, pooled=second.text_embeds)

    def cut(self, prompts: list[str]) -> str:
        return self.first.cut(prompts)


class Autoencoder:
    """A LatentDecoder: diffusers' KL autoencoder."""

    def __init__(self, vae: AutoencoderKL):
        self.network, self.factor = vae, 2 ** (len(vae.config.block_out_channels) - 1)

    def __call__(self, latents: Tensor) -> Tensor:
        vae = self.network
        unscaled = latents / vae.config.scaling_factor
        if vae.config.shift_factor is not None:
            unscaled = unscaled + vae.config.shift_factor
        pixels = vae.decode(unscaled.to(vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


class StableDiffusion:
    """A DiffusionModel of Stable Diffusion 1.x, 2.x or XL.

    Args:
        unet: frozen, and later modified in place; scheduler: its noise schedule.
        encode: prompts to states, (B, L, E), and for XL pooled, (B, P); decode: latents to images.
        source: the model's name in messages.
    """

    process, patch = "ddim", 1

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
        } | getattr(encode, "networks", {})

    @property
    def schedule(self) -> Tensor:
        """alpha_bar of every training timestep."""
        return self.scheduler.alphas_cumprod

    @classmethod
    def from_components(cls, components: Components) -> StableDiffusion:
        """The model made of `components`, which are frozen and used without a copy."""
        encode: PromptEncoder
        encode = first = ClipText(components.tokenizer, components.text_encoder)
        if components.text_encoder_2 is not None:
            encode = ClipPair(first, ClipText(components.tokenizer_2, components.text_encoder_2))
        for network in (components.vae, components.text_encoder, components.text_encoder_2):
            if network is not None:
                network.requires_grad_(False).eval()
        vae = components.vae
        if components.text_encoder_2 is not None and vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.float()  # the published autoencoder of XL overflows in float16
        return cls(components.unet, components.scheduler, encode, Autoencoder(vae), components.source)

    def denoise(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, TensorConditioning)
        states, pooled = conditioning.parts["states"], conditioning.parts.get("pooled")
        more = None if pooled is None else {"text_embeds": pooled, "time_ids": self._sizes(latents)}
        x = latents.to(self.network.dtype)
        return self.network(x, times, states, added_cond_kwargs=more, return_dict=False)[0]

    def _sizes(self, latents: Tensor) -> Tensor:
        """XL's conditioning on sizes, (B, 6): the image's original height and width, no crop, its height and width."""
        sizes = latents.new_zeros(len(latents), 6, dtype=torch.float32)
        height, width = (self.decode.factor * side for side in latents.shape[-2:])
        sizes[:, 0::4], sizes[:, 1::4] = height, width
        return sizes

    def adapt(self, settings: PolicySettings, seed: int) -> Trainable:
        def add_lora(rank: int, alpha: float) -> UNetLora:
            return UNetLora(self.network, rank, alpha, settings.targets, seed)

        return adapt(self.network, settings, add_lora)

    def to(self, device: torch.device) -> StableDiffusion:
        move_to(device, self.networks)
        return self


class StableDiffusionFamily:
    """Loads a diffusers folder, a .safetensors checkpoint, or a hub id."""

    def recognizes(self, source: str) -> bool:
        return True  # `load` raises an error for what it cannot load

    def outline(self, source: str, prediction_type: str | None) -> Outline:
        from .components import outline
        from .diffusers_folder import latent_factor

        scheduler, configs = outline(source, prediction_type)
        return Outline(scheduler, StableDiffusion.process, latent_factor(configs), StableDiffusion.patch, configs)

    def load(self, source: str, dtype: torch.dtype, prediction_type: str | None) -> StableDiffusion:
        from .components import load_components

        return StableDiffusion.from_components(load_components(source, dtype, prediction_type))


FAMILY = StableDiffusionFamily()
