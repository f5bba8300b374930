"""Reads image files as people see them: upright, opaque, sRGB, float in [0, 1].

- Transparency is flattened onto white, as in browsers and paint programs: the colours under transparent pixels are
  arbitrary.
- Only the first image of an animation, or of a file with several images, is read.
- Images are rotated according to their EXIF orientation.
- 16-bit grey is divided by 65535. Other files with 16 bits per channel are read with 8, to which learned rewards round.
- Colours are assumed to be sRGB: profiles are ignored, and CMYK is converted by the plain formula.
- 32-bit pixels are rejected, since no value is defined as white.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

_LEVELS_16 = 65535
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow multiplies 2-bit and 4-bit PNG grey by these


class UnreadableImage(ValueError):
    """Pillow cannot read a file as an image; the message names the file."""


def check_image(path: Path) -> None:
    """Raise ValueError if `path` cannot be opened as an image; its pixels are not read."""
    _open(path).close()


def read_image(path: Path) -> Tensor:
    """The image, float32 (1, 3, H, W) in [0, 1]. Raises ValueError if it cannot be read."""
    with _open(path) as image, _quiet():
        if image.mode in ("I", "F") and not _is_grey_16(image):
            raise ValueError(
                f"{path} has 32-bit pixels, which define no white; expected 8 or 16 bits: save it as PNG or JPEG"
            )
        try:
            pixels = _pixels(image)
        except Exception as error:  # Pillow raises almost anything for damaged files
            raise _damaged(path, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _open(path: Path) -> Image.Image:
    """Open an image with Pillow, which reads only its header."""
    try:
        if reason := _why_not_a_file(path):
            raise _unreadable(path, reason)
        with _quiet():
            image = Image.open(path)
    except PermissionError as error:
        raise _unreadable(path, "permission denied; change its permissions") from error
    except UnidentifiedImageError as error:
        reason = (
            f"it is damaged, or in a format that Pillow {PIL.__version__} does not read, such as HEIC, JPEG XL or SVG"
        )
        raise _unreadable(path, f"{reason}; save it as PNG, JPEG or WebP") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise _unreadable(path, f"it has more than {limit:,} pixels, Pillow's limit; make it smaller") from error
    except UnreadableImage:
        raise
    except Exception as error:  # as in read_image
        raise _damaged(path, error) from error
    if 0 in image.size:
        image.close()
        raise _unreadable(path, f"it has {image.width} x {image.height} pixels; expected at least one")
    return image


def _why_not_a_file(path: Path) -> str | None:
    if path.is_dir():
        return f"it is a folder; give the files in it, as in {path / '*.png'}"
    if not path.exists():
        return "there is no such file; check the path"
    if not path.is_file():
        return "it is not a regular file; save the image to one"
    return None if path.stat().st_size else "it is empty; copy or download it again"


def _damaged(path: Path, error: Exception) -> UnreadableImage:
    remedy = "it may be damaged or incomplete: copy or download it again, or save it as PNG or JPEG"
    return _unreadable(path, f"{str(error) or type(error).__name__}; {remedy}")


def _unreadable(path: Path, reason: str) -> UnreadableImage:
    return UnreadableImage(f"{path} cannot be read as an image: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings about odd metadata, and about large images that it opens anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _is_grey_16(image: Image.Image) -> bool:
    """Whether it is 16-bit grey, which Pillow widens to 32 bits in PGM files, and before version 11 in PNG files."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _pixels(image: Image.Image) -> np.ndarray:
    """Float32 (H, W, 3) in [0, 1]."""
    grey_16 = _is_grey_16(image)  # before rotation, which drops the image's format
    _mend_transparent_colour(image)
    image.load()
    image = _upright(image)
    if grey_16:
        return _grey_16(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("RGB"), dtype=np.float32) / 255


def _mend_transparent_colour(image: Image.Image) -> None:
    """Scale a PNG's transparent colour, given in the file's bit depth, to the 8-bit levels that Pillow compares."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    tiles = getattr(image, "tile", None)
    if isinstance(colour, int) and image.mode == "L" and image.format == "PNG" and tiles:
        image.info["transparency"] = colour * _GREY_STEPS.get(tiles[0][3], 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF may be broken in any way; as in browsers, the image is then not rotated
        return image


def _grey_16(image: Image.Image) -> np.ndarray:
    levels = np.array(image)
    grey = levels.astype(np.float32) / _LEVELS_16
    colour = image.info.get("transparency")
    if isinstance(colour, int):
        grey = np.where(levels == colour, np.float32(1), grey)
    return np.repeat(grey[..., None], 3, axis=-1)
