"""CLIPScore: how well a caption fits an image (Hessel et al., 2021, arXiv 2104.08718)."""

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from .agreement import Agreement
from .clip import VIT_B_32, Clip, empty_clip
from .options import Options
from .pixels import pillow_pixels
from .weights import Source, find_weights, load_weights

ARCHITECTURE = VIT_B_32
CLIP = Source("openai/clip-vit-base-patch32", "model.safetensors", "0.6 GB", "MIT")
PREFIX = "A photo depicts "  # upstream puts it before every caption
SCALE = 2.5


class ClipScore(Agreement):
    """OpenAI's CLIP ViT-B/32, not fine-tuned: 2.5 times the cosine, clamped at 0."""

    sources = (CLIP,)

    def __init__(self, name: str, options: Options):
        self.name, self.embed_dim = name, ARCHITECTURE.projection_dim
        path = find_weights(name, CLIP, options.weights)
        self.encoder = load_weights(Clip(empty_clip(ARCHITECTURE)), path, CLIP, options.dtype).to(options.device)
        self.tokenizer = SimpleTokenizer()
        self.size = ARCHITECTURE.vision_config.image_size

    def encode_images(self, images: Tensor) -> Tensor:
        return self.encoder(pillow_pixels(images, self.size))

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Tensor:
        return self.encoder.read(self.tokenizer([PREFIX + prompt for prompt in prompts]).to(device))

    def in_upstreams_units(self, cosine: Tensor) -> Tensor:
        return SCALE * cosine.clamp(min=0)
