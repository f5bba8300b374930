"""HPS v2 and v2.1: which of two images people prefer for a prompt (Wu et al., 2023, arXiv 2306.09341).

The scores are upstream's. The package `hpsv2` contains a fork of open_clip and reads its checkpoint again at every
call; this module uses the current open_clip and reads the checkpoint once.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from .agreement import Agreement
from .options import Options
from .pixels import torchvision_pixels
from .weights import Source, find_weights, load_weights

# open_clip's ViT-H-14.
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}


class HPSv2(Agreement):
    """A fine-tuned OpenCLIP ViT-H/14: the cosine, about 0.2 to 0.35."""

    sources = (Source("xswu/HPSv2", "HPS_v2_compressed.pt", "2.0 GB", "Apache-2.0", bits=16),)

    def __init__(self, name: str, options: Options):
        self.name, self.embed_dim = name, ARCHITECTURE["embed_dim"]
        (source,) = self.sources
        path = find_weights(name, source, options.weights)
        with init_empty_weights():
            empty = CLIP(**ARCHITECTURE)
        self.encoder = load_weights(empty, path, source, options.dtype, inside="state_dict").to(options.device)
        self.tokenizer = SimpleTokenizer()
        self.size = ARCHITECTURE["vision_cfg"]["image_size"]
        self.dtype = options.dtype

    def encode_images(self, images: Tensor) -> Tensor:
        return self.encoder.encode_image(torchvision_pixels(images, self.size).to(self.dtype)).float()

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Tensor:
        return self.encoder.encode_text(self.tokenizer(prompts).to(device)).float()


class HPSv21(HPSv2):
    """Version 2.1: the same model trained on better data. Its scores cannot be compared with those of version 2."""

    sources = (Source("xswu/HPSv2", "HPS_v2.1_compressed.pt", "2.0 GB", "Apache-2.0", bits=16),)
