"""The policy: a latent diffusion model whose denoising steps are Gaussian and whose LoRA is trained.

Shapes: B batch, C H W latent, L tokens, E text width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .diffusion import Schedule, guide, make_schedule, step_distribution
from .lora import add_lora, named_lora_parameters

if TYPE_CHECKING:
    from .loading import Components


class DiffusionPolicy:
    """p_theta(x_{k+1} | x_k, c) of Eq. 2, with guidance as a part of it.

    Sampling and training call the same `step`, so that the ratio of a fresh sample is 1.

    It takes the components over: they go to its device, and the U-Net gets the adapters.

    Args:
        components: U-Net, autoencoder, text encoder, tokenizer and scheduler of one model.
        steps: denoising steps T; guidance: classifier-free guidance scale (1: none); resolution: pixels a side.
        rank, alpha, targets, seed: of the LoRA, see `lora.add_lora`.
        device: where it runs; autocast: the dtype of the U-Net's arithmetic, or None for that of its weights.
    """

    def __init__(
        self,
        components: "Components",
        *,
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
        self.source, self.alpha = components.source, float(rank if alpha is None else alpha)
        self.tokenizer = components.tokenizer
        self.unet = components.unet.requires_grad_(False).eval().to(self.device)
        self.vae = components.vae.requires_grad_(False).eval().to(self.device)
        self.text_encoder = components.text_encoder.requires_grad_(False).eval().to(self.device)
        add_lora(self.unet, rank, self.alpha, targets, seed)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.named_parameters = named_lora_parameters(self.unet)
        self.parameters = list(self.named_parameters.values())
        self.schedule = self._make_schedule(components, steps)
        self.latent_shape = self._latent_shape(resolution)
        self._prompt_embeds: dict[str, Tensor] = {}

    def _make_schedule(self, components: "Components", steps: int) -> Schedule:
        schedule = make_schedule(components.scheduler, steps, self.device)
        if schedule.sigma.min() <= 0:
            position = int(schedule.sigma.argmin())
            raise ValueError(
                f"got a schedule whose step {position + 1} of {steps} has no noise, so that its log-probability does "
                f"not exist; expected sigma > 0 everywhere: set steps_offset to 1 in {components.source}'s "
                f"scheduler configuration (it is {components.scheduler.config.steps_offset}) or choose other steps"
            )
        return schedule

    def _latent_shape(self, resolution: int) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if resolution <= 0 or resolution % factor:
            raise ValueError(f"got resolution {resolution}; expected a positive multiple of {factor} pixels")
        return self.unet.config.in_channels, resolution // factor, resolution // factor

    @property
    def latent_size(self) -> int:
        """C * H * W."""
        channels, height, width = self.latent_shape
        return channels * height * width

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Text embeddings, (B, L, E); each prompt is encoded once in the policy's life."""
        for prompt in set(prompts) - self._prompt_embeds.keys():
            tokens = self.tokenizer(
                [prompt],
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            states = self.text_encoder(input_ids=tokens.input_ids.to(self.device)).last_hidden_state
            self._prompt_embeds[prompt] = states[0]
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
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            latents = F.adaptive_avg_pool2d(latents, max(1, min(image_size // factor, self.latent_shape[-1])))
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)
