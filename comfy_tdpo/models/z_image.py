"""The family of Z-Image, the base model and Turbo: a transformer on flow matching whose one stream holds the image's
tokens and Qwen3's states of the prompt.

Deviations from diffusers' pipeline:
- each row is a forward pass of its own. The network masks the padding of a batch whose prompts differ in length, so a
  row's output, and with it the ratio of a policy gradient, would depend on its neighbours;
- a prompt is encoded without padding, which the pipeline masks and then drops;
- guidance w counts as everywhere here: the pipeline's guidance_scale is w - 1. The guided output is not rescaled, as by
  default in the pipeline (cfg_normalization).

Shapes: B batch, C H W latent, L tokens of a prompt, E text width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Model

from ..process.flow_schedule import FlowSchedule
from ..prompts.length import CutPrompt, describe_cut
from .conditioning import Conditioning, ListConditioning
from .files import AGAIN
from .flow_family import FlowFamily
from .flow_transformer import FlowTransformer
from .kind import is_z_image
from .lora import ATTENTION
from .model_file import ModelFile
from .stable_diffusion import Autoencoder
from .z_image_file import LAYOUT, open_file

TEXT_TOKENS = 512  # read of a prompt with its template, as in diffusers; ComfyUI reads as many as there are

_ATTENTION = tuple(f"attention.{layer}" for layer in ATTENTION)
LORA_MODULES = {
    "attention": _ATTENTION,
    "attention+feed-forward": (*_ATTENTION, *(f"feed_forward.w{n}" for n in (1, 2, 3))),
}


class QwenText:
    """A PromptEncoder: for each prompt, as a user's turn of a chat, the last but one states of Qwen3, (L, E)."""

    def __init__(self, tokenizer: Qwen2Tokenizer, text_encoder: Qwen3Model):
        self.tokenizer, self.network = tokenizer, text_encoder
        self.networks = {"text_encoder": text_encoder}

    def __call__(self, prompts: list[str]) -> ListConditioning:
        return ListConditioning([self._states(prompt) for prompt in prompts])

    def _states(self, prompt: str) -> Tensor:
        tokens = torch.tensor([self._tokens(prompt)[:TEXT_TOKENS]], device=self.network.device)
        return self.network(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[-2][0]

    def _tokens(self, prompt: str) -> list[int]:
        return self.tokenizer(self._turn(prompt), verbose=False).input_ids

    def _turn(self, prompt: str) -> str:
        """The prompt as a user's turn, followed by the beginning of the answer."""
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def cut(self, prompts: list[str]) -> str:
        """One line about those of `prompts` that it truncates; empty if there are none."""
        found = []
        for prompt in dict.fromkeys(prompts):
            if len(tokens := self._tokens(prompt)) > TEXT_TOKENS:
                before = self._turn(prompt).partition(prompt)[0]
                read = self.tokenizer.decode(tokens[:TEXT_TOKENS]).removeprefix(before).strip()
                found.append(CutPrompt(prompt, len(tokens), TEXT_TOKENS, read))
        return describe_cut(found) if found else ""


class ZImage(FlowTransformer):
    """A DiffusionModel of Z-Image, conditioned on a list of states, (L, E) each."""

    def denoise(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The network is given 1 - t, and predicts the flow from noise to image."""
        assert isinstance(conditioning, ListConditioning)
        dtype, most = self.network.dtype, self.scheduler.timesteps
        outputs = [
            self.network([latent[:, None].to(dtype)], time[None], [states.to(dtype)], return_dict=False)[0][0]
            for latent, time, states in zip(latents, (most - times) / most, conditioning.states, strict=True)
        ]
        return -torch.stack(outputs).squeeze(2)

    def lora_modules(self, targets: str) -> tuple[str, ...]:
        return LORA_MODULES[targets]


class ZImageFamily(FlowFamily):
    layout, pipeline = LAYOUT, ZImagePipeline

    def recognizes(self, source: str) -> bool:
        return is_z_image(source)

    def open_file(self, path: Path) -> ModelFile:
        return open_file(path)

    def check_transformer(self, config: dict[str, Any], folder: Path) -> None:
        if config.get("siglip_feat_dim"):
            raise ValueError(
                f"{folder} is conditioned on images too (Z-Image-Omni); expected Z-Image or Z-Image-Turbo: choose one "
                "of these"
            )

    def made_of(self, parts: dict[str, Any], schedule: FlowSchedule, source: str) -> ZImage:
        _check_parts(source, parts)
        encode = QwenText(parts["tokenizer"], parts["text_encoder"])
        return ZImage(parts["transformer"], schedule, encode, Autoencoder(parts["vae"]), source)


def _check_parts(source: str, parts: dict[str, Any]) -> None:
    """Raise ValueError if the components are of different models, or the tokenizer has no template for a chat."""
    config = parts["transformer"].config
    latent, text = parts["vae"].config.latent_channels, parts["text_encoder"].config.hidden_size
    if (latent, text) != (config.in_channels, config.cap_feat_dim):
        raise ValueError(
            f"{source} has a transformer of {config.in_channels} channels and text width {config.cap_feat_dim}, an "
            f"autoencoder of {latent} channels and a text encoder of width {text}; expected all of the same "
            f"text-to-image model; {AGAIN}"
        )
    if not parts["tokenizer"].chat_template:
        raise ValueError(
            f"{source} has a tokenizer without a chat template; expected that of Qwen3 in tokenizer/"
            f"tokenizer_config.json; {AGAIN}"
        )


FAMILY = ZImageFamily()
