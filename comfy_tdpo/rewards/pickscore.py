"""PickScore: which of two images people pick for a prompt (Kirstain et al., 2023, arXiv 2305.01569)."""

import torch
from torch import Tensor

from ..models.shipped import CONFIGS, clip_tokenizer
from .agreement import Agreement
from .clip import VIT_H_14, Clip, empty_clip
from .options import Options
from .pixels import pillow_pixels
from .weights import Source, find_weights, load_weights

ARCHITECTURE = VIT_H_14
CLIP = Source("yuvalkirstain/PickScore_v1", "model.safetensors", "3.9 GB", "MIT")


class PickScore(Agreement):
    """A fine-tuned CLIP ViT-H/14: its temperature times the cosine, about 15 to 25."""

    sources = (CLIP,)

    def __init__(self, name: str, options: Options):
        self.name, self.embed_dim = name, ARCHITECTURE.projection_dim
        path = find_weights(name, CLIP, options.weights)
        self.encoder = load_weights(Clip(empty_clip(ARCHITECTURE)), path, CLIP, options.dtype).to(options.device)
        self.tokenizer = clip_tokenizer(CONFIGS / "sd1")
        self.size = ARCHITECTURE.vision_config.image_size

    def encode_images(self, images: Tensor) -> Tensor:
        return self.encoder(pillow_pixels(images, self.size, crop="first"))

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").input_ids
        return self.encoder.read(tokens.to(device))

    def in_upstreams_units(self, cosine: Tensor) -> Tensor:
        return self.encoder.logit_scale.exp() * cosine
