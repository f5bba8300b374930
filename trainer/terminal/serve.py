"""Serves a reward to trainings elsewhere: `python -m comfy_tdpo.trainer serve --reward NAME`."""

import argparse
import sys
from collections.abc import Sequence

from comfy_tdpo.rewards import PRECISIONS, load_reward, reward_names
from comfy_tdpo.rewards.remote import is_remote
from comfy_tdpo.rewards.remote.protocol import PORT

from ..config.parsing import check_used, reward_files
from .command_parser import CommandParser, status_of
from .streams import say
from .tastes import Paths

HOST, EVERYWHERE = "127.0.0.1", "0.0.0.0"


def main(argv: Sequence[str]) -> int:
    """Run the subcommand until Ctrl-C and return its exit status: 130 then, 1 it failed, 2 wrong input."""
    args = _parser().parse_args(argv)
    return status_of(lambda: _serve(args), "trainings that ask this reward wait a while for it to come back")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m comfy_tdpo.trainer serve",
        description="Answer with a reward's scores over HTTP, so that it can have an environment or a machine of its "
        "own. Train on it with --reward http://HOST:PORT. There is no password: listen only where you trust everybody.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--reward",
        required=True,
        metavar="NAME",
        help=f"one of {', '.join(reward_names())}, taste:FOLDER, or python:module:function",
    )
    parser.add_argument(
        "--host",
        type=_host,
        default=HOST,
        help=f"address to listen on (default: {HOST}, which only this machine reaches; {EVERYWHERE}: all of its "
        "addresses)",
    )
    parser.add_argument(
        "--port", type=_port, default=PORT, metavar="N", help=f"port to listen on (default: {PORT}; 0: any free one)"
    )
    parser.add_argument(
        "--reward-weights", default="", metavar="NAME=PATH,...", help="files or folders to load the reward from"
    )
    parser.add_argument(
        "--reward-precision", default="fp32", choices=PRECISIONS, help="precision of the reward's encoder"
    )
    return parser


def _host(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError(f"got an empty address; expected one of this machine, such as {HOST}")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number below 65536")
    return int(text)


def _serve(args: argparse.Namespace) -> str:
    tastes = Paths(reward_files(args.reward_weights))
    name = tastes.named(args.reward)
    check_used(tastes.known, [name])
    if is_remote(name):
        raise ValueError(f"got --reward {name!r}, which is a service itself; expected one that is computed here")
    from accelerate import Accelerator  # takes seconds to import

    from ..serving import RewardServer

    device = Accelerator().device
    model = load_reward(name, device, args.reward_precision, tastes.known)
    try:
        server = RewardServer(args.host, args.port, model, device)
    except OSError as error:
        raise ValueError(
            f"got --host {args.host} --port {args.port}, where nothing can listen: {error.strerror}; expected an "
            "address of this machine and a free port: choose another"
        ) from error
    everywhere = args.host == EVERYWHERE
    address = server.url.replace(EVERYWHERE, "ADDRESS") if everywhere else server.url
    where = " on all addresses of this machine, without a password" if everywhere else ""
    say(f"serving {name} on {device}{where}; train with --reward {address}; Ctrl-C ends it", sys.stderr)
    server.work()
    return "ended"
