"""The rewards of Shapes: three learned and imperfect ones, and the measure of what they stand for."""

from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizerFast

from ..shapes import WORLD
from ..shapes.encoders import ClipEncoder, JudgeEncoder, PreferenceHead, tokenize
from ..shapes.gold import gold_scores


@cache
def _tokenizer() -> CLIPTokenizerFast:
    return CLIPTokenizerFast.from_pretrained(WORLD / "clip", local_files_only=True)


@cache
def _clip_encoder(device: torch.device) -> ClipEncoder:
    """Encoder A: one instance serves both rewards and the critic."""
    encoder = ClipEncoder(CLIPModel.from_pretrained(WORLD / "clip", local_files_only=True))
    return encoder.eval().requires_grad_(False).to(device)


class ShapesAesthetic:
    """Image only: encoder A's prediction of a rater's preference, about 0 to 10 points."""

    embed_dim = 64

    def __init__(self, name: str, device: torch.device):
        self.name = name
        self.encoder = _clip_encoder(device)
        self.head = PreferenceHead().eval().requires_grad_(False).to(device)
        self.head.load_state_dict(load_file(WORLD / "clip" / "preference_head.safetensors"))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return self.encoder.embed_images(images)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.embed(images))


class ShapesAlignment:
    """Image and text: the cosine of encoder A, -1 to 1."""

    embed_dim = 64

    def __init__(self, name: str, device: torch.device):
        self.name = name
        self.encoder = _clip_encoder(device)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return self.encoder.embed_images(images)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        text = self.encoder.embed_tokens(tokenize(_tokenizer(), prompts).to(images.device))
        return (self.embed(images) * text).sum(-1)


class ShapesJudge:
    """Image and text: the cosine of encoder B, -1 to 1. For judging only: nothing is trained on it."""

    embed_dim = 64

    def __init__(self, name: str, device: torch.device):
        self.name = name
        weights = load_file(WORLD / "judge" / "model.safetensors")
        self.encoder = JudgeEncoder(vocab_size=len(weights["token.weight"])).eval().requires_grad_(False)
        self.encoder.load_state_dict(weights)
        self.encoder.to(device)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return self.encoder.embed_images(images)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        text = self.encoder.embed_tokens(tokenize(_tokenizer(), prompts).to(images.device))
        return (self.embed(images) * text).sum(-1)


class ShapesGold:
    """What the prompt asks for, measured by a program: 0 to 1."""

    embed_dim = None

    def __init__(self, name: str, device: torch.device):
        self.name = name

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a program and has no encoder")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return gold_scores(images, prompts)
