"""The family of FLUX.1, dev and schnell: a transformer on flow matching, conditioned on the states of T5, on the pooled
state of CLIP and, if it was distilled from guidance as dev was, on the scale of that guidance.

Shapes: B batch, C H W latent, L tokens, E text width, P pooled width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from ..process.flow_schedule import PATCH, FlowSchedule
from . import LatentDecoder, PromptEncoder
from .conditioning import Conditioning, TensorConditioning
from .files import AGAIN
from .flow_family import FlowFamily
from .flow_transformer import FlowTransformer
from .flux_file import LAYOUT, check_inputs, open_file
from .kind import is_flux
from .lora import TARGETS
from .model_file import ModelFile
from .stable_diffusion import Autoencoder, ClipText
from .t5 import T5Text

GUIDANCE = 3.5  # the scale of guidance that dev is conditioned on by default, as in diffusers and in ComfyUI
T5_TOKENS = {True: 512, False: 256}  # read of a prompt with and without guidance; ComfyUI: all there are, at least 256

# Besides the layers of the image's stream, those of the text's. The blocks with one stream have no others of attention.
_OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")


class T5AndPooledClip:
    """A PromptEncoder: the states of T5, (B, L, E), and the pooled state of CLIP, (B, P)."""

    def __init__(self, clip: ClipText, t5: T5Text):
        self.clip, self.t5 = clip, t5
        self.networks = {"text_encoder": clip.network, "text_encoder_2": t5.network}

    def __call__(self, prompts: list[str]) -> TensorConditioning:
        return TensorConditioning(states=self.t5(prompts), pooled=self.clip.outputs(prompts).pooler_output)

    def cut(self, prompts: list[str]) -> str:
        """One line about those of `prompts` whose end T5 does not read; empty if there are none."""
        return self.t5.cut(prompts)


class Flux(FlowTransformer):
    """A DiffusionModel of FLUX.1, conditioned on states, (B, L, E), and pooled, (B, P).

    embedded_guidance: the scale of guidance that the network is conditioned on; None if it takes none, as schnell.
    """

    packing = PATCH**2

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        scheduler: FlowSchedule,
        encode: PromptEncoder,
        decode: LatentDecoder,
        source: str,
    ):
        super().__init__(transformer, scheduler, encode, decode, source)
        self.embedded_guidance = GUIDANCE if transformer.config.guidance_embeds else None

    def denoise(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, TensorConditioning)
        rows, columns = (side // PATCH for side in latents.shape[-2:])
        states, guidance = conditioning.parts["states"], self.embedded_guidance
        patches = self.network(
            hidden_states=packed(latents.to(self.network.dtype)),
            timestep=times / self.scheduler.timesteps,
            guidance=None if guidance is None else times.new_full((len(latents),), guidance),
            encoder_hidden_states=states,
            pooled_projections=conditioning.parts["pooled"],
            txt_ids=times.new_zeros(states.shape[1], 3),
            img_ids=_places(rows, columns).to(times.device),
            return_dict=False,
        )[0]
        return unpacked(patches, rows)

    def lora_modules(self, targets: str) -> tuple[str, ...]:
        layers = (*TARGETS[targets], *_OF_TEXT)
        if targets == "attention":
            return layers
        # by its whole name, since the network's last layer is a proj_out too
        blocks = range(self.network.config.num_single_layers)
        return *layers, *_FEED_FORWARD, *(f"single_transformer_blocks.{block}.proj_out" for block in blocks)


def packed(latents: Tensor) -> Tensor:
    """The patches of `latents`, (B, C, H, W), as tokens, (B, H/2 * W/2, 4 C), row by row."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(patches: Tensor, rows: int) -> Tensor:
    """The inverse of `packed`, given H/2."""
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (rows, -1)), PATCH)


def _places(rows: int, columns: int) -> Tensor:
    """Of each patch: 0, its row and its column; (rows * columns, 3)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()


class FluxFamily(FlowFamily):
    layout, pipeline = LAYOUT, FluxPipeline

    def recognizes(self, source: str) -> bool:
        return is_flux(source)

    def open_file(self, path: Path) -> ModelFile:
        return open_file(path)

    def check_transformer(self, config: dict[str, Any], folder: Path) -> None:
        check_inputs(folder, config.get("in_channels", 64), config.get("out_channels") or 64)

    def made_of(self, parts: dict[str, Any], schedule: FlowSchedule, source: str) -> Flux:
        _check_widths(source, parts)
        length = T5_TOKENS[parts["transformer"].config.guidance_embeds]
        encode = T5AndPooledClip(
            ClipText(parts["tokenizer"], parts["text_encoder"]),
            T5Text(parts["tokenizer_2"], parts["text_encoder_2"], length),
        )
        return Flux(parts["transformer"], schedule, encode, Autoencoder(parts["vae"]), source)


def _check_widths(source: str, parts: dict[str, Any]) -> None:
    """Raise ValueError if the components are of different models."""
    config, latent = parts["transformer"].config, parts["vae"].config.latent_channels
    states, pooled = parts["text_encoder_2"].config.d_model, parts["text_encoder"].config.hidden_size
    if (Flux.packing * latent, states, pooled) != (
        config.in_channels,
        config.joint_attention_dim,
        config.pooled_projection_dim,
    ):
        raise ValueError(
            f"{source} has a transformer of {config.in_channels} inputs for each patch, text width "
            f"{config.joint_attention_dim} and pooled width {config.pooled_projection_dim}, an autoencoder of {latent} "
            f"channels, and text encoders of widths {states} and {pooled}; expected all of the same text-to-image "
            f"model; {AGAIN}"
        )


FAMILY = FluxFamily()
