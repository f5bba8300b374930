"""The policy: a latent diffusion model whose denoising steps are Gaussian and whose LoRA is trained.

Shapes: B batch, C H W latent, L tokens, E text width.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .diffusion import Schedule, guide, make_schedule, step_distribution
from .lora import add_lora, named_lora_parameters

if TYPE_CHECKING:
    from .models.components import Components

PromptEncoder = Callable[[list[str]], Tensor]  # prompts -> (B, L, E), on the policy's device


class LatentDecoder(Protocol):
    """From latents to pixels, `factor` of them a side for one element of a latent."""

    factor: int

    def __call__(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], float32 (B, 3, h, w), of scaled latents (B, C, H, W), noisy or clean."""
        ...


class ClipText:
    """A PromptEncoder: the last hidden state of a CLIP text model, every prompt padded to its full length."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel):
        self.tokenizer, self.network = tokenizer, text_encoder
        self.length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)

    def __call__(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        return self.network(input_ids=tokens.input_ids.to(self.network.device)).last_hidden_state


class Autoencoder:
    """A LatentDecoder: diffusers' KL autoencoder."""

    def __init__(self, vae: AutoencoderKL):
        self.network, self.factor = vae, 2 ** (len(vae.config.block_out_channels) - 1)

    def __call__(self, latents: Tensor) -> Tensor:
        vae = self.network
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


class DiffusionPolicy:
    """p_theta(x_{k+1} | x_k, c) of Eq. 2, with guidance as a part of it.

    Sampling and training call the same `step`, so that the ratio of a fresh sample is 1.

    Args:
        unet: taken over: it goes to `device` and gets the adapters; scheduler: its noise schedule.
        encode, decode: prompts to embeddings, latents to images, both on `device`.
        source: what the model is called in messages.
        steps: denoising steps T; guidance: classifier-free guidance scale (1: none); resolution: pixels a side.
        rank, alpha, targets, seed: of the LoRA, see `lora.add_lora`.
        device: where it runs; autocast: the dtype of the U-Net's arithmetic, or None for that of its weights.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        encode: PromptEncoder,
        decode: LatentDecoder,
        *,
        source: str,
        steps: int,
        guidance: float,
        resolution: int,
        rank: int,
        alpha: float | None = None,
        targets: str = "attention",
        seed: int = 42,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ):
        self.device, self.guidance, self.autocast = torch.device(device), guidance, autocast
        self.source, self.alpha = source, float(rank if alpha is None else alpha)
        self.scheduler, self.prompt_encoder, self.latent_decoder = scheduler, encode, decode
        self.unet = unet.requires_grad_(False).eval().to(self.device)
        add_lora(self.unet, rank, self.alpha, targets, seed)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.named_parameters = named_lora_parameters(self.unet)
        self.parameters = list(self.named_parameters.values())
        self.schedule = self._make_schedule(scheduler, steps)
        self.latent_shape = self._latent_shape(resolution)
        self._prompt_embeds: dict[str, Tensor] = {}

    @classmethod
    def from_components(
        cls, components: "Components", device: torch.device | str = "cpu", **settings
    ) -> "DiffusionPolicy":
        """The policy of a loaded model, which is taken over; `settings` are those of the class."""
        for network in (components.vae, components.text_encoder):
            network.requires_grad_(False).eval().to(device)
        return cls(
            components.unet,
            components.scheduler,
            ClipText(components.tokenizer, components.text_encoder),
            Autoencoder(components.vae),
            source=components.source,
            device=device,
            **settings,
        )

    def _make_schedule(self, scheduler: DDIMScheduler, steps: int) -> Schedule:
        schedule = make_schedule(scheduler, steps, self.device)
        if schedule.sigma.min() <= 0:
            position = int(schedule.sigma.argmin())
            config = scheduler.config
            remedy = f"choose at most {config.num_train_timesteps // 2} steps"
            if config.timestep_spacing == "leading" and config.steps_offset == 0:
                remedy = f"set steps_offset to 1 in {self.source}'s scheduler_config.json (it is 0)"
            raise ValueError(
                f"got a schedule whose step {position + 1} of {steps} has no noise, so that its log-probability does "
                f"not exist; expected sigma > 0 everywhere: {remedy}"
            )
        return schedule

    def _latent_shape(self, resolution: int) -> tuple[int, int, int]:
        factor = self.latent_decoder.factor
        if resolution <= 0 or resolution % factor:
            raise ValueError(f"got resolution {resolution}; expected a positive multiple of {factor} pixels")
        return self.unet.config.in_channels, resolution // factor, resolution // factor

    @property
    def latent_size(self) -> int:
        """C * H * W."""
        channels, height, width = self.latent_shape
        return channels * height * width

    def fingerprint(self) -> str:
        """Tells the base model from others: the SHA-256 of its weights, and of the noise schedule to five digits."""
        networks = [self.unet, *(getattr(part, "network", None) for part in (self.prompt_encoder, self.latent_decoder))]
        digest = hashlib.sha256(self.scheduler.config.prediction_type.encode())
        digest.update(self.scheduler.alphas_cumprod.cpu().double().numpy().round(5).tobytes())
        for network in networks:
            for name, weight in network.named_parameters() if network is not None else ():
                if not weight.requires_grad:  # those that do are the adapters
                    digest.update(name.encode())
                    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Text embeddings, (B, L, E); each prompt is encoded once in the policy's life."""
        for prompt in set(prompts) - self._prompt_embeds.keys():
            self._prompt_embeds[prompt] = self.prompt_encoder([prompt])[0]
        return torch.stack([self._prompt_embeds[prompt] for prompt in prompts])

    def step(self, latents: Tensor, positions: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, (B, C, H, W), and standard deviation, (B, 1, 1, 1), of x_{k+1}, float32.

        Args:
            latents: x_k, (B, C, H, W); positions: k, int64 (B,); prompt_embeds: (B, L, E).
        """
        timesteps = self.schedule.timesteps[positions]
        output = self._predict(latents, timesteps, prompt_embeds)
        return step_distribution(output, latents, positions, self.schedule)

    def _predict(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        if self.guidance == 1:
            return self._unet_output(latents, timesteps, prompt_embeds)
        empty = self.encode_prompts([""]).expand_as(prompt_embeds)
        output = self._unet_output(
            torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), torch.cat([empty, prompt_embeds])
        )
        unconditional, conditional = output.float().chunk(2)
        return guide(unconditional, conditional, self.guidance)

    def _unet_output(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.unet(latents.to(self.unet.dtype), timesteps, prompt_embeds, return_dict=False)[0]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block the policy is the frozen base model: the adapters are off."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    @torch.no_grad()
    def decode(self, latents: Tensor, image_size: int | None = None) -> Tensor:
        """Images in [0, 1], float32 (B, 3, h, w), of scaled latents (B, C, H, W), noisy or clean.

        With `image_size` the latents are averaged down first, so that the image comes out at about that many pixels.
        """
        if image_size is not None:
            size = max(1, min(image_size // self.latent_decoder.factor, self.latent_shape[-1]))
            latents = F.adaptive_avg_pool2d(latents, size)
        return self.latent_decoder(latents)
