"""Scores image files: `python -m comfy_tdpo.trainer score --reward hpsv2.1 --prompt "a fox" *.png`.

Prints tab-separated lines, followed for several images by their mean and standard deviation; reward_scales takes the
latter. See image_files.py for how files are read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator
from torch import Tensor

from comfy_tdpo.clean_text import one_line
from comfy_tdpo.interrupts import keyboard_interrupts
from comfy_tdpo.prompts.markup import check_words
from comfy_tdpo.rewards import (
    FORMS,
    PRECISIONS,
    RewardError,
    RewardModel,
    load_reward,
    reward_names,
    score_images,
)

from ..config.parsing import check_used, reward_files
from . import FAILED, FINISHED, STOPPED, WRONG_INPUT
from .image_files import check_image, read_image
from .tastes import Paths

_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit status: 0 done, 1 a reward failed, 2 wrong input, 130 stopped."""
    args = _parser().parse_args(argv)
    try:
        with keyboard_interrupts():
            _score(args)
    except (ValueError, RewardError) as error:
        _print(f"comfy_tdpo: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED if isinstance(error, RewardError) else WRONG_INPUT
    except KeyboardInterrupt:
        _print("comfy_tdpo: stopped", file=sys.stderr)
        return STOPPED
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfy_tdpo.trainer score", description="Score image files with one or more rewards."
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files to score")
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME",
        help=f"one of {', '.join(reward_names())}, taste:FOLDER, {FORMS}; may be repeated",
    )
    parser.add_argument(
        "--prompt",
        default="",
        help="prompt the images were made from, as plain words without weights; some rewards need none",
    )
    parser.add_argument(
        "--reward-weights", default="", metavar="NAME=PATH,...", help="files or folders to load rewards from"
    )
    parser.add_argument(
        "--reward-precision", default="fp32", choices=PRECISIONS, help="precision of the rewards' encoders"
    )
    return parser


def _score(args: argparse.Namespace) -> None:
    paths = _paths(args.images)
    tastes = Paths(reward_files(args.reward_weights))
    prompt, device = _prompt(args.prompt), Accelerator().device
    names = [tastes.named(name) for name in args.reward]
    check_used(tastes.known, names)
    models = [load_reward(name, device, args.reward_precision, tastes.known) for name in names]
    for model in models:
        model.check_prompts([prompt])
    _print("image", *names)
    rows = []
    for path in paths:
        rows.append(_scores(models, read_image(path).to(device), prompt))
        _row(str(path), rows[-1])
    if len(rows) > 1:
        table = torch.stack(rows).double()
        _row("mean", table.mean(0))
        _row("standard deviation", table.std(0))


def _paths(given: list[Path]) -> list[Path]:
    """The image files; ValueError if one is not an image, or is given twice and would count twice in the mean."""
    seen: dict[Path, Path] = {}
    for path in map(_without_tilde, given):
        check_image(path)
        if (file := path.resolve()) in seen:
            raise ValueError(f"got {path} and {seen[file]}, which are the same file; give each image once")
        seen[file] = path
    return list(seen.values())


def _without_tilde(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"got {path}, whose home folder cannot be found; write the full path") from error


def _prompt(text: str) -> str:
    """The prompt on one line; ValueError if it has the markup of another program, which rewards would read as words."""
    prompt = one_line(text)
    if prompt:
        try:
            check_words([("the prompt", prompt)])
        except ValueError as error:
            raise ValueError(f"--prompt {error}") from error
    return prompt


@torch.no_grad()
def _scores(models: list[RewardModel], image: Tensor, prompt: str) -> Tensor:
    """The scores of one image by each of `models`; one image at a time, since sizes may differ."""
    return torch.cat([score_images(model, image, [prompt]) for model in models]).cpu()


def _row(label: str, values: Tensor) -> None:
    _print(label, *(f"{value:.6g}" for value in values.tolist()))


def _print(*cells: str, file: TextIO | None = None) -> None:
    """Print a line of cells; escape what the console cannot encode and what would break the table."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    line = "\t".join(cell.translate(_ESCAPES) for cell in cells)
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
