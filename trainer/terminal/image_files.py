"""Image files as people see them: upright, opaque, sRGB, float in [0, 1].

- Transparency is flattened on white, as browsers and paint programs show it: the colours under transparent pixels are
  arbitrary.
- Of an animation, or a file of several images, the first one.
- Turned as the camera noted in EXIF.
- 16-bit grey is divided by 65535. Other files with 16 bits a channel are read to 8, which learned rewards round to.
- Colours are taken as sRGB: profiles are not applied, and CMYK is converted by the plain formula.
- 32-bit pixels are refused, since nothing says which value is white.
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
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # PNG's grey of 2 and 4 bits, which Pillow spreads over 0 to 255


class UnreadableImage(ValueError):
    """A file is no image that Pillow reads; the message names it."""


def check_image(path: Path) -> None:
    """Raise ValueError where `path` is no image that can be opened; its pixels are not read."""
    _open(path).close()


def read_image(path: Path) -> Tensor:
    """The image, float32 (1, 3, H, W) in [0, 1]. Raises ValueError where there is none."""
    with _open(path) as image, _quiet():
        if image.mode in ("I", "F") and not _is_grey_16(image):
            raise ValueError(
                f"{path} has 32 bits a pixel, whose white nobody knows; expected 8 or 16: save it as PNG or JPEG"
            )
        try:
            pixels = _pixels(image)
        except Exception as error:  # what Pillow raises for a damaged file is as various as files are
            raise _damaged(path, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _open(path: Path) -> Image.Image:
    """Pillow's image, of which only the header is read."""
    try:
        if reason := _why_not_a_file(path):
            raise _unreadable(path, reason)
        with _quiet():
            image = Image.open(path)
    except PermissionError as error:
        raise _unreadable(path, "you may not read it; change its permissions") from error
    except UnidentifiedImageError as error:
        reason = (
            f"it is damaged, or in a format that Pillow {PIL.__version__} does not read, such as HEIC, JPEG XL or SVG"
        )
        raise _unreadable(path, f"{reason}; save it as PNG, JPEG or WebP") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise _unreadable(path, f"Pillow opens up to {limit:,} pixels, and it has more; make it smaller") from error
    except UnreadableImage:
        raise
    except Exception as error:  # as above
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
        return "it is no regular file; save the image to one"
    return None if path.stat().st_size else "it is empty; copy or download it again"


def _damaged(path: Path, error: Exception) -> UnreadableImage:
    remedy = "it may be damaged or incomplete: copy or download it again, or save it as PNG or JPEG"
    return _unreadable(path, f"{str(error) or type(error).__name__}; {remedy}")


def _unreadable(path: Path, reason: str) -> UnreadableImage:
    return UnreadableImage(f"{path} cannot be read as an image: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings of odd metadata and of sizes that it opens all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _is_grey_16(image: Image.Image) -> bool:
    """Also where Pillow widens it to 32 bits: in PGM files, and before version 11 in PNG files."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _pixels(image: Image.Image) -> np.ndarray:
    """Float32 (H, W, 3) in [0, 1]."""
    grey_16 = _is_grey_16(image)  # whose format is forgotten when it is turned
    _mend_transparent_colour(image)
    image.load()
    image = _upright(image)
    if grey_16:
        return _grey_16(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("RGB"), dtype=np.float32) / 255


def _mend_transparent_colour(image: Image.Image) -> None:
    """PNG may name one colour as transparent, in the file's bits; Pillow compares it with 8-bit levels."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    tiles = getattr(image, "tile", None)
    if isinstance(colour, int) and image.mode == "L" and image.format == "PNG" and tiles:
        image.info["transparency"] = colour * _GREY_STEPS.get(tiles[0][3], 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF may be broken in any way; as in browsers, the image is then shown as it is
        return image


def _grey_16(image: Image.Image) -> np.ndarray:
    levels = np.array(image)
    grey = levels.astype(np.float32) / _LEVELS_16
    colour = image.info.get("transparency")
    if isinstance(colour, int):
        grey = np.where(levels == colour, np.float32(1), grey)
    return np.repeat(grey[..., None], 3, axis=-1)
