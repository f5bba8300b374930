"""The options of `python -m comfy_tdpo.trainer`: one per setting, generated from the configuration's fields."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from comfy_tdpo import __version__
from comfy_tdpo.methods import ALGORITHMS
from comfy_tdpo.process import PROCESSES
from comfy_tdpo.prompts import prompt_sets
from comfy_tdpo.rewards import FORMS, reward_names
from comfy_tdpo.settings import NONE, section_of

from ..config import TrainConfig, leaf_fields, presets
from ..config.changes import changeable
from ..config.messages import nearest
from ..config.parsing import weighted
from . import WRONG_INPUT
from .command_parser import path_argument
from .tastes import with_named_tastes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(WRONG_INPUT, f"comfy_tdpo: {message}; --help lists all options\n")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m comfy_tdpo.trainer",
        usage="%(prog)s [--preset NAME] [--config FILE] [--run-dir DIR] [--reward NAME] [--SETTING VALUE ...]\n"
        "       %(prog)s --resume DIR [--epochs N]\n"
        "       %(prog)s plan [--preset NAME] [--SETTING VALUE ...]",
        description="Align a diffusion model with a reward, by TDPO-R (arXiv 2402.08552), or by ddpo-g, a recipe "
        "with guards. Without arguments, it trains on Shapes, the toy world that ships with the package, in a few "
        "minutes.",
        epilog="To see the denoising steps of a run before it begins, write `plan` before its options. To find the "
        "LoRA of a run to use, see `recommend --help`; to score image files with rewards, see `score --help`; to make "
        "a reward of pictures you like and dislike, see `taste --help`; to let a reward run elsewhere, see "
        "`serve --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"comfy_tdpo {__version__}")
    where = parser.add_argument_group("what to run and where")
    where.add_argument(
        "--preset",
        metavar="NAME",
        help=f"one of {', '.join(presets())} (default: shapes, shapes-flow for --model shapes-flow, sdxl for a "
        "--model of XL, sd3 for one of Stable Diffusion 3, flux-dev or flux-schnell for one of FLUX.1, z-image or "
        "z-image-turbo for one of Z-Image, or sd15 for any other)",
    )
    where.add_argument("--config", type=path_argument, metavar="FILE", help="TOML file that overrides the preset")
    where.add_argument(
        "--run-dir", type=path_argument, metavar="DIR", help="folder of the new run (default: runs/<date>)"
    )
    where.add_argument(
        "--resume",
        type=path_argument,
        metavar="DIR",
        help=f"resume the run in this folder; only {flags_of(changeable())} may change",
    )
    where.add_argument("--print-config", action="store_true", help="print the whole configuration and exit")
    where.add_argument(
        "--reward",
        action="append",
        metavar="NAME[=WEIGHT]",
        help=f"training reward; may be repeated: {', '.join(reward_names())}, taste:NAME, {FORMS}",
    )
    where.add_argument(
        "--eval-reward",
        action="append",
        metavar="NAME",
        help="reward to measure every epoch: a held-out reward, or part of the training sum; may be repeated",
    )
    where.add_argument(
        "--guard",
        action="append",
        metavar="NAME",
        help="reward that restrains the training, as guard_penalty and kl.gate say; may be repeated",
    )
    settings = parser.add_argument_group(
        "settings",
        "the defaults below are the paper's; the algorithm, the preset, --config and these options override them, in "
        "that order; --print-config shows the values that a run would use",
    )
    for name, info in leaf_fields():
        if name not in _REPEATED:
            # a switch without a value is turned on
            switch: dict[str, Any] = {"nargs": "?", "const": True} if info.annotation is bool else {}
            settings.add_argument(
                "--" + name.replace("_", "-"),
                dest=f"set:{name}",
                default=argparse.SUPPRESS,
                metavar="VALUE",
                **switch,
                help=_help(name, info).replace("%", "%%"),
            )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; ends the program with a one-line message if any is unknown."""
    parser = make_parser()
    args, unknown = parser.parse_known_args([with_dashes(text) for text in argv])
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = {option: action.help or "" for action in parser._actions for option in action.option_strings}
        meant = " or ".join(nearest(flag, known))
        hint = f"; did you mean {meant}?" if meant else ""
        if not flag.startswith("-"):
            hint = "; options begin with --"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


_REPEATED = {"rewards": "--reward", "eval_rewards": "--eval-reward", "guards": "--guard"}  # one value each time

# Settings whose values are names in a registry that can be extended.
_NAMES = {"algorithm": lambda: list(ALGORITHMS), "process": lambda: list(PROCESSES), "prompts": prompt_sets}


def flags_of(settings: Iterable[str]) -> str:
    """The options for these settings and whole sections, as text."""
    sections = {name for name, info in TrainConfig.model_fields.items() if section_of(info)}
    flags = [_flag(name, name in sections) for name in settings]
    return f"{', '.join(flags[:-1])} and {flags[-1]}"


def _flag(name: str, is_section: bool) -> str:
    if name in _REPEATED:
        return _REPEATED[name]
    return f"--{name}{'.*' if is_section else ''}".replace("_", "-")


def _help(name: str, info: Any) -> str:
    """What a setting means, its choices, and its default."""
    values = choices(name, info)
    default = NONE if info.default is None else info.default
    return f"{info.description}{': ' + ', '.join(values) if values else ''} (default: {default})"


def choices(name: str, info: Any) -> list[str]:
    """The values a setting may have; empty if they cannot be listed."""
    return _NAMES[name]() if name in _NAMES else _choices(info.annotation)


def _choices(annotation: Any) -> list[str]:
    """The values of an annotation's Literal, which may be part of a union."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def with_dashes(text: str) -> str:
    """An option with dashes; users may also spell it like its TOML key, with underscores."""
    flag, equals, value = text.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else text


def given(args: argparse.Namespace) -> list[str]:
    """The names of the given options that say what to train and where; settings by their dotted names."""
    options = ("preset", "config", "run_dir", "reward", "eval_reward", "guard")
    names = [name for name in options if getattr(args, name)]
    return names + [key.removeprefix("set:") for key in vars(args) if key.startswith("set:")]


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, as nested values.

    Raises:
        ValueError: a reward's weight is no number, or a taste does not exist.
    """
    values: dict[str, Any] = {}
    for key, value in vars(args).items():
        if key.startswith("set:"):
            *sections, name = key.removeprefix("set:").split(".")
            target = values
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
    if args.reward:
        values["rewards"] = weighted(args.reward)
    if args.eval_reward:
        values["eval_rewards"] = args.eval_reward
    if args.guard:
        values["guards"] = args.guard
    return with_named_tastes(values)
