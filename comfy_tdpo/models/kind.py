"""What kind a model is of, by the index of its folder or the header of its file alone. Cheap: imports no torch."""

import json
from pathlib import Path
from typing import Any

from ..user_files import user_path

FLOW_OF_SHAPES = "ShapesFlow"  # the class in the index of its folder, for which diffusers has no pipeline
LARGEST_HEADER = 2**27  # bytes; of a whole checkpoint, a header has less than a million
FLUX_GUIDANCE = "guidance_in.in_layer.weight"  # in a single file of FLUX.1 dev
_FLUX_NORM = b"double_blocks.0.img_attn.norm.key_norm."  # in one of FLUX.1, with scale or weight after it
_PAD_TOKEN = b'cap_pad_token"'  # in a single file of Z-Image, under any prefix, and of no other family
_SECOND_ENCODER = b'"conditioner.embedders.1.model.'  # in a single file of XL, and of no other family
_JOINT_BLOCK = b'joint_blocks.0.x_block.attn.qkv.weight"'  # in a single file of SD 3


# The kinds of models, named like the presets that suit them. SHAPES and SHAPES_FLOW are the embedded world's, SD is 1.x
# and 2.x.
SHAPES, SHAPES_FLOW, SD, XL, SD3 = "shapes", "shapes-flow", "sd15", "sdxl", "sd3"
FLUX_DEV, FLUX_SCHNELL, Z_IMAGE, Z_IMAGE_TURBO = "flux-dev", "flux-schnell", "z-image", "z-image-turbo"


def kind_of(source: str) -> str:
    """The kind of the model `source`, as a user names it; SD for what is none of the others. Never raises."""
    if source in (SHAPES, SHAPES_FLOW):
        return source
    if is_z_image(source):
        return Z_IMAGE_TURBO if is_z_image_turbo(source) else Z_IMAGE
    kinds = {XL: is_xl, SD3: is_sd3, FLUX_DEV: is_flux_dev, FLUX_SCHNELL: is_flux_schnell}
    return next((kind for kind, fits in kinds.items() if fits(source)), SD)


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


def is_flux(source: str) -> bool:
    """Whether `source` is a file or a folder of FLUX.1, dev or schnell; never raises."""
    return bool(_flux(source))


def is_flux_dev(source: str) -> bool:
    """Whether `source` is a file or a folder of FLUX.1 dev, which is conditioned on guidance; never raises."""
    return _flux(source) == "dev"


def is_flux_schnell(source: str) -> bool:
    """Whether `source` is a file or a folder of FLUX.1 schnell; never raises."""
    return _flux(source) == "schnell"


def _flux(source: str) -> str:
    """ "dev" or "schnell", or an empty string for what is not FLUX.1."""
    try:
        path = user_path(source)
        if path.is_dir():
            found = "FluxTransformer2DModel" in _index(path).get("transformer", [])
            config = path / "transformer" / "config.json"  # what is found on the hub has an index alone
            guided = found and config.is_file() and _json(config).get("guidance_embeds", False)
        else:
            header = _header(path) if path.suffix == ".safetensors" else b""
            found, guided = _FLUX_NORM in header, f'{FLUX_GUIDANCE}"'.encode() in header
        return ("dev" if guided else "schnell") if found else ""
    except (OSError, ValueError, AttributeError, TypeError):
        return ""


def is_z_image(source: str) -> bool:
    """Whether `source` is a folder or a file of Z-Image, the base model or Turbo; never raises."""
    try:
        path = user_path(source)
        if path.is_dir():
            return "ZImageTransformer2DModel" in _index(path).get("transformer", [])
        return path.suffix == ".safetensors" and _PAD_TOKEN in _header(path)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def is_z_image_turbo(source: str) -> bool:
    """Whether Z-Image at `source` is Turbo, by the noise levels of its folder, or of the file's; never raises."""
    try:
        path = user_path(source)
        folder = path if path.is_dir() else path.parent
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8-sig"))
        return is_turbo_shift(scheduler["shift"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_turbo_shift(shift: float) -> bool:
    """Whether Z-Image with this shift is Turbo, which has 3. The base model has 6, and the same layers."""
    return shift < 6


def is_flow_of_shapes(source: str) -> bool:
    """Whether `source` is the folder of a flow model in a world of Shapes; never raises."""
    try:
        return _index(user_path(source)).get("_class_name") == FLOW_OF_SHAPES
    except (OSError, ValueError, AttributeError):
        return False


def _index(folder: Path) -> dict[str, Any]:
    return _json(folder / "model_index.json")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(size) if size <= LARGEST_HEADER else b""
