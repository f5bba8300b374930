"""The rewards of Shapes: four learned, imperfect ones, and a program that measures what they stand for."""

import torch
from torch import Tensor

from ..shapes import WORLD
from ..shapes.encoders import (
    ClipEncoder,
    JudgeEncoder,
    MatchEncoder,
    load_clip_encoder,
    load_judge_encoder,
    load_match_encoder,
    load_preference_head,
    load_tokenizer,
    tokenize,
)
from ..shapes.gold import gold_scores
from ..shapes.scenes import parse
from .options import Options
from .shared import shared_while_used


@shared_while_used
def _clip_encoder(device: torch.device) -> ClipEncoder:
    """Encoder A, one instance for both rewards and the critic."""
    return load_clip_encoder(WORLD).to(device)


class ShapesAesthetic:
    """A rater's preference predicted from encoder A's image embedding, about 0 to 10 points."""

    sources = ()
    embed_dim = 64
    differentiable = True

    def __init__(self, name: str, options: Options):
        self.name = name
        self.encoder = _clip_encoder(options.device)
        self.head = load_preference_head(WORLD).to(options.device)

    def embed(self, images: Tensor) -> Tensor:
        return self.encoder.embed_images(images)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.embed(images))

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt is fine: only images are scored."""


class _Agreement:
    """The cosine of an encoder's image and text embeddings, -1 to 1."""

    sources = ()
    embed_dim = 64
    differentiable = True

    def __init__(self, name: str, encoder: ClipEncoder | JudgeEncoder | MatchEncoder):
        self.name, self.encoder = name, encoder
        self.tokenizer = load_tokenizer(WORLD)

    def embed(self, images: Tensor) -> Tensor:
        return self.encoder.embed_images(images)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        text = self.encoder.embed_tokens(tokenize(self.tokenizer, prompts).to(images.device))
        return (self.embed(images) * text).sum(-1)

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt can be scored: unknown words are split into letters."""


class ShapesAlignment(_Agreement):
    """Uses encoder A, which shapes-aesthetic and the critic also use."""

    def __init__(self, name: str, options: Options):
        super().__init__(name, _clip_encoder(options.device))


class ShapesJudge(_Agreement):
    """Uses encoder B, which is not used for training: the held-out judge."""

    def __init__(self, name: str, options: Options):
        super().__init__(name, load_judge_encoder(WORLD).to(options.device))


class ShapesMatch(_Agreement):
    """Uses an encoder of its own, trained on spoilt scenes: the reward to watch during training."""

    def __init__(self, name: str, options: Options):
        super().__init__(name, load_match_encoder(WORLD).to(options.device))


class ShapesGold:
    """How well an image shows what the prompt asks for, measured by a program: 0 to 1."""

    sources = ()
    embed_dim = None
    differentiable = False

    def __init__(self, name: str, options: Options):
        self.name = name

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a program and has no encoder")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return gold_scores(images, prompts)

    def check_prompts(self, prompts: list[str]) -> None:
        for prompt in prompts:
            try:
                parse(prompt)
            except ValueError as error:
                raise ValueError(
                    f"{self.name} can only judge prompts of Shapes: {error}; take it out of the rewards "
                    "(--eval-reward none watches none), or train on prompts of Shapes"
                ) from error
