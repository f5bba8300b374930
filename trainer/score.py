"""Scores image files: `python -m comfy_tdpo.trainer score --reward hpsv2.1 --prompt "a fox" *.png`.

Prints tab-separated lines, and under more than one image their mean and standard deviation, which is what
reward_scales takes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from torch import Tensor

from comfy_tdpo.rewards import (
    PRECISIONS,
    RewardError,
    RewardModel,
    load_reward,
    reward_names,
    score_images,
)
from comfy_tdpo.rewards.function import allow_functions

from .config import named_values

FINISHED, FAILED, WRONG_INPUT = 0, 1, 2


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit status: 0 done, 1 a reward failed, 2 wrong input."""
    allow_functions()  # the user names them here
    args = _parser().parse_args(argv)
    try:
        _score(args)
    except (ValueError, RewardError) as error:
        print(f"comfy_tdpo: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED if isinstance(error, RewardError) else WRONG_INPUT
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfy_tdpo.trainer score", description="Score image files with reward models."
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME",
        help=f"may be given several times; one of {', '.join(reward_names())}, or python:module:function",
    )
    parser.add_argument("--prompt", default="", help="what the images were drawn for; some rewards need none")
    parser.add_argument("--reward-weights", default="", metavar="NAME=PATH,...", help="files or folders to load from")
    parser.add_argument("--reward-precision", default="fp32", choices=PRECISIONS, help="of the encoders")
    return parser


def _score(args: argparse.Namespace) -> None:
    for path in args.images:
        _open(path).close()
    weights, device = _weights(args), Accelerator().device
    models = [load_reward(name, device, args.reward_precision, weights) for name in args.reward]
    for model in models:
        model.check_prompts([args.prompt])
    print("image", *args.reward, sep="\t")
    rows = []
    for path in args.images:
        rows.append(_scores(models, _load(path).to(device), args.prompt))
        _print(str(path), rows[-1])
    if len(rows) > 1:
        table = torch.stack(rows).double()
        _print("mean", table.mean(0))
        _print("standard deviation", table.std(0))


def _weights(args: argparse.Namespace) -> dict[str, str]:
    weights = named_values(args.reward_weights)
    for name, path in weights.items():
        if name not in args.reward or not path:
            raise ValueError(
                f"got --reward-weights {args.reward_weights!r}; expected NAME=PATH,... of rewards that --reward names"
            )
    return weights


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _load(path: Path) -> Tensor:
    """The image, (1, 3, H, W) in [0, 1], turned as its camera says; transparency is passed over."""
    with _open(path) as image:
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # of which Pillow would take everything above 255 for white
                grey = np.array(image).astype(np.float32) / 65535
                return torch.from_numpy(grey).expand(1, 3, -1, -1)
            if image.mode in ("I", "F"):
                raise ValueError(f"{path} has 32 bits a pixel, whose white nobody knows; expected 8 or 16")
            levels = np.array(image.convert("RGB"))
        except OSError as error:
            raise _unreadable(path, error) from error
    return torch.from_numpy(levels).permute(2, 0, 1)[None] / 255


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as an image: {error}; give PNG, JPEG or WebP files")


@torch.no_grad()
def _scores(models: list[RewardModel], image: Tensor, prompt: str) -> Tensor:
    """By each of `models`; an image at a time, since they may differ in size."""
    return torch.cat([score_images(model, image, [prompt]) for model in models]).cpu()


def _print(label: str, values: Tensor) -> None:
    print(label, *(f"{value:.6g}" for value in values.tolist()), sep="\t", flush=True)
