"""The policy: a latent diffusion model with Gaussian denoising steps, part of which is trained.

Nothing here enables or disables gradients; callers decide.

Shapes: B batch, C H W latent.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ema import MovingAverage
from .models import DiffusionModel, LatentDecoder, set_embedded_guidance
from .models.adapt import lay_out
from .models.conditioning import Conditioning
from .process import Step, make_process
from .process.gaussian import guide
from .reference import Reference
from .resolution import latent_sides
from .settings import PolicySettings


class DiffusionPolicy:
    """p_theta(x_{k+1} | x_k, c) of Eq. 2, guidance included.

    Sampling and training call the same `step`, so the ratio of a fresh sample is 1.

    Args:
        model: modified in place: moved to `device`, and made to train what `settings` say.
        steps: denoising steps T.
        guidance: classifier-free guidance scale; 1 turns guidance off.
        eval_guidance: the same for evaluation, or None for `guidance`.
        embedded_guidance: what a model distilled from guidance is conditioned on, or None for the model's own.
        resolution: of the images in pixels: the side of a square, or WIDTHxHEIGHT.
        process: a key of PROCESSES, or None for the model's own.
        settings, seed: of what is trained, see `DiffusionModel.adapt`; `settings.ema` is the rate of `average`.
        autocast: dtype of the network's arithmetic, or None for the dtype of its weights.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        steps: int,
        guidance: float,
        eval_guidance: float | None = None,
        embedded_guidance: float | None = None,
        resolution: int | str,
        settings: PolicySettings | None = None,
        seed: int = 42,
        process: str | None = None,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ):
        self.device, self.autocast = torch.device(device), autocast
        self.guidance, self.eval_guidance = guidance, guidance if eval_guidance is None else eval_guidance
        self.model = model
        if embedded_guidance is not None:
            set_embedded_guidance(model, embedded_guidance)
        size = latent_sides(resolution, model.decode.factor, model.patch)
        self.latent_shape: tuple[int, int, int] = (model.channels, *size)
        self.process = make_process(process or model.process, model.scheduler, steps, self.device, size)
        self.model.to(self.device)
        settings = settings or PolicySettings()
        self.trainable = model.adapt(settings, seed)
        lay_out(model.networks.values())
        self.checkpointing = settings.gradient_checkpointing
        self.kl_reference = Reference(self.trainable)
        self.average = MovingAverage(self.trainable.parameters, settings.ema) if settings.ema else None
        self._encoded: dict[str, Conditioning] = {}

    @property
    def latent_size(self) -> int:
        """C * H * W."""
        channels, height, width = self.latent_shape
        return channels * height * width

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self.trainable.parameters.values())

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    def turn_on_checkpointing(self) -> None:
        """Have the network compute its activations again in the backward pass; the gradients stay the same."""
        self.model.network.enable_gradient_checkpointing()
        self.checkpointing = True

    def frozen_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The base model's weights by name, without networks that are not loaded, such as the text encoder of prompts
        that came encoded."""
        for network in self.model.networks.values():
            for name, weight in network.named_parameters():
                if not weight.requires_grad:  # otherwise it is trained
                    yield name, weight.detach()
        yield from self.trainable.base.items()

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """The conditioning of B prompts; each distinct prompt is encoded once and then cached."""
        for prompt in set(prompts) - self._encoded.keys():
            self._encoded[prompt] = self.model.encode([prompt])
        first = self._encoded[prompts[0]]
        return type(first).cat([self._encoded[prompt] for prompt in prompts])

    def step(self, latents: Tensor, positions: Tensor, conditioning: Conditioning) -> Step:
        """The step from latents x_k, (B, C, H, W), at positions k, int64 (B,), for B prompts."""
        output = self._guided_output(latents, self.process.times[positions], conditioning)
        return self.process.step(output, latents, positions)

    def _guided_output(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        if self.guidance == 1:
            return self._output(latents, times, conditioning)
        empty = self.encode_prompts([""]).expand(len(conditioning))
        both = type(conditioning).cat([empty, conditioning])
        output = self._output(torch.cat([latents, latents]), torch.cat([times, times]), both)
        unconditional, conditional = output.float().chunk(2)
        return guide(unconditional, conditional, self.guidance)

    def _output(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model.denoise(latents, times, conditioning)

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block, the policy is what the KL is measured against: the frozen base model, or a frozen policy of
        an earlier epoch; see `Reference`. Call it with gradients disabled."""
        return self.kl_reference.swapped_in()

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block, the trained weights are their moving average, if there is one."""
        return self.average.swapped_in() if self.average else nullcontext()

    @contextmanager
    def guided_for_evaluation(self) -> Iterator[None]:
        """Inside the block, the policy uses `eval_guidance`."""
        training = self.guidance
        try:
            self.guidance = self.eval_guidance
            yield
        finally:
            self.guidance = training

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block, the policy draws as it is meant to be used: with averaged weights and `eval_guidance`."""
        with self.averaged(), self.guided_for_evaluation():
            yield

    def decode(self, latents: Tensor, image_size: int | None = None, decoder: LatentDecoder | None = None) -> Tensor:
        """Images in [0, 1], float32 (B, 3, h, w), of scaled latents (B, C, H, W), noisy or clean.

        With `image_size`, the latents are first averaged down so that the image is about that many pixels wide.
        `decoder`: another than the model's own, of the same factor.
        """
        if image_size is not None:
            _, height, width = self.latent_shape
            columns = max(1, min(image_size // self.model.decode.factor, width))
            latents = F.adaptive_avg_pool2d(latents, (max(1, round(height * columns / width)), columns))
        return (decoder or self.model.decode)(latents)
