"""Prompts that a CLIP encoded in advance, as a training must not load models by itself."""

import math
from typing import Any

import comfy.sd
import torch

from comfy_tdpo.clean_text import one_line
from comfy_tdpo.models.conditioning import TensorConditioning

from .weights_in import check_embeds


class EncodedPrompts:
    """A PromptEncoder with prompts that a CLIP encoded in advance, as a training must not load models by itself.

    Args:
        clip: the CLIP; texts: what it reads for each prompt that will ever be needed; the empty one is always included.
        device: where to return the embeddings, which are kept in main memory.
        pooled: whether the MODEL needs a pooled embedding too.
        joint: whether the MODEL has joint attention, to which an embedding twice says something else than once.
        t5: whether the MODEL reads prompts by T5 too, which pads all to the length of the longest.

    Raises:
        ValueError: an embedding is not finite, or with joint attention, a prompt is too long for a CLIP.
    """

    def __init__(
        self,
        clip: comfy.sd.CLIP,
        texts: dict[str, str],
        device: torch.device,
        pooled: bool = False,
        joint: bool = False,
        t5: bool = False,
    ):
        self._device = device
        texts = {"": ""} | {one_line(prompt): text for prompt, text in texts.items()}
        tokens = {prompt: clip.tokenize(text) for prompt, text in texts.items()}
        if t5:
            _check_t5(tokens[""])
            padding = {"t5xxl_min_length": max(len(found["t5xxl"][0]) for found in tokens.values())}
            tokens = {prompt: clip.tokenize(text, tokenizer_options=padding) for prompt, text in texts.items()}
        both = {prompt: clip.encode_from_tokens(found, return_pooled=True) for prompt, found in tokens.items()}
        embeds = {prompt: embed for prompt, (embed, _) in both.items()}
        if joint:
            _check_lengths({prompt: embed.shape[1] for prompt, embed in embeds.items()})
        for prompt, found in both.items():
            for embed in found[: 1 + pooled]:
                check_embeds(prompt, embed, clip.cond_stage_model)
        # long prompts have longer embeddings; repeating a whole embedding does not change cross-attention
        length = math.lcm(*(embed.shape[1] for embed in embeds.values()))
        with torch.inference_mode(False), torch.no_grad():
            self._embeds = {
                prompt: embed[0].to("cpu", torch.float32, copy=True).repeat(length // embed.shape[1], 1)
                for prompt, embed in embeds.items()
            }
            self._pooled = {
                prompt: pool[0].to("cpu", torch.float32, copy=True) for prompt, (_, pool) in both.items() if pooled
            }

    @property
    def width(self) -> int:
        return self._embeds[""].shape[-1]

    @property
    def pooled_width(self) -> int | None:
        return self._pooled[""].shape[-1] if self._pooled else None

    def __call__(self, prompts: list[str]) -> TensorConditioning:
        parts = {"states": self._embeds} | ({"pooled": self._pooled} if self._pooled else {})
        rows = {name: torch.stack([part[one_line(prompt)] for prompt in prompts]) for name, part in parts.items()}
        return TensorConditioning(**{name: part.to(self._device) for name, part in rows.items()})


def _check_lengths(lengths: dict[str, int]) -> None:
    """Raise ValueError if the embeddings of some prompts, by `lengths`, are longer than that of the empty one."""
    for prompt, length in lengths.items():
        if length != lengths[""]:
            raise ValueError(
                f"got the prompt {prompt[:60]!r}, which is longer than what CLIP reads at once (77 tokens in Stable "
                "Diffusion 3, 16 in Shapes); expected one that is not, for a MODEL with joint attention: shorten it"
            )


def _check_t5(tokens: dict[str, Any]) -> None:
    """Raise ValueError if a CLIP makes no tokens for T5."""
    if "t5xxl" not in tokens:
        raise ValueError(
            f"got a CLIP that reads prompts as {' and '.join(tokens)}, and not as t5xxl; expected the CLIP of the "
            "MODEL, with T5: load it from the MODEL's checkpoint, or by DualCLIPLoader or TripleCLIPLoader"
        )
