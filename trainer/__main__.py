"""The command line: `python -m comfy_tdpo.trainer`."""

import argparse
import codecs
import os
import re
import shlex
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from comfy_tdpo.rewards import RewardError
from comfy_tdpo.rewards.function import allow_functions

from .arguments import WRONG_INPUT, flags_of, given, overrides, parse
from .changes import changeable, may_change
from .config import TrainConfig, make_config, override, plain_values
from .new_folder import RUNS, new_folder
from .run import RunFolder, TrainingError
from .run_paths import CONFIG
from .streams import forgiving_streams, hush, say, unheard_stdout

FINISHED, FAILED, STOPPED = 0, 1, 130
LONGEST = 900  # characters of an error, which may hold what a user gave
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # as launchers of several processes say it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 finished, 1 failed, 2 wrong input, 130 stopped by the user."""
    allow_functions()  # whoever types a command may name their own function
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see docs/LOG.md: threads that spin slow down all other work
    with forgiving_streams():
        try:
            try:
                return _command(sys.argv[1:] if argv is None else argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # as by `| head`, which has seen all it wanted
            hush(sys.stdout)
            return FINISHED
        except OSError as error:  # what was printed has no place, as on a full disk
            hush(sys.stdout)
            return _complain(error, FAILED)


def _command(argv: Sequence[str]) -> int:
    if argv[:1] == ["score"]:
        from .score import main as score

        return score(argv[1:])
    args = parse(argv)
    try:
        return _print_config(args) if args.print_config else _train(args)
    except KeyboardInterrupt:  # before or after the block of _stopping_on_signals
        return _complain("stopped", STOPPED)
    except ValueError as error:
        return _complain(error, WRONG_INPUT)
    except BrokenPipeError:
        raise
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

    text = tomli_w.dumps(plain_values(_config(args)))
    if codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8":  # TOML has escapes of its own
        text = re.sub(r"[^\x00-\x7f]", lambda found: f"\\U{ord(found[0]):08x}", text)
    print(text, end="")
    return FINISHED


def _train(args: argparse.Namespace) -> int:
    with unheard_stdout():
        if args.resume:
            run = RunFolder.open(args.resume)
            config = _resumed_config(args, run)
            _check_not_moved(run, config)
            return _run(run, config, new=False)
        config = make_config(args.preset, args.config, overrides(args))
        if not IS_MAIN_PROCESS:  # the others write nothing
            return _run(RunFolder(args.run_dir or RUNS), config, new=True)
        with new_folder(args.run_dir) as folder:
            return _run(RunFolder(folder), config, new=True)


def _run(run: RunFolder, config: TrainConfig, new: bool) -> int:
    stop = threading.Event()
    with _stopping_on_signals(stop):
        if IS_MAIN_PROCESS:
            say(f"run {run.path}: loading", sys.stderr)
        from .assemble import assemble  # seconds, so not before something is said
        from .console import Console

        try:
            with Console(config, first_epoch=len(run.metrics()) + 1) as console:
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


def _resumed_config(args: argparse.Namespace, run: RunFolder) -> TrainConfig:
    """The run's own, with what may be changed."""
    changes, config = overrides(args), run.config
    other = [name for name in given(args) if not may_change(name)]
    if other:
        flags = ", ".join("--" + name.replace("_", "-") for name in other)
        raise ValueError(
            f"got --resume with other settings ({flags}); expected it alone, or with {flags_of(changeable())}: a run "
            "continues as it was configured, so start a new one for these"
        )
    return override(config, changes)


def _check_not_moved(run: RunFolder, config: TrainConfig) -> None:
    """Raise ValueError, with the remedy, where a file that the run was begun with lies at another place by now."""
    before, command = run.config, _resume_command(run)
    if config.model == before.model and _is_lost(config.model):
        raise ValueError(
            f"the model of this run, {config.model!r}, is not there; if it has moved, continue with: {command} --model "
            "NEW"
        )
    for name, path in config.reward_weights.items():
        if path == before.reward_weights.get(name) and _is_lost(path):
            raise ValueError(
                f"the weights of reward {name!r} of this run, {path!r}, are not there; if they have moved, continue "
                f"with: {command} --reward-weights {name}=NEW"
            )


def _is_lost(path: str) -> bool:
    """Whether it is a path, from this system or another, and not there; hub ids and names are no such paths."""
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return absolute and not Path(path).exists()


def _what_is_left(run: RunFolder) -> str:
    if (run.path / CONFIG).exists():
        return f"what was saved before is whole: mend the cause, then go on with: {_resume_command(run)}"
    return "nothing was saved yet: mend the cause, then start again"


def _resume_command(run: RunFolder) -> str:
    return shlex.join([sys.executable, "-m", str(__package__), "--resume", str(run.path)])


def _conclude(run: RunFolder, stopped: bool) -> int:
    """Draw the plots and say what came of it."""
    from .plots import save_plots
    from .summary import summary

    if run.metrics():
        save_plots(run)
        say(summary(run))
    if stopped:
        saved = "everything is saved" if any(run.checkpoints.glob("*")) else "there was nothing to save yet"
        say(f"Stopped; {saved}. Continue with: {_resume_command(run)}")
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
        with suppress(OSError):  # nobody may be there to read it
            os.write(2, b"\nStopping as soon as it can, then saving. Again to quit without saving.\n")

    # what was ignored from the start stays so: Ctrl-C is then meant for others of the same terminal
    heard = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handle) for signum in heard}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    sys.exit(main())
