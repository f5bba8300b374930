"""What kind a model is of, by the index of its folder or the header of its file alone. Cheap: imports no torch."""

import json
from pathlib import Path
from typing import Any

from ..user_files import user_path

LARGEST_HEADER = 2**27  # bytes; of a whole checkpoint, a header has less than a million
_SECOND_ENCODER = b'"conditioner.embedders.1.model.'  # in a single file of XL, and of no other family
_JOINT_BLOCK = b'joint_blocks.0.x_block.attn.qkv.weight"'  # in a single file of SD 3


# The kinds of models, named like the presets that suit them: the embedded world, 1.x and 2.x, XL, and 3.
SHAPES, SD, XL, SD3 = "shapes", "sd15", "sdxl", "sd3"


def kind_of(source: str) -> str:
    """The kind of the model `source`, as a user names it; SD for what is none of the others. Never raises."""
    if source == SHAPES:
        return SHAPES
    return XL if is_xl(source) else SD3 if is_sd3(source) else SD


def is_xl(source: str) -> bool:
    """Whether `source`, as a user names a model, is a file or a folder of Stable Diffusion XL; never raises.

    A hub id is not looked up.
    """
    try:
        path = user_path(source)
        if path.is_dir():
            return {"unet", "text_encoder_2"} <= _index(path).keys()
        return path.suffix == ".safetensors" and _SECOND_ENCODER in _header(path)
    except (OSError, ValueError, AttributeError):  # what cannot be read is explained where it is loaded
        return False


def is_sd3(source: str) -> bool:
    """Whether `source` is a file or a folder of Stable Diffusion 3 or 3.5; never raises. A hub id is not looked up."""
    try:
        path = user_path(source)
        if path.is_dir():
            return "SD3Transformer2DModel" in _index(path).get("transformer", [])
        return path.suffix == ".safetensors" and _JOINT_BLOCK in _header(path)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text(encoding="utf-8-sig"))


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(size) if size <= LARGEST_HEADER else b""
