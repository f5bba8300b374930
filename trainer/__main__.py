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
from typing import TYPE_CHECKING, Any

from comfy_tdpo.rewards import RewardError
from comfy_tdpo.rewards.function import allow_functions
from comfy_tdpo.rewards.remote import allow_addresses

from .config import TrainConfig, make_config, override, plain_values
from .config.changes import changeable, may_change
from .run import RunFolder, TrainingError
from .run.new_folder import RUNS, new_folder
from .run.paths import CONFIG
from .terminal import FAILED, FINISHED, STOPPED, WRONG_INPUT
from .terminal.arguments import flags_of, given, overrides, parse
from .terminal.streams import forgiving_streams, hush, say, unheard_stdout

if TYPE_CHECKING:
    from .training import Training

LONGEST = 900  # characters of an error message, which may quote long input
SEVERAL_PROCESSES = int(os.environ.get("WORLD_SIZE", "1")) > 1
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # set by multi-process launchers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 finished, 1 failed, 2 wrong input, 130 stopped by the user."""
    allow_functions()  # on the command line, users may name their own functions,
    allow_addresses()  # and the addresses of theirs
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")  # how long threads spin: see docs/LOG.md
    with forgiving_streams():
        try:
            try:
                return _command(sys.argv[1:] if argv is None else argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
            hush(sys.stdout)
            return FINISHED
        except OSError as error:  # stdout cannot be written, such as to a full disk
            hush(sys.stdout)
            return _complain(error, FAILED)


def _command(argv: Sequence[str]) -> int:
    if argv[:1] == ["score"]:
        from .terminal.score import main as score

        return score(argv[1:])
    if argv[:1] == ["recommend"]:
        from .terminal.recommend import main as recommend

        return recommend(argv[1:])
    if argv[:1] == ["evaluate"]:
        from .terminal.evaluate import main as evaluate

        return evaluate(argv[1:])
    if argv[:1] == ["taste"]:
        from .terminal.taste import main as taste

        return taste(argv[1:])
    if argv[:1] == ["serve"]:
        from .terminal.serve import main as serve

        return serve(argv[1:])
    planning = argv[:1] == ["plan"]
    args = parse(argv[1:] if planning else argv)
    try:
        if args.print_config:
            return _print_config(args)
        return _plan(args) if planning else _train(args)
    except KeyboardInterrupt:  # outside the block of _stopping_on_signals
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
    if codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8":  # use TOML's own escapes
        text = re.sub(r"[^\x00-\x7f]", lambda found: f"\\U{ord(found[0]):08x}", text)
    print(text, end="")
    return FINISHED


def _plan(args: argparse.Namespace) -> int:
    from .terminal.plan import plan  # imports torch

    for part in plan(_config(args)):
        say(part)
    return FINISHED


def _train(args: argparse.Namespace) -> int:
    with unheard_stdout():
        if args.resume:
            run = RunFolder.open(args.resume)
            config = _resumed_config(args, run)
            _check_not_moved(run, config)
            return _run(run, config, new=False)
        config = make_config(args.preset, args.config, overrides(args))
        if not IS_MAIN_PROCESS:  # only the main process writes to the folder
            return _run(RunFolder(args.run_dir or RUNS), config, new=True)
        with new_folder(args.run_dir) as folder:
            return _run(RunFolder(folder), config, new=True)


def _run(run: RunFolder, config: TrainConfig, new: bool) -> int:
    stop = threading.Event()
    with _stopping_on_signals(stop):
        if IS_MAIN_PROCESS:
            say(f"run {run.path}: loading", sys.stderr)
        from comfy_tdpo.processes import Parted

        from .assemble import assemble  # takes seconds to import, so after the first message
        from .lookout import Lookout, patience
        from .terminal.console import Console

        try:
            with Console(config, first_epoch=len(run.metrics()) + 1) as console:
                training = assemble(config, run, stop, console.watch)
                if stop.is_set():
                    return _complain("stopped while loading; nothing was changed", STOPPED)
                lookout = Lookout(training.processes, stop, patience(config), lambda: _what_is_left(run))
                if not training.accelerator.is_main_process:
                    with lookout:
                        deque(training.epochs(), maxlen=0)  # only the main process reports them
                    return STOPPED if training.stopped else FINISHED
                console.begin(training.policy.device, training.arithmetic)
                if new:
                    run.create(config)  # only once everything has been loaded
                with lookout:
                    for metrics in training.epochs():
                        console.epoch(metrics)
            status = _conclude(run, training.stopped)
            return _recommend(training) if status == FINISHED and config.output.recommend else status
        except (OSError, RewardError, Parted) as error:
            raise TrainingError(f"{error}; {_what_is_left(run)}") from error


def _resumed_config(args: argparse.Namespace, run: RunFolder) -> TrainConfig:
    """The run's own configuration, with the changes given on the command line."""
    changes, config = overrides(args), run.config
    other = [name for name in given(args) if not may_change(name)]
    if other:
        flags = ", ".join("--" + name.replace("_", "-") for name in other)
        raise ValueError(
            f"got --resume with other settings ({flags}); expected it alone, or with {flags_of(changeable())}: a run "
            "resumes with the settings it started with, so start a new run to change these"
        )
    return override(config, changes)


def _check_not_moved(run: RunFolder, config: TrainConfig) -> None:
    """Raise ValueError if a file the run started with is no longer where it was; the message says what to do."""
    before, command = run.config, _resume_command(run)
    if config.model == before.model and _is_lost(config.model):
        raise ValueError(
            f"the model of this run, {config.model!r}, does not exist; if it was moved, resume with: {command} --model "
            "NEW"
        )
    for name, path in config.reward_weights.items():
        if run.taste(name).exists():  # the run has a copy of its own
            continue
        if path == before.reward_weights.get(name) and _is_lost(path):
            raise ValueError(
                f"the weights of reward {name!r} of this run, {path!r}, do not exist; if they were moved, resume with: "
                f"{command} --reward-weights {name}=NEW"
            )


def _is_lost(path: str) -> bool:
    """Whether `path` is absolute, on this system or another, and missing; hub ids and names are never absolute."""
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return absolute and not Path(path).exists()


def _what_is_left(run: RunFolder) -> str:
    if not IS_MAIN_PROCESS:  # it may not know the folder
        return "everything saved so far is intact"
    if (run.path / CONFIG).exists():
        return f"everything saved so far is intact: fix the cause, then resume with: {_resume_command(run)}"
    return "nothing has been saved yet: fix the cause, then start again"


def _resume_command(run: RunFolder) -> str:
    return shlex.join([sys.executable, "-m", str(__package__), "--resume", str(run.path)])


def _conclude(run: RunFolder, stopped: bool) -> int:
    """Draw the plots and print the summary."""
    from .alarm import ends_early
    from .plots.curves import save_plots
    from .terminal.summary import summary

    if run.metrics():
        save_plots(run)
        say(summary(run))
    if ends_early(run.metrics(), run.config) and not stopped:
        say(
            f"Ended because it overoptimises; everything is saved. To train on: {_resume_command(run)} "
            "--stop-on-overoptimisation false"
        )
    if stopped:
        saved = "everything is saved" if any(run.checkpoints.glob("*")) else "there was nothing to save yet"
        say(f"Stopped; {saved}. Resume with: {_resume_command(run)}")
        return STOPPED
    return FINISHED


def _recommend(training: "Training") -> int:
    """Find the LoRA to use and its strength, and print what was found."""
    from .recommend.work import after_training
    from .terminal.progress import Progress
    from .terminal.recommend import command, told
    from .training import Stopped

    try:
        with Progress("recommending") as progress:
            found = after_training(training, progress.watch, progress.tell)
    except Stopped:
        say(f"Stopped; the training is complete. Go on with: {command(training.run)}")
        return STOPPED
    say(f"\n{told(training.run, found)}")
    return FINISHED


@contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Inside the block, SIGINT or SIGTERM asks the training to stop; a second one ends the program at once.

    It does not end one of several processes: on Ctrl-C each hears SIGINT from the terminal and again from its launcher,
    which ends them itself if they take too long.
    """

    def handle(signum: int, _frame: Any) -> None:
        if SEVERAL_PROCESSES:
            if IS_MAIN_PROCESS and not stop.is_set():
                with suppress(OSError):
                    os.write(2, b"\nStopping as soon as possible, then saving.\n")
            stop.set()
            return
        if stop.is_set():
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        stop.set()
        # not print(): the signal may have interrupted one, and its buffer cannot be re-entered
        with suppress(OSError):  # stderr may be closed
            os.write(2, b"\nStopping as soon as possible, then saving. Interrupt again to quit without saving.\n")

    # signals ignored from the start stay ignored: Ctrl-C is then meant for other programs on the terminal
    heard = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handle) for signum in heard}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _exit(status: int) -> None:
    """End the program. One of several processes ends without C++'s destructors: gloo's threads may abort in them."""
    if SEVERAL_PROCESSES:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _exit(main())
