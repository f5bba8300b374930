"""The parser of a subcommand's options."""

import argparse
from typing import Any

from . import WRONG_INPUT


class CommandParser(argparse.ArgumentParser):
    """Reports wrong options in one line that names the subcommand, the last word of `prog`."""

    def error(self, message: str) -> Any:
        command = self.prog.rpartition(" ")[2]
        self.exit(WRONG_INPUT, f"comfy_tdpo: {message}; `{command} --help` lists all options\n")
