"""The base class of rewards that embed image and prompt in one space and compare the embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Agreement:
    """A score from the cosine of two embeddings, -1 to 1; the critic can use the image encoder."""

    differentiable = True

    def encode_images(self, images: Tensor) -> Tensor:
        """Embeddings, float32 (B, D), of images in [0, 1]."""
        raise NotImplementedError

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Tensor:
        """Embeddings, float32 (B, D), in the same space."""
        raise NotImplementedError

    def in_upstreams_units(self, cosine: Tensor) -> Tensor:
        return cosine

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.encode_images(images), dim=-1)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))  # the images of a group have one prompt
        text = F.normalize(self.encode_prompts(distinct, images.device), dim=-1)
        rows = [distinct.index(prompt) for prompt in prompts]
        return self.in_upstreams_units((self.embed(images) * text[rows]).sum(-1))

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt can be scored."""
