"""The command line: `python -m comfy_tdpo.trainer`."""

import argparse
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from comfy_tdpo import __version__
from comfy_tdpo.rewards import RewardError, allow_functions

from .config import ALGORITHMS, TrainConfig, leaf_fields, make_config, plain_values, presets
from .keeping import TrainingError
from .run import RunFolder

FINISHED, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 finished, 1 failed, 2 wrong input, 130 stopped by the user."""
    allow_functions()  # whoever types a command may name his own function
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["score"]:
        from .score import main as score

        return score(argv[1:])
    args = _parser().parse_args(argv)
    try:
        if args.print_config:
            return _print_config(_config(args))
        return _train(args)
    except KeyboardInterrupt:  # while it still loads; from then on _stopping_on_signals sees to it
        return _complain("stopped before there was anything to save", STOPPED)
    except ValueError as error:
        return _complain(error, WRONG_INPUT)
    except (OSError, SafetensorError, RewardError) as error:
        return _complain(f"{error}; what was saved before is whole: mend the cause, then go on with --resume", FAILED)
    except TrainingError as error:
        return _complain(error, FAILED)


def _complain(error: object, status: int) -> int:
    print(f"comfy_tdpo: {' '.join(str(error).split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(WRONG_INPUT, f"comfy_tdpo: {message}; --help lists what there is\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m comfy_tdpo.trainer",
        description="Align a diffusion model with a reward by TDPO-R (arXiv 2402.08552). "
        "Without arguments it trains on the embedded world, Shapes, in a few minutes.",
        epilog="`score --help` tells how to score image files with rewards.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"comfy_tdpo {__version__}")
    where = parser.add_argument_group("what to run and where")
    where.add_argument(
        "--preset",
        metavar="NAME",
        help=f"one of {', '.join(presets())} (default: shapes; sd14-aesthetic where --model is another)",
    )
    where.add_argument("--config", type=Path, metavar="FILE", help="TOML file laid over the preset")
    where.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the new run (default: runs/<date>)")
    where.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in this folder")
    where.add_argument("--print-config", action="store_true", help="print the whole configuration and exit")
    where.add_argument(
        "--reward", action="append", metavar="NAME[=WEIGHT]", help="training reward; may be given several times"
    )
    where.add_argument("--eval-reward", action="append", metavar="NAME", help="reward that only watches; likewise")
    settings = parser.add_argument_group("settings", "later ones win: paper, algorithm, preset, --config, these")
    for name, info in leaf_fields():
        if name not in ("rewards", "eval_rewards"):
            settings.add_argument(
                "--" + name.replace("_", "-"),
                dest=f"set:{name}",
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=(info.description + (f" ({', '.join(ALGORITHMS)})" if name == "algorithm" else "")).replace(
                    "%", "%%"
                ),
            )
    return parser


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, as nested values."""
    values: dict[str, Any] = {}
    for key, value in vars(args).items():
        if key.startswith("set:"):
            *sections, name = key.removeprefix("set:").split(".")
            target = values
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
    if args.reward:
        values["rewards"] = dict(_weighted(text) for text in args.reward)
    if args.eval_reward:
        values["eval_rewards"] = args.eval_reward
    return values


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise ValueError(f"got --reward {text!r}; expected NAME or NAME=WEIGHT with a number") from None


def _config(args: argparse.Namespace) -> TrainConfig:
    return make_config(args.preset, args.config, _overrides(args))


def _print_config(config: TrainConfig) -> int:
    import tomli_w

    print(tomli_w.dumps(plain_values(config)), end="")
    return FINISHED


def _train(args: argparse.Namespace) -> int:
    from .assemble import assemble
    from .console import Console

    run, config = _resumed_run(args) if args.resume else _new_run(args)
    stop = threading.Event()
    console = Console(config, first_epoch=len(run.metrics()) + 1)
    try:
        training = assemble(config, run, stop, console.watch)
        with _stopping_on_signals(stop):
            if not training.accelerator.is_main_process:
                deque(training.epochs(), maxlen=0)  # the main process tells of them
                return STOPPED if training.stopped else FINISHED
            if not args.resume:
                run.create(config)  # only now, that everything it needs is loaded
            with run.lock():
                for metrics in training.epochs():
                    console.epoch(metrics)
            return _conclude(run, training.stopped)
    finally:
        console.close()


def _resumed_run(args: argparse.Namespace) -> tuple[RunFolder, TrainConfig]:
    if args.run_dir or args.config or args.preset or _overrides(args):
        raise ValueError("got --resume with other settings; expected it alone: a run continues as it was configured")
    run = RunFolder.open(args.resume)
    return run, run.config


def _new_run(args: argparse.Namespace) -> tuple[RunFolder, TrainConfig]:
    run = RunFolder(args.run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    run.check_free()
    return run, _config(args)


def _conclude(run: RunFolder, stopped: bool) -> int:
    """Draw the plots and say what came of it."""
    from .console import summary
    from .plots import save_plots

    if run.metrics():
        save_plots(run)
        print(summary(run))
    if stopped:
        print(f"Stopped; everything is saved. Continue with: python -m comfy_tdpo.trainer --resume {run.path}")
        return STOPPED
    return FINISHED


@contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Inside the block a signal to end asks the training to stop; a second one ends the program at once."""

    def handle(signum: int, _frame: Any) -> None:
        if stop.is_set():
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        stop.set()
        # not print: the signal may have come in the middle of one, whose buffer cannot be entered again
        os.write(2, b"\nStopping as soon as it can, then saving. Again to quit without saving.\n")

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    sys.exit(main())
