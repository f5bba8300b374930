"""The policy: a latent diffusion model with Gaussian denoising steps, part of which is trained.

Nothing here enables or disables gradients; callers decide.

Shapes: B batch, C H W latent.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compiling import CompiledBlocks
from .ema import MovingAverage
from .memory.running_out import out_of_memory
from .models import DiffusionModel, LatentDecoder, Trainable, is_text_encoder, move_to, set_embedded_guidance
from .models.adapt import lay_out
from .models.conditioning import Conditioning
from .models.full import AllWeights
from .models.sharded import ShardedWeights
from .process import Process, Step, make_process
from .process.gaussian import guide
from .processes import Processes
from .reference import Reference
from .resolution import latent_sides
from .settings import PolicySettings


class Drawing(NamedTuple):
    """How images are drawn: by which process, as latents of which shape (C, H, W), at which scale of guidance."""

    process: Process
    latent_shape: tuple[int, int, int]
    guidance: float


class DiffusionPolicy:
    """p_theta(x_{k+1} | x_k, c) of Eq. 2, guidance included.

    Sampling and training call the same `step`, so the ratio of a fresh sample is 1.

    Args:
        model: modified in place: moved to `device`, and made to train what `settings` say.
        steps: denoising steps T.
        guidance: classifier-free guidance scale; 1 turns guidance off.
        embedded_guidance: what a model distilled from guidance is conditioned on, or None for the model's own.
        resolution: of the images in pixels: the side of a square, or WIDTHxHEIGHT.
        eval_steps, eval_guidance, eval_resolution: the same for evaluation; None: as in training.
        process: a key of PROCESSES, or None for the model's own.
        settings, seed: of what is trained, see `DiffusionModel.adapt`; `settings.ema` is the rate of `average`.
        autocast: dtype of the network's arithmetic, or None for the dtype of its weights.
        sharded: whether `shard` will be called; until then, the network to be trained stays on the CPU.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        steps: int,
        guidance: float,
        embedded_guidance: float | None = None,
        resolution: int | str,
        eval_steps: int | None = None,
        eval_guidance: float | None = None,
        eval_resolution: int | str | None = None,
        settings: PolicySettings | None = None,
        seed: int = 42,
        process: str | None = None,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        sharded: bool = False,
    ):
        self.device, self.autocast = torch.device(device), autocast
        self.model = model
        if embedded_guidance is not None:
            set_embedded_guidance(model, embedded_guidance)
        self._process = process or model.process
        self._training = self._drawing(steps, guidance, resolution, "resolution")
        self._evaluation = self._drawing(
            steps if eval_steps is None else eval_steps,
            guidance if eval_guidance is None else eval_guidance,
            *((resolution, "resolution") if eval_resolution is None else (eval_resolution, "eval_resolution")),
        )
        self._now = self._training
        if sharded:
            move_to(self.device, {name: net for name, net in model.networks.items() if net is not model.network})
        else:
            model.to(self.device)
        self.settings = settings or PolicySettings()
        self._train(model.adapt(self.settings, seed), average=not sharded)
        lay_out(model.networks.values())
        self.checkpointing = self.settings.gradient_checkpointing
        self._encoded: dict[str, Conditioning] = {}
        self._compiled: CompiledBlocks | None = None

    def _train(self, trainable: Trainable, average: bool = True) -> None:
        self.trainable = trainable
        self.kl_reference = Reference(trainable)
        self.average: MovingAverage | None = None
        if average and self.settings.ema:
            self.average = MovingAverage(trainable.parameters, self.settings.ema, in_place=trainable.sharded)

    def shard(self, processes: Processes) -> None:
        """Share out the weights over `processes`; called before anything is trained, of a model trained whole.

        Raises:
            ValueError: this release of torch cannot do it.
        """
        assert isinstance(self.trainable, AllWeights)
        self._train(ShardedWeights(self.trainable, processes))

    def _drawing(self, steps: int, guidance: float, resolution: int | str, setting: str) -> Drawing:
        model = self.model
        size = latent_sides(resolution, model.decode.factor, model.patch, setting)
        process = make_process(self._process, model.scheduler, steps, self.device, size)
        return Drawing(process, (model.channels, *size), guidance)

    @property
    def process(self) -> Process:
        return self._now.process

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._now.latent_shape

    @property
    def guidance(self) -> float:
        return self._now.guidance

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

    def compile(self) -> None:
        """Have torch compile the network's transformer blocks, when they are first called; see compiling.py."""
        self._compiled = CompiledBlocks(self.model.network, self.model.source)

    def uncompiled(self) -> AbstractContextManager[None]:
        """Inside the block, nothing is compiled, so that modules can be watched and memory can be counted."""
        return self._compiled.off() if self._compiled else nullcontext()

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
        self._encode(prompts)
        first = self._encoded[prompts[0]]
        return type(first).cat([self._encoded[prompt] for prompt in prompts])

    def encode_ahead(self, prompts: Iterable[str], check: Callable[[], None] = lambda: None) -> None:
        """Encode all prompts that will be asked for, so that the text encoders come to the device only once.

        On the CPU, where they always are, prompts are encoded when they are asked for.

        check: called before each prompt; may raise to stop.

        Raises:
            ValueError: there is no room for the text encoders beside the denoiser.
        """
        if self.device.type == "cpu":
            return
        guided = any(drawing.guidance != 1 for drawing in (self._training, self._evaluation))
        try:
            self._encode([*prompts, ""] if guided else prompts, check)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise ValueError(
                "got out of memory encoding prompts; expected room for the text encoders beside the denoiser: set "
                "precision to fp16 or bf16, or close other programs that use the device"
            ) from error

    def _encode(self, prompts: Iterable[str], check: Callable[[], None] = lambda: None) -> None:
        new = sorted(set(prompts) - self._encoded.keys())
        if not new:
            return
        with self._text_encoders_here():
            for prompt in new:
                check()
                self._encoded[prompt] = self.model.encode([prompt])

    @contextmanager
    def _text_encoders_here(self) -> Iterator[None]:
        """Inside the block, the text encoders are on the device; otherwise, they are on the CPU."""
        networks = [network for name, network in self.model.networks.items() if is_text_encoder(name)]
        try:
            for network in networks:
                network.to(self.device)
            yield
        finally:
            for network in networks:
                network.to("cpu")

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
        # cached, the weights that a sharded network gathers and frees would stay until it has run
        cached = not self.trainable.sharded
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=cached):
            return self.model.denoise(latents, times, conditioning)

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block, the policy is what the KL is measured against: the frozen base model, or a frozen policy of
        an earlier epoch; see `Reference`. Call it with gradients disabled."""
        return self.kl_reference.swapped_in()

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block, the trained weights are their moving average, if there is one."""
        return self.average.swapped_in() if self.average else nullcontext()

    @contextmanager
    def drawing_for_evaluation(self) -> Iterator[None]:
        """Inside the block, steps, guidance and latents are those of evaluation; they are not compiled for."""
        before = self._now
        try:
            self._now = self._evaluation
            with self.uncompiled():
                yield
        finally:
            self._now = before

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block, the policy draws as it is meant to be used: with averaged weights, as in evaluation."""
        with self.averaged(), self.drawing_for_evaluation():
            yield

    @property
    def size_of_evaluation(self) -> float:
        """How many times as large as in training a latent is in evaluation."""
        (_, *training), (_, *evaluation) = self._training.latent_shape, self._evaluation.latent_shape
        return prod(evaluation) / prod(training)

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
