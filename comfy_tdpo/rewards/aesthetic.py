"""Aesthetic Score: predicts how people rate an image, about 1 to 10 (LAION's improved-aesthetic-predictor)."""

import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor

from .clip import VIT_L_14, ClipImages, empty_clip
from .head import LinearHead
from .options import Options
from .pixels import pillow_pixels
from .weights import Source, find_weights, load_weights

ARCHITECTURE = VIT_L_14
# The head is published on GitHub as sac+logos+ava1-l14-linearMSE.pth; this is a copy on the hub.
HEAD = Source(
    "trl-lib/ddpo-aesthetic-predictor",
    "aesthetic-model.pth",
    "4 MB",
    "Apache-2.0",
    aliases=("sac+logos+ava1-l14-linearMSE.pth",),
)
CLIP = Source("openai/clip-vit-large-patch14", "model.safetensors", "1.7 GB", "MIT")


class Aesthetic:
    """A linear head on CLIP's unit embedding of the image; CLIP's text encoder is not loaded."""

    sources = (HEAD, CLIP)
    differentiable = True

    def __init__(self, name: str, options: Options):
        self.name, self.embed_dim = name, ARCHITECTURE.projection_dim
        head = find_weights(name, HEAD, options.weights)
        with init_empty_weights():
            empty = LinearHead(self.embed_dim)
        self.head = load_weights(empty, head, HEAD).to(options.device)
        clip = find_weights(name, CLIP, options.weights_folder)  # large, so load it only once the head has been checked
        encoder = ClipImages(empty_clip(ARCHITECTURE))
        self.encoder = load_weights(encoder, clip, CLIP, options.dtype).to(options.device)
        self.size = ARCHITECTURE.vision_config.image_size

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder(pillow_pixels(images, self.size)), dim=-1)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.embed(images))

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt is fine: only images are scored."""
