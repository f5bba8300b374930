"""Recommends a run's LoRA and its strength: `python -m comfy_tdpo.trainer recommend RUN`."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence

from comfy_tdpo.rewards import FORMS, reward_names

from ..metrics import columns_of, padded, readable, shortened
from ..recommend.choice import CONFIDENCE, Outcome, Recommendation
from ..recommend.files import FRONTIER, PICTURE, TABLE
from ..recommend.options import STRENGTHS, TOLERANCE, Options
from ..recommend.work import CLOSER, recommend
from ..run import RunFolder
from .command_parser import CommandParser, path_argument, status_of
from .progress import Progress

RULE = (
    "The rule: of all snapshots and strengths whose training reward is above the base model's, and whose held-out "
    f"reward is at most --tolerance standard deviations below it with {CONFIDENCE:.0%} confidence, the one with the "
    f"highest training reward is recommended. If there is none, the nearest are drawn {CLOSER} times as often and "
    "judged again; if there still is none, none is recommended. All are drawn from the same noise, and what was "
    "chosen is measured again on fresh noise. What was drawn is kept in the run's folder and not drawn again."
)


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit status: 0 done, 1 a reward failed, 2 wrong input, 130 stopped."""
    args = _parser().parse_args(argv)
    return status_of(lambda: _recommend(args), "what was scored is saved: run the same command again to go on")


def _recommend(args: argparse.Namespace) -> str:
    run = RunFolder.open(args.run)
    options = _options(args, run)
    from accelerate import Accelerator  # takes seconds to import

    with Progress("recommending") as progress:
        found = recommend(run, options, Accelerator().device, watch=progress.watch, tell=progress.tell)
    return told(run, found)


def command(run: RunFolder) -> str:
    """The command that recommends for `run`, or goes on with it."""
    return shlex.join([sys.executable, "-m", str(__package__).rpartition(".")[0], "recommend", str(run.path)])


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m comfy_tdpo.trainer recommend",
        description="Find the LoRA of a run to use, and the strength to use it at, and write it with its strength "
        "baked in as lora/recommended.safetensors. " + RULE,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="the folder of the run")
    parser.add_argument(
        "--strengths",
        type=_numbers,
        default=STRENGTHS,
        metavar="S,S,...",
        help=f"strengths to draw every snapshot at (default: {','.join(f'{strength:g}' for strength in STRENGTHS)})",
    )
    parser.add_argument(
        "--held-out",
        metavar="NAME",
        help="reward to judge by, which the run must not train on (default: the one that the run watches for "
        f"overoptimisation, else its first held-out reward that may choose): {', '.join(reward_names())}, {FORMS}",
    )
    parser.add_argument(
        "--prompts",
        metavar="SET",
        help="prompt set or file, of prompts that the run has not trained on (default: shapes-unseen for Shapes, "
        "unseen-animals for simple-animals, else the run's grid prompts, else its training prompts)",
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images per snapshot and strength (default: the run's output.recommend_images)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="how far the held-out reward may be below the base model's, in standard deviations of the base's images "
        f"(default: {TOLERANCE:g})",
    )
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected numbers with commas between them, such as 0.5,0.75,1"
        ) from None


def _options(args: argparse.Namespace, run: RunFolder) -> Options:
    images = run.config.output.recommend_images if args.images is None else args.images
    return Options(args.strengths, args.prompts, args.held_out, images, args.tolerance)


# --- the result as text -----------------------------------------------------------------------------------------------


def told(run: RunFolder, found: Recommendation) -> str:
    """The table, the verdict and the files; at most 100 columns wide except for paths."""
    told = f"{_verdict(found)} Images: {run.config.drawn_with_told}."
    verdict = textwrap.fill(told, 100, break_on_hyphens=False, break_long_words=False)
    return "\n\n".join([_table(found), verdict, _files(run, found)])


def _table(found: Recommendation) -> str:
    head = ("snapshot", "strength", shortened(found.training, 28), shortened(found.held_out, 28), "change", "")
    rows = [head, _row(found.base), *map(_row, found.outcomes)]
    if found.chosen is not None:
        at = 2 + found.outcomes.index(found.chosen)
        rows[at] = (*rows[at][:-1], "recommended")
    widths = [max(columns_of(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(_line(row, widths).rstrip() for row in rows)


def _row(outcome: Outcome) -> tuple[str, ...]:
    change = "-" if outcome.cell.is_base else _change(outcome)
    strength = "-" if outcome.cell.is_base else f"{outcome.cell.strength:g}"
    return outcome.cell.label, strength, readable(outcome.training), readable(outcome.held_out), change, ""


def _change(outcome: Outcome) -> str:
    size = readable(outcome.change, like=outcome.held_out, sign="+")
    return f"{size} ± {readable(outcome.error, like=outcome.held_out)}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *cells, last = row
    aligned = [" " * (width - columns_of(cell)) + cell for cell, width in zip(cells, widths[1:-1], strict=True)]
    return "  ".join([padded(first, widths[0]), *aligned, last])


def _verdict(found: Recommendation) -> str:
    allowed = f"{readable(found.allowed, like=found.base.held_out)} below the base model's"
    if found.fresh is None:
        near = found.nearest
        nearest = f" The nearest is {near[0].cell.label} at strength {near[0].cell.strength:g}." if near else ""
        return (
            f"No snapshot is recommended: none has a higher {found.training} than the base model and a "
            f"{found.held_out} at most {allowed} with {CONFIDENCE:.0%} confidence.{nearest} Use the base model, try "
            "lower --strengths or more prompts, or train with a KL penalty (--kl.coefficient)."
        )
    fresh = found.fresh
    more = "" if fresh.change >= -found.allowed else ", which is more than that: be careful with it"
    gain = readable(fresh.gain, like=fresh.training, sign="+")
    return (
        f"Recommended: {fresh.cell.label} at strength {fresh.cell.strength:g}, the highest {found.training} among "
        f"those whose {found.held_out} is at most {allowed} with {CONFIDENCE:.0%} confidence. On fresh noise, its "
        f"{found.training} changes by {gain} and its {found.held_out} by {_change(fresh)}{more}. Prompts: "
        f"{found.prompts}; ± is the standard error of the change."
    )


def _files(run: RunFolder, found: Recommendation) -> str:
    folder = run.recommendation.resolve()
    rows = [("picture", folder / PICTURE), ("frontier", folder / FRONTIER), ("all scores", folder / TABLE)]
    if found.chosen is not None:
        rows.insert(0, ("to use" if run.trains_all else "LoRA to use", run.recommended_lora.resolve()))
    return "\n".join(f"{label:<11}  {path}" for label, path in rows)
