"""What the subcommands have in common: their parser, and how they end."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_tdpo.interrupts import keyboard_interrupts
from comfy_tdpo.rewards import RewardError
from comfy_tdpo.user_files import user_path

from . import FAILED, FINISHED, STOPPED, WRONG_INPUT
from .streams import say


class CommandParser(argparse.ArgumentParser):
    """Reports wrong options in one line that names the subcommand, the last word of `prog`."""

    def error(self, message: str) -> Any:
        command = self.prog.rpartition(" ")[2]
        self.exit(WRONG_INPUT, f"comfy_tdpo: {message}; `{command} --help` lists all options\n")


def path_argument(text: str) -> Path:
    """The type of an argument that is a path."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def status_of(work: Callable[[], str], stopped: str) -> int:
    """Print what `work` returns, or in one line why it failed, or after Ctrl-C that it was `stopped`; the exit status:
    0 done, 1 it failed, 2 wrong input, 130 stopped."""
    try:
        with keyboard_interrupts():
            say(work())
    except (ValueError, RewardError, OSError) as error:
        say(f"comfy_tdpo: {' '.join(str(error).split())}", sys.stderr)
        return WRONG_INPUT if isinstance(error, ValueError) else FAILED
    except KeyboardInterrupt:
        say(f"comfy_tdpo: stopped; {stopped}", sys.stderr)
        return STOPPED
    return FINISHED
