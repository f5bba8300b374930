"""Evaluates runs: `python -m comfy_tdpo.trainer evaluate RUN [RUN ...]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from comfy_tdpo.prompts import prompt_sets
from comfy_tdpo.rewards import FORMS, reward_names

from ..config.parsing import reward_files, split_names
from ..evaluation.asked import IMAGES, LAST, SEED, Options, PromptSet, ask, usual_folder
from ..evaluation.files import RESULTS, TABLE
from ..evaluation.numbers import Evaluation
from ..evaluation.table import told
from ..evaluation.work import evaluate
from ..run import RunFolder
from .command_parser import CommandParser, path_argument, status_of
from .progress import Progress
from .tastes import Paths


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit status: 0 done, 1 a reward failed, 2 wrong input, 130 stopped."""
    args = _parser().parse_args(argv)
    return status_of(lambda: _evaluate(args), "what was scored is saved: run the same command again to go on")


def _evaluate(args: argparse.Namespace) -> str:
    runs = [RunFolder.open(path) for path in args.runs]
    asked, folder = ask(runs, _options(args)), args.out or usual_folder(runs)
    from accelerate import Accelerator  # takes seconds to import

    with Progress("evaluating") as progress:
        found = evaluate(asked, folder, Accelerator().device, watch=progress.watch, tell=progress.tell)
    return f"{told(found)}\n\n{_files(found, folder)}"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m comfy_tdpo.trainer evaluate",
        description="Draw every snapshot of the runs and their base model from the same noise, score them, and write "
        "tables and plots. Runs that differ only in their seed are one set-up, whose curves have intervals. What was "
        "scored is not scored again: the command goes on where it was interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="the folders of the runs")
    parser.add_argument(
        "--rewards",
        metavar="NAME,NAME,...",
        help="rewards to judge by, besides the training rewards (default: those that the runs have measured): "
        f"{', '.join(reward_names())}, taste:FOLDER, {FORMS}",
    )
    parser.add_argument(
        "--prompts",
        metavar="SET,SET,...",
        help=f"prompt sets or files: {', '.join(prompt_sets())} (default: the unseen and the complex counterpart of "
        "the training prompts)",
    )
    parser.add_argument(
        "--images", type=int, default=IMAGES, metavar="N", help=f"images per prompt (default: {IMAGES})"
    )
    parser.add_argument(
        "--epochs",
        type=_epochs,
        default=(),
        metavar="E,E,...",
        help=f"epochs whose snapshots are evaluated; {LAST!r} is each run's last (default: all snapshots)",
    )
    parser.add_argument(
        "--reward-weights", default="", metavar="NAME=PATH,...", help="files or folders to load rewards from"
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="folder of the results (default: the folder 'evaluation' in that of the run or, for several, in the one "
        "that holds them)",
    )
    parser.epilog = f"The noise has the seed {SEED} for all runs, whatever theirs."
    return parser


def _epochs(text: str) -> tuple[int | str, ...]:
    try:
        return tuple(part if part == LAST else int(part) for part in map(str.strip, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected numbers of epochs with commas between them, such as 5,10, or {LAST!r}"
        ) from None


def _options(args: argparse.Namespace) -> Options:
    tastes = Paths(reward_files(args.reward_weights))
    rewards = None if args.rewards is None else tuple(tastes.named(name) for name in split_names(args.rewards))
    sets = tuple(PromptSet.load(source) for source in split_names(args.prompts or "none"))
    return Options(rewards, sets, args.images, args.epochs, tastes.known)


def _files(found: Evaluation, folder: Path) -> str:
    rows = [("all scores", RESULTS), ("tables", TABLE), *(("picture", name) for name in found.pictures)]
    return "\n".join(f"{label:<10}  {folder.resolve() / name}" for label, name in rows)
