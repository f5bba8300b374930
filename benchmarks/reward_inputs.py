"""What both sides of a comparison of rewards make alike: architectures, random weights, images and prompts.

Every weight derives from its name, so that upstream's code (reward_reference.py) and ours can make the same checkpoint.
Imports nothing but torch, numpy and Pillow, since upstream's side runs in an environment of its own.
"""

import math
import re
import tomllib
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PROMPTS = ["a red fox", "Two dogs & a cat, playing chess!", "an oil painting of a lighthouse at night " * 12, "snail"]
SIZES = [(224, 224), (64, 64), (512, 512), (300, 200), (225, 338), (331, 226), (768, 512), (96, 131)]
PUBLISHED = Path(__file__).parent.parent / "tests" / "golden" / "checkpoints.toml"
REWARDS = ("aesthetic", "pickscore", "hpsv2", "imagereward", "clipscore")


# --- weights, images and texts


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight that is worth something: large enough for scores to differ from image to image."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("logit_scale"):
        return torch.tensor(math.log(100.0))
    if "position_ids" in name:
        return torch.arange(shape[1])[None]
    if any(part in name for part in ("embed", "cls_token")) and "proj" not in name:
        return torch.from_numpy(0.3 * draw)
    if len(shape) == 1:
        return torch.from_numpy((1 if name.endswith("weight") else 0) + 0.1 * draw)
    return torch.from_numpy(draw / math.sqrt(math.prod(shape[1:])))


def checkpoint(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: weight(name, tuple(shape)) for name, shape in shapes.items()}


def published(file: str) -> dict[str, list[int]]:
    """Keys and shapes of a published file, as tests/golden/checkpoints.toml has them with its braces opened."""
    tables = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {key: shape for pattern, shape in tables[file].items() for key in opened(pattern)}


def opened(pattern: str) -> list[str]:
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [[part] if i % 2 == 0 else alternatives(part) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def alternatives(text: str) -> list[str]:
    first, dots, last = text.partition("..")
    return [str(n) for n in range(int(first), int(last) + 1)] if dots else text.split(",")


def images() -> list[Image.Image]:
    """16 of different sizes: blocks of colour under noise."""
    made = []
    for i in range(16):
        random, (height, width) = np.random.RandomState(i), SIZES[i % len(SIZES)]
        blocks = random.randint(0, 256, (5, 4, 3))
        rows, columns = np.arange(height) * 5 // height, np.arange(width) * 4 // width
        noise = random.randint(-24, 25, (height, width, 3))
        made.append(Image.fromarray((blocks[rows][:, columns] + noise).clip(0, 255).astype(np.uint8)))
    return made


def bert_vocabulary(size: int) -> str:
    """Letters, signs and some words, filled up to `size` lines."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{c}" for c in letters),
        "red",
        "dogs",
        "cat",
    ]
    tokens += ["painting", "light", "##house"]
    return "\n".join(tokens + [f"filler{i}" for i in range(size - len(tokens))]) + "\n"


def save(path: Path, shapes: dict[str, list[int]], inside: str = "") -> None:
    """A checkpoint as upstream publishes it; what lies in `work` already is left alone."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = checkpoint(shapes)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        torch.save({inside: weights} if inside else weights, path)


# --- the architectures


def clip_config(vision: tuple[int, int, int], text: tuple[int, int, int], patch: int, dim: int, act: str) -> dict:
    def tower(width: int, layers: int, heads: int) -> dict:
        return dict(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=act,
            projection_dim=dim,
        )

    return dict(
        projection_dim=dim,
        vision_config=dict(**tower(*vision), image_size=224, patch_size=patch),
        text_config=tower(*text),
    )


SMALL_CLIP = clip_config((64, 2, 4), (48, 2, 4), patch=32, dim=32, act="quick_gelu")
CLIPS = {
    ("aesthetic", "small"): SMALL_CLIP,
    ("clipscore", "small"): SMALL_CLIP,
    ("pickscore", "small"): clip_config((64, 2, 4), (48, 2, 4), patch=32, dim=32, act="gelu"),
    ("aesthetic", "full"): clip_config((1024, 24, 16), (768, 12, 12), patch=14, dim=768, act="quick_gelu"),
    ("clipscore", "full"): clip_config((768, 12, 12), (512, 12, 8), patch=32, dim=512, act="quick_gelu"),
    ("pickscore", "full"): clip_config((1280, 32, 16), (1024, 24, 16), patch=14, dim=1024, act="gelu"),
}
OPEN_CLIPS = {
    "small": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
    },
    "full": {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
}
# patch, width, layers, heads of the image encoder; width, layers, heads, vocabulary of the text encoder
BLIPS = {
    "small": ((32, 64, 2, 4), (48, 2, 4, 300)),
    "full": ((16, 1024, 24, 16), (768, 12, 12, 30524)),
}
