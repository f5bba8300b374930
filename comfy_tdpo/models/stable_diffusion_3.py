"""The family of Stable Diffusion 3 and 3.5: a transformer on flow matching, conditioned on the states and the pooled
states of two CLIPs, and on the states of T5, which may be left out.

Shapes: B batch, C H W latent, L tokens, E text width, P pooled width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from ..process.flow_schedule import PATCH, FlowSchedule
from .conditioning import Conditioning, TensorConditioning
from .files import AGAIN, refused
from .flow_family import FlowFamily
from .flow_transformer import FlowTransformer
from .kind import is_sd3
from .lora import TARGETS
from .model_file import ModelFile
from .sd3_file import LAYOUT, open_file
from .stable_diffusion import Autoencoder, ClipText
from .t5 import T5Text
from .unsupported import LARGE_LAYERS, SD35_LARGE

T5_TOKENS = 256  # read of a prompt, as in diffusers; ComfyUI reads as many as there are, and at least 77

# Besides the layers of the image's stream, those of the text's, in the same blocks.
_OF_TEXT = {
    "attention": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "feed-forward": ("ff_context.net.0.proj", "ff_context.net.2"),
}
LORA_MODULES = {
    "attention": (*TARGETS["attention"], *_OF_TEXT["attention"]),
    "attention+feed-forward": (*TARGETS["attention+feed-forward"], *_OF_TEXT["attention"], *_OF_TEXT["feed-forward"]),
}


class ThreeTexts:
    """A PromptEncoder: the last but one states of two CLIPs side by side, filled with zeros to the width E, and after
    them those of T5, or as many zeros without it, (B, L, E); and the pooled states of both CLIPs, (B, P)."""

    def __init__(self, first: ClipText, second: ClipText, third: T5Text | None, width: int):
        self.clips, self.t5, self.width = (first, second), third, width
        self.networks = {"text_encoder": first.network, "text_encoder_2": second.network}
        if third:
            self.networks["text_encoder_3"] = third.network

    def __call__(self, prompts: list[str]) -> TensorConditioning:
        first, second = (clip.outputs(prompts, hidden_states=True) for clip in self.clips)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        states = F.pad(states, (0, self.width - states.shape[-1]))
        more = self.t5(prompts) if self.t5 else states.new_zeros(len(prompts), T5_TOKENS, self.width)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return TensorConditioning(states=torch.cat([states, more], dim=1), pooled=pooled)

    def cut(self, prompts: list[str]) -> str:
        """One line about those of `prompts` whose end no encoder reads; empty if there are none."""
        return (self.t5 or self.clips[0]).cut(prompts)


class StableDiffusion3(FlowTransformer):
    """A DiffusionModel of Stable Diffusion 3 or 3.5, conditioned on states, (B, L, E), and pooled, (B, P)."""

    def denoise(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, TensorConditioning)
        most = self.network.config.pos_embed_max_size * PATCH  # elements of a side that the network knows places for
        if max(latents.shape[-2:]) > most:
            raise ValueError(
                f"got a resolution above {most * self.decode.factor} pixels, the largest that {self.source} can draw; "
                "expected at most that: lower resolution"
            )
        return self.network(
            hidden_states=latents.to(self.network.dtype),
            timestep=times,
            encoder_hidden_states=conditioning.parts["states"],
            pooled_projections=conditioning.parts["pooled"],
            return_dict=False,
        )[0]

    def lora_modules(self, targets: str) -> tuple[str, ...]:
        return LORA_MODULES[targets]


class StableDiffusion3Family(FlowFamily):
    layout, pipeline = LAYOUT, StableDiffusion3Pipeline

    def recognizes(self, source: str) -> bool:
        return is_sd3(source)

    def open_file(self, path: Path) -> ModelFile:
        return open_file(path)

    def check_transformer(self, config: dict[str, Any], folder: Path) -> None:
        layers = config.get("num_layers")
        if isinstance(layers, int) and layers >= LARGE_LAYERS:
            raise refused(folder, SD35_LARGE)

    def made_of(self, parts: dict[str, Any], schedule: FlowSchedule, source: str) -> StableDiffusion3:
        _check_widths(source, parts)
        first, second = (ClipText(parts[f"tokenizer{n}"], parts[f"text_encoder{n}"]) for n in ("", "_2"))
        third = None
        if "text_encoder_3" in parts:
            third = T5Text(parts["tokenizer_3"], parts["text_encoder_3"], T5_TOKENS)
        encode = ThreeTexts(first, second, third, parts["transformer"].config.joint_attention_dim)
        return StableDiffusion3(parts["transformer"], schedule, encode, Autoencoder(parts["vae"]), source)


def _check_widths(source: str, parts: dict[str, Any]) -> None:
    """Raise ValueError if the components are of different models."""
    config, latent = parts["transformer"].config, parts["vae"].config.latent_channels
    clips = [parts[name].config for name in ("text_encoder", "text_encoder_2")]
    states, pooled = (sum(getattr(clip, name) for clip in clips) for name in ("hidden_size", "projection_dim"))
    t5 = parts["text_encoder_3"].config.d_model if "text_encoder_3" in parts else config.joint_attention_dim
    found = (latent, config.out_channels, states <= config.joint_attention_dim, pooled, t5)
    if found != (
        config.in_channels,
        config.in_channels,
        True,
        config.pooled_projection_dim,
        config.joint_attention_dim,
    ):
        raise ValueError(
            f"{source} has a transformer of {config.in_channels} channels, text width {config.joint_attention_dim} and "
            f"pooled width {config.pooled_projection_dim}, an autoencoder of {latent} channels, and text encoders of "
            f"widths {states} and {t5} and pooled width {pooled}; expected all of the same text-to-image model; {AGAIN}"
        )


FAMILY = StableDiffusion3Family()
