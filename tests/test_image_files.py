"""What `score` sees of files as cameras, browsers and paint programs save them."""

import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from comfy_tdpo.trainer.terminal.image_files import check_image, read_image

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def seen(path: Path) -> list[tuple[int, ...]]:
    """The levels of its pixels, row by row."""
    image = read_image(path)
    assert image.dtype == torch.float32 and image.shape[:2] == (1, 3)
    assert image.min() >= 0 and image.max() <= 1
    return [tuple(pixel) for pixel in (image[0] * 255).round().int().flatten(1).T.tolist()]


def png(path: Path, size: tuple[int, int], depth: int, kind: int, rows: list[bytes], transparent: bytes = b"") -> Path:
    """Written by hand, as Pillow does not write all that others do. kind: 0 grey, 2 RGB, 4 grey with alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    colour = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + colour + data + chunk(b"IEND", b""))
    return path


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


# --- transparency


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "tga", "ico"])
def test_transparency_is_white(tmp_path, kind):
    """Whatever colour hides under it."""
    picture = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 16, 8))
    picture.save(tmp_path / f"a.{kind}", lossless=True)
    assert seen(tmp_path / f"a.{kind}") == [RED] * 128 + [WHITE] * 128


def test_half_transparent_is_between_the_colour_and_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 100, 200, 128)).save(tmp_path / "a.png")
    expected = [round(level * 128 / 255 + 255 * 127 / 255) for level in (0, 100, 200)]
    assert np.abs(np.array(seen(tmp_path / "a.png")) - expected).max() <= 1  # Pillow's integers


def test_transparent_grey(tmp_path):
    Image.merge("LA", (Image.new("L", (2, 1), 10), Image.frombytes("L", (2, 1), b"\x00\xff"))).save(tmp_path / "a.png")
    assert seen(tmp_path / "a.png") == [WHITE, (10, 10, 10)]


@pytest.mark.parametrize("transparent", [1, bytes([255, 0])], ids=["one colour", "a table"])
@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_transparent_palette(tmp_path, kind, transparent):
    if kind == "gif" and transparent != 1:
        pytest.skip("GIF has one transparent colour at most")
    palette(2).save(tmp_path / f"a.{kind}", transparency=transparent)
    assert seen(tmp_path / f"a.{kind}") == [RED, WHITE]


def palette(width: int) -> Image.Image:
    """Red, then green."""
    image = Image.frombytes("P", (width, 1), bytes([0, 1])[:width])
    image.putpalette([*RED, *GREEN])
    return image


def test_an_opaque_palette_and_one_with_alpha(tmp_path):
    palette(2).save(tmp_path / "a.png")
    assert seen(tmp_path / "a.png") == [RED, GREEN]
    alpha = palette(2).convert("PA")
    alpha.putalpha(Image.frombytes("L", (2, 1), b"\xff\x00"))
    alpha.save(tmp_path / "a.tiff")
    assert seen(tmp_path / "a.tiff") == [RED, WHITE]


def test_a_colour_named_as_transparent(tmp_path):
    """PNG's tRNS, in the bits of the file; white has the level of a white pixel in all."""
    grey = png(tmp_path / "8.png", (2, 1), 8, 0, [bytes([7, 9])], words(7))
    assert seen(grey) == [WHITE, (9, 9, 9)]
    few = png(tmp_path / "2.png", (4, 1), 2, 0, [bytes([0b00011011])], words(1))
    assert seen(few) == [(0,) * 3, WHITE, (170,) * 3, (255,) * 3]
    fewer = png(tmp_path / "1.png", (8, 1), 1, 0, [bytes([0b11110000])], words(0))
    assert seen(fewer) == [WHITE] * 8
    deep = png(tmp_path / "16.png", (3, 1), 16, 0, [words(257, 1000, 65535)], words(1000))
    assert seen(deep) == [(1, 1, 1), WHITE, WHITE]
    colour = png(tmp_path / "rgb.png", (2, 1), 8, 2, [bytes([1, 2, 3, 4, 5, 6])], words(1, 2, 3))
    assert seen(colour) == [WHITE, (4, 5, 6)]
    deep_colour = png(
        tmp_path / "rgb16.png", (2, 1), 16, 2, [words(257, 514, 65535, 0, 0, 257)], words(257, 514, 65535)
    )
    assert seen(deep_colour) == [WHITE, (0, 0, 1)]


# --- depth and colour


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm", "jp2"])
def test_sixteen_bits_of_grey(tmp_path, kind):
    if kind == "jp2" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    Image.fromarray(np.array([[0, 257], [257 * 100, 65535]], np.uint16)).save(tmp_path / f"a.{kind}")
    assert seen(tmp_path / f"a.{kind}") == [(level,) * 3 for level in (0, 1, 100, 255)]


def test_sixteen_bits_the_other_way_round(tmp_path):
    Image.frombytes("I;16B", (2, 1), words(257 * 3, 65535)).save(tmp_path / "a.tiff")
    assert seen(tmp_path / "a.tiff") == [(3, 3, 3), WHITE]


def test_sixteen_bits_of_colour(tmp_path):
    assert seen(png(tmp_path / "a.png", (1, 1), 16, 2, [words(257, 257 * 2, 65535)])) == [(1, 2, 255)]
    assert seen(png(tmp_path / "b.png", (2, 1), 16, 4, [words(257, 65535, 257, 0)])) == [(1, 1, 1), WHITE]


def test_one_bit(tmp_path):
    Image.frombytes("1", (8, 1), b"\xf0").save(tmp_path / "a.png")
    assert seen(tmp_path / "a.png") == [WHITE] * 4 + [(0, 0, 0)] * 4


@pytest.mark.parametrize("kind", ["jpg", "tiff"])
def test_inks(tmp_path, kind):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / f"a.{kind}", quality=100)
    assert np.abs(np.array(seen(tmp_path / f"a.{kind}")) - RED).max() <= 2  # JPEG


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_unknown_white_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="a.tiff has 32-bit pixels, which define no white; expected 8 or 16"):
        read_image(tmp_path / "a.tiff")


# --- several images in a file, and their orientation


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_several_images_the_first_is_seen(tmp_path, kind):
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), GREEN)
    first.save(tmp_path / f"a.{kind}", save_all=True, append_images=[second], lossless=True)
    assert seen(tmp_path / f"a.{kind}") == [RED] * 16


def test_of_a_cameras_pair_the_first_is_seen(tmp_path):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), GREEN)
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=100)
    assert np.abs(np.array(seen(tmp_path / "a.jpg")) - RED).max() <= 2


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_it_is_turned_as_the_camera_says(tmp_path, kind):
    """6: the camera was held on its side, so that the first row is the right column."""
    picture = Image.frombytes("RGB", (2, 1), bytes([*RED, *GREEN]))
    picture.save(tmp_path / f"a.{kind}", exif=exif(6), lossless=True)
    assert read_image(tmp_path / f"a.{kind}").shape == (1, 3, 2, 1)
    assert seen(tmp_path / f"a.{kind}") == [RED, GREEN]
    grey = Image.fromarray(np.array([[0, 65535]], np.uint16))
    grey.save(tmp_path / "deep.png", exif=exif(3))
    assert seen(tmp_path / "deep.png") == [WHITE, (0, 0, 0)]
    palette(2).save(tmp_path / "clear.png", exif=exif(3), transparency=1)
    assert seen(tmp_path / "clear.png") == [WHITE, RED]


def test_broken_exif_turns_nothing(tmp_path):
    for name, noise in (("a", b"Exif\0\0garbage"), ("b", b"Exif\0\0MM\0*\0\0\xff\xff"), ("c", b"Exif\0\0")):
        Image.new("RGB", (8, 8), WHITE).save(tmp_path / f"{name}.jpg", exif=noise)
        assert seen(tmp_path / f"{name}.jpg") == [WHITE] * 64


# --- what is no image


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
def test_a_file_that_ends_too_soon_is_refused(tmp_path, kind):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path := tmp_path / f"a.{kind}")
    cut(path, 0.5)
    with pytest.raises(ValueError, match=f"a.{kind} cannot be read as an image: .*(copy or download|save it as PNG)"):
        read_image(path)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("gone.png"))


def no_pixels(path: Path) -> None:
    path.write_bytes(b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";")


def hollow(path: Path) -> None:
    png(path, (0, 4), 8, 0, [b""] * 4)


NO_IMAGES = {
    "folder": (folder, "it is a folder; give the files in it, as in .*png"),
    "nothing": (lambda path: None, "there is no such file; check the path"),
    "link": (link_to_nothing, "there is no such file; check the path"),
    "pipe": (os.mkfifo, "it is not a regular file; save the image to one"),
    "empty": (Path.touch, "it is empty; copy or download it again"),
    "text": (lambda path: path.write_text("<html>not found</html>"), "it is damaged, or in a format that Pillow"),
    "HEIC": (lambda path: path.write_bytes(b"\0\0\0 ftypheic\0\0\0\0mif1heic"), "HEIC.*; save it as PNG"),
    "no pixels": (no_pixels, "copy or download|expected at least one|damaged"),
    "no columns": (hollow, "copy or download|expected at least one|damaged"),
}


@pytest.mark.parametrize("case", NO_IMAGES)
def test_what_is_no_image_is_named(tmp_path, case):
    make, complaint = NO_IMAGES[case]
    path = tmp_path / "a.png"
    make(path)
    for read in (check_image, read_image):
        with pytest.raises(ValueError, match=f"^.*a.png cannot be read as an image: .*({complaint})"):
            read(path)


def test_a_socket_is_no_image(tmp_path):
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("this system has none")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        with pytest.raises(ValueError, match="it is not a regular file"):
            check_image(tmp_path / "s")


def test_an_image_as_large_as_pillow_opens_is_read_without_a_word(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    Image.new("RGB", (10, 10), RED).save(tmp_path / "a.png")
    assert len(seen(tmp_path / "a.png")) == 100
    assert not recwarn.list
    Image.new("RGB", (20, 10), RED).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png cannot be read as an image: it has more than 120 pixels"):
        read_image(tmp_path / "a.png")
