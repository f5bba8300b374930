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
from PIL import Image, UnidentifiedImageError
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
    images = [_load(path) for path in args.images]
    weights, device = named_values(args.reward_weights), Accelerator().device
    models = [load_reward(name, device, args.reward_precision, weights) for name in args.reward]
    for model in models:
        model.check_prompts([args.prompt])
    print("image", *args.reward, sep="\t")
    rows = []
    for path, image in zip(args.images, images, strict=True):
        rows.append(_scores(models, image.to(device), args.prompt))
        _print(str(path), rows[-1])
    if len(rows) > 1:
        table = torch.stack(rows)
        _print("mean", table.mean(0))
        _print("standard deviation", table.std(0))


def _load(path: Path) -> Tensor:
    """The image, (1, 3, H, W) in [0, 1]."""
    try:
        with Image.open(path) as image:
            levels = np.array(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return torch.from_numpy(levels).permute(2, 0, 1)[None] / 255


def _scores(models: list[RewardModel], image: Tensor, prompt: str) -> Tensor:
    """By each of `models`; an image at a time, since they may differ in size."""
    return torch.cat([score_images(model, image, [prompt]) for model in models]).cpu()


def _print(label: str, values: Tensor) -> None:
    print(label, *(f"{value:.6g}" for value in values.tolist()), sep="\t", flush=True)
