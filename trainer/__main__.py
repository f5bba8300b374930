"""The command line: `python -m comfy_tdpo.trainer`."""

import argparse
import os
import shlex
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from comfy_tdpo.rewards import RewardError
from comfy_tdpo.rewards.function import allow_functions

from .arguments import WRONG_INPUT, make_parser, overrides, with_dashes
from .config import TrainConfig, make_config, override, plain_values
from .run import RunFolder, TrainingError
from .run_paths import CONFIG

FINISHED, FAILED, STOPPED = 0, 1, 130
LONGEST = 900  # characters of an error, which may hold what a user gave
RUNS = Path("runs")
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # as launchers of several processes say it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 finished, 1 failed, 2 wrong input, 130 stopped by the user."""
    allow_functions()  # whoever types a command may name his own function
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["score"]:
        from .score import main as score

        return score(argv[1:])
    args = make_parser().parse_args([with_dashes(text) for text in argv])
    try:
        return _print_config(args) if args.print_config else _train(args)
    except KeyboardInterrupt:  # before or after the block of _stopping_on_signals
        return _complain("stopped", STOPPED)
    except ValueError as error:
        return _complain(error, WRONG_INPUT)
    except (OSError, TrainingError) as error:
        return _complain(error, FAILED)


def _complain(error: object, status: int) -> int:
    line = " ".join(str(error).split())
    print(f"comfy_tdpo: {line if len(line) <= LONGEST else line[:LONGEST] + '...'}", file=sys.stderr)
    return status


def _config(args: argparse.Namespace) -> TrainConfig:
    if args.resume:
        return _resumed_config(args, RunFolder.open(args.resume))
    return make_config(args.preset, args.config, overrides(args))


def _print_config(args: argparse.Namespace) -> int:
    import tomli_w

    print(tomli_w.dumps(plain_values(_config(args))), end="")
    return FINISHED


def _train(args: argparse.Namespace) -> int:
    if args.resume:
        run = RunFolder.open(args.resume)
        return _run(run, _resumed_config(args, run), new=False)
    config = make_config(args.preset, args.config, overrides(args))
    with _folder(args.run_dir) as folder:
        return _run(RunFolder(folder), config, new=True)


def _run(run: RunFolder, config: TrainConfig, new: bool) -> int:
    if IS_MAIN_PROCESS:
        print(f"run {run.path}: loading", file=sys.stderr, flush=True)
    stop = threading.Event()
    with _stopping_on_signals(stop):
        from .assemble import assemble  # seconds, so not before something is said
        from .console import Console

        console = Console(config, first_epoch=len(run.metrics()) + 1)
        try:
            training = assemble(config, run, stop, console.watch)
            if stop.is_set():
                return _complain("stopped while it was loading; nothing is changed", STOPPED)
            if not training.accelerator.is_main_process:
                deque(training.epochs(), maxlen=0)  # the main process tells of them
                return STOPPED if training.stopped else FINISHED
            console.begin(training.policy.device)
            if new:
                run.create(config)  # only now, that everything it needs is loaded
            for metrics in training.epochs():
                console.epoch(metrics)
            return _conclude(run, training.stopped)
        except (OSError, RewardError) as error:
            raise TrainingError(f"{error}; {_what_is_left(run)}") from error
        finally:
            console.close()


def _resumed_config(args: argparse.Namespace, run: RunFolder) -> TrainConfig:
    """The run's own, with what may be changed."""
    from .identity import FREE  # which takes torch along

    changes, config = overrides(args), run.config
    if args.run_dir or args.config or args.preset or changes.keys() - set(FREE):
        raise ValueError(
            "got --resume with other settings; expected it alone, or with --epochs, --output.*, --model and "
            "--reward-weights: a run continues as it was configured"
        )
    return override(config, changes)


@contextmanager
def _folder(wanted: Path | None) -> Iterator[Path]:
    """The folder of a new run, made; it and its new parents go again where nothing came to lie in them."""
    if not IS_MAIN_PROCESS:  # the others write nothing
        yield wanted or RUNS
        return
    folder, new = _make_folder(wanted)
    try:
        yield folder
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()


def _make_folder(wanted: Path | None) -> tuple[Path, list[Path]]:
    """The folder, and what of it and its parents was not there."""
    if wanted:
        RunFolder(wanted).check_free()
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in count(1):
        folder = wanted or RUNS / (stamp if number == 1 else f"{stamp}-{number}")
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=wanted is not None)
            return folder, new
        except FileExistsError:  # another run began in the same second
            continue
        except OSError as error:
            raise ValueError(
                f"run directory {str(folder)!r} cannot be made: {error.strerror}; choose another"
            ) from error
    raise AssertionError("there is always another number")


def _what_is_left(run: RunFolder) -> str:
    if (run.path / CONFIG).exists():
        return f"what was saved before is whole: mend the cause, then go on with: {_resume_command(run)}"
    return "nothing was saved yet: mend the cause, then start again"


def _resume_command(run: RunFolder) -> str:
    return shlex.join([sys.executable, "-m", str(__package__), "--resume", str(run.path)])


def _conclude(run: RunFolder, stopped: bool) -> int:
    """Draw the plots and say what came of it."""
    from .console import summary
    from .plots import save_plots

    if run.metrics():
        save_plots(run)
        print(summary(run))
    if stopped:
        saved = "everything is saved" if any(run.checkpoints.glob("*")) else "there was nothing to save yet"
        print(f"Stopped; {saved}. Continue with: {_resume_command(run)}")
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
