"""Makes a reward of pictures that somebody likes and dislikes: `python -m comfy_tdpo.trainer taste NAME`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from comfy_tdpo.counts import number_of
from comfy_tdpo.rewards import reward_names
from comfy_tdpo.tastes.folder import TasteFolder, file_of
from comfy_tdpo.tastes.names import name_of, usual_encoder
from comfy_tdpo.tastes.votes import Pair, Thumb, Vote

from ..config.parsing import check_used, reward_files
from .command_parser import CommandParser, path_argument, status_of
from .image_files import read_image
from .tastes import TASTES, taste_path
from .vote_files import Opinion, opinions_in, opinions_of


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit status: 0 done, 1 it failed, 2 wrong input, 130 stopped."""
    args = _parser().parse_args(argv)
    return status_of(lambda: _told(args), "run the same command again to go on")


def _told(args: argparse.Namespace) -> str:
    weights = reward_files(args.reward_weights)
    taste, new = _vote(args, weights)
    return "\n".join([*_about(taste, new), *_sureness(taste, weights)])


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m comfy_tdpo.trainer taste",
        description="Make a reward of pictures that you like and dislike, or add to it. The pictures are copied into "
        "the taste's folder. Prints how many votes the taste has and how sure it is; train on it with --reward "
        "taste:NAME.",
        allow_abbrev=False,
    )
    parser.add_argument("taste", metavar="NAME_OR_FOLDER", help=f"a folder, or a name for one in {TASTES}/")
    for name, what in (("liked", "pictures that you like"), ("disliked", "pictures that you do not like")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            type=path_argument,
            metavar="DIR",
            help=f"folder of {what}; may be repeated",
        )
    parser.add_argument(
        "--ratings",
        action="append",
        default=[],
        type=path_argument,
        metavar="FILE.csv",
        help="table with the columns image, a path relative to the table, and rating, a number; may be repeated",
    )
    parser.add_argument(
        "--encoder",
        choices=reward_names(),
        metavar="NAME",
        help="reward whose image encoder reads the pictures; fixed when the taste is made (default: shapes-aesthetic "
        "if the first picture has 64 x 64 pixels, as those of Shapes have, else aesthetic, which is CLIP ViT-L/14)",
    )
    parser.add_argument(
        "--reward-weights", default="", metavar="NAME=PATH,...", help="file or folder to load the encoder's reward from"
    )
    return parser


# --- votes ------------------------------------------------------------------------------------------------------------


def _vote(args: argparse.Namespace, weights: dict[str, str]) -> tuple[TasteFolder, int]:
    """The taste, and how many votes were added; `weights` are files or folders of its encoder's reward."""
    opinions = [opinion for folder in args.liked for opinion in opinions_in(folder, 1.0)]
    opinions += [opinion for folder in args.disliked for opinion in opinions_in(folder, 0.0)]
    opinions += [opinion for table in args.ratings for opinion in opinions_of(table)]
    taste = TasteFolder(taste_path(args.taste))
    if not opinions and not taste.exists:
        raise ValueError(
            f"got the taste '{taste.path}', which does not exist; expected one, or pictures to make it of: add --liked "
            "DIR and --disliked DIR, or --ratings FILE.csv"
        )
    if args.encoder:
        from comfy_tdpo.rewards.taste import check_encoder  # takes seconds to import

        check_encoder(args.encoder)
    encoder = args.encoder or _usual_encoder(taste, opinions)
    check_used(weights, [encoder])
    return keep_opinions(taste.path, opinions, encoder)


def keep_opinions(path: Path, opinions: list[Opinion], encoder: str | None = None) -> tuple[TasteFolder, int]:
    """Add `opinions` to the taste at `path`, made if there is none; returns it, and how many votes were new."""
    votes = _votes_of(opinions)
    taste = TasteFolder.create(path, encoder or _usual_encoder(TasteFolder(path), opinions))
    for opinion in opinions:
        taste.keep(read_image(opinion.path)[0])
    return taste, taste.append(votes)


def _usual_encoder(taste: TasteFolder, opinions: list[Opinion]) -> str:
    return taste.encoder if taste.exists else usual_encoder(*read_image(opinions[0].path).shape[-2:])


def _votes_of(opinions: list[Opinion]) -> list[Vote]:
    """One vote per picture; ValueError if a file is no picture, or a picture has different votes."""
    votes: dict[str, tuple[Path, Thumb]] = {}
    for opinion in opinions:
        vote = Thumb(file_of(read_image(opinion.path)[0]), opinion.liked, opinion.prompt)
        other, before = votes.setdefault(vote.image, (opinion.path, vote))
        if before.liked != vote.liked:
            raise ValueError(
                f"got {opinion.path} and {other}, the same picture, with different votes; expected one: remove "
                "the other"
            )
    return [vote for _, vote in votes.values()]


# --- what the taste is like -------------------------------------------------------------------------------------------


def _about(taste: TasteFolder, new: int) -> list[str]:
    votes, torn = taste.counted(), taste.cut_off()
    lines = [
        f"{name_of(taste.path.absolute())}  {taste.path.absolute()}, read by the encoder of {taste.encoder}",
        f"votes     {len(votes)}: {_kinds(votes)}; {new} new",
    ]
    return lines + ([f"damaged   {number_of(torn, 'line')} cut off in mid-write, not counted"] if torn else [])


def _kinds(votes: list[Vote]) -> str:
    thumbs = [vote.liked for vote in votes if isinstance(vote, Thumb)]
    liked, disliked = thumbs.count(1.0), thumbs.count(0.0)
    pairs = sum(isinstance(vote, Pair) for vote in votes)
    between = len(thumbs) - liked - disliked
    return f"{liked} liked, {disliked} disliked, {between} rated between, {number_of(pairs, 'pair')}"


def _sureness(taste: TasteFolder, weights: dict[str, str]) -> list[str]:
    from accelerate import Accelerator  # takes seconds to import

    from comfy_tdpo.rewards.taste import load_encoder, report

    device = Accelerator().device
    encoder = load_encoder(taste.encoder, taste.path, device, "fp32", weights)
    try:
        found = report(taste, encoder, device)
    except ValueError as error:
        return [f"not yet   {error}"]
    return [
        f"sure      it predicts {found.predicted} of {found.votes} votes from the others, and expects to order "
        f"{100 * found.sureness:.0f} % of pairs of its pictures as you would",
        f"use it    --reward taste:{taste.path}",
    ]
