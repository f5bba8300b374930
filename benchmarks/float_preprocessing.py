"""How far is preprocessing in floats from exact preprocessing? `python benchmarks/float_preprocessing.py`

Rewards see images as upstream's processors prepare them, rounded to 8 bits. Rounding has no gradient, so a gradient is
that of the same steps in floats (comfy_tdpo/rewards/pixels.py). This measures the difference between the two in grey
levels of 255 at the encoders' 224 pixels: on the pictures of this repository, on squares cut out of them, and on noise,
which is the worst case. Nothing is downloaded.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from comfy_tdpo.rewards import pixels
from comfy_tdpo.rewards.pixels import CLIP_STD, pillow_pixels, torchvision_pixels
from comfy_tdpo.trainer.terminal.image_files import read_image

ROOT = Path(__file__).parent.parent
FILES = (*sorted(ROOT.glob("docs/**/*.png")), *sorted(ROOT.glob("workflows/*.jpg")))
SIZE = 224
EXPLAINED = """\
- Pillow's: the floats behind the gradient of `pillow_pixels`, clamped to 0 to 255 after each axis, against its levels;
- clamped once: the same path with a single clamp at the end;
- bilinear: resizing that some trainers differentiate instead, without antialiasing, against the same exact levels;
- torchvision's: the float path of HPSv2's preprocessing, which rounds only its input, against the exact
  `torchvision_pixels`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, default=FILES, help="image files; none: the repository's")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    text = report(args.images, " ".join(["python benchmarks/float_preprocessing.py", *sys.argv[1:]]))
    args.out.write_text(text, encoding="utf-8")
    print(text)


def report(files: Sequence[Path], command: str) -> str:
    lines = [
        "# Preprocessing in floats against exact preprocessing",
        "",
        f"`{command}`",
        "",
        f"{date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, torch "
        f"{torch.__version__}. Mean and largest difference in grey levels of 255, at {SIZE} x {SIZE}.",
        "",
        EXPLAINED,
        f"| images | {' | '.join(WAYS)} |",
        "|---|---|---|---|---|",
    ]
    for name, images in kinds(files).items():
        lines.append(f"| {name} | {' | '.join(difference(images, *way) for way in WAYS.values())} |")
    return "\n".join(lines) + "\n"


def kinds(files: Sequence[Path]) -> dict[str, list[Tensor]]:
    """Images with values between the levels, as a decoder gives them, by what they are."""
    pictures = [between_levels(read_image(path)) for path in files]
    cuttings = [part for picture in pictures for part in squares(picture)]
    noise = list(torch.rand(4, 3, 512, 512, generator=torch.Generator().manual_seed(0)).split(1))
    return {
        f"{len(pictures)} whole pictures": pictures,
        f"{len(cuttings)} squares of 512 px from them": cuttings,
        "the same at 64 px": [F.interpolate(part, (64, 64), mode="area") for part in cuttings],
        f"{len(noise)} of noise, 512 px": noise,
        f"{len(noise)} of black and white noise": [(image > 0.5).float() for image in noise],
    }


def between_levels(image: Tensor) -> Tensor:
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return (image + noise / 255).clamp(0, 1)


def squares(picture: Tensor, side: int = 512) -> Iterator[Tensor]:
    height, width = picture.shape[-2:]
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            yield picture[..., top : top + side, left : left + side]


def smooth(preprocess: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], Tensor]:
    """The value of the path that the gradient is taken from."""

    def run(image: Tensor) -> Tensor:
        with patch.object(pixels, "_straight_through", lambda exact, smooth: smooth):
            return preprocess(image.clone().requires_grad_(), SIZE).detach()

    return run


def clamped_once(image: Tensor) -> Tensor:
    rows, columns = pixels._axes(image, SIZE, "rounded")
    return pixels._normalize(pixels._interpolate(image * 255, rows, columns).clamp(0, 255))


def bilinear(image: Tensor) -> Tensor:
    rows, columns = pixels._axes(image, SIZE, "rounded")
    resized = F.interpolate(image * 255, (rows.after, columns.after), mode="bilinear")
    return pixels._normalize(resized[..., rows.kept, columns.kept])


WAYS: dict[str, tuple[Callable, Callable]] = {
    "Pillow's": (smooth(pillow_pixels), pillow_pixels),
    "clamped once": (clamped_once, pillow_pixels),
    "bilinear": (bilinear, pillow_pixels),
    "torchvision's": (smooth(torchvision_pixels), torchvision_pixels),
}


def difference(images: list[Tensor], floats: Callable, exact: Callable) -> str:
    std = torch.tensor(CLIP_STD)[:, None, None]
    levels = torch.cat([((floats(image) - exact(image, SIZE)) * std * 255).abs().flatten() for image in images])
    return f"{levels.mean():.2f}, {levels.max():.1f}"


if __name__ == "__main__":
    main()
