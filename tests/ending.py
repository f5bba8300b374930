"""Trainings that end early, in each of several processes: python ending.py FOLDER stop, killed, frozen or hanging.

stop: a training that is stopped at many moments by one of the processes and resumed, one that fails, and one that loses
its reward; killed, frozen, hanging: what the last process does to itself in mid-epoch.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator
from tint import TintModel
from toy import Brightness, Contrast, lora_of, new_run, same, timeless

from comfy_tdpo.interrupts import heed
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.processes import FAILS, LACKS, LOST, Parted
from comfy_tdpo.rewards import RewardError
from comfy_tdpo.trainer import lookout
from comfy_tdpo.trainer.keeping import Keeper
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.training import Training

VARIANTS = {
    "with a critic": {
        "algorithm": "tdpo-g",
        "guards": ["shapes-alignment"],
        "guard_images": 2,
        "samples_per_epoch": 16,
    },
    "direct": {"algorithm": "alignprop", "samples_per_epoch": 32},
    "sharded": {
        "algorithm": "tdpo-r",
        "policy": {"train": "full", "shard": True, "ema": 0.5},
        "kl": {"coefficient": 0.03, "reset_every": 1},
        "samples_per_epoch": 16,
    },
}
EPSILON = {"lr": 5e-3, "eps": 1e-3}  # as in updating.py
SETTINGS = {"epochs": 2, "resolution": 8, "guidance": 1.0, "samples_per_update": 8, "micro_batch": 2}


def start(run: RunFolder, stop: threading.Event | None = None, watch=lambda *_: None, reward=None) -> Training:
    policy = DiffusionPolicy(
        TintModel(), steps=run.config.steps, guidance=1.0, resolution=8, settings=run.config.policy, seed=1
    )
    guards = {"contrast": Contrast()} if run.config.guards else {}
    reward = reward or Brightness()
    return Training(run.config, policy, reward, {}, run, Accelerator(cpu=True), stop, watch, guards)


def make_run(path: Path, accelerator: Accelerator, **settings) -> RunFolder:
    """A run's folder that the first process makes for all."""
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "prompts.txt").write_text("a red circle\na green star\n")
        new_run(path, prompts=str(path.parent / "prompts.txt"), **SETTINGS | settings)
    accelerator.wait_for_everyone()
    return RunFolder.open(path)


class At:
    """Does something at the n-th sign of progress; counts them."""

    def __init__(self, moment: int, act):
        self.moment, self.act, self.count = moment, act, 0

    def __call__(self, *_) -> None:
        self.count += 1
        if self.count == self.moment:
            self.act()


def stop_everywhere(folder: Path, accelerator: Accelerator) -> None:
    """Stopped by either process at each of many moments, and resumed, a run ends as one that was not stopped."""
    for name, settings in VARIANTS.items():
        whole, steps = make_run(folder / f"{name}-whole", accelerator, **settings), At(0, None)
        reference = start(whole, watch=steps)
        list(reference.epochs())
        signs = [torch.tensor([0]) for _ in range(accelerator.num_processes)]
        torch.distributed.all_gather(signs, torch.tensor([steps.count]))
        unfinished = set()
        least = int(min(signs))
        for moment in range(2, least, max(1, least // 8)):
            run, stop = make_run(folder / f"{name}-{moment}", accelerator, **settings), threading.Event()
            who = moment % accelerator.num_processes == accelerator.process_index
            first = start(run, stop, At(moment, stop.set if who else lambda: None))
            list(first.epochs())
            assert first.stopped or first.context.epoch == 2
            unfinished |= {path.name for path in run.checkpoints.glob("*-updates-*")}
            accelerator.wait_for_everyone()
            second = start(RunFolder.open(run.path))
            list(second.epochs())
            accelerator.wait_for_everyone()
            where = f"{name}, stopped at {moment} of {steps.count}"
            assert same(lora_of(second), lora_of(reference)), where
            for ours, theirs in zip(timeless(run.metrics()), timeless(whole.metrics()), strict=True):
                assert ours == theirs, f"{where}: {ours.items() ^ theirs.items()}"
        assert any("updates-000000" in path for path in unfinished) or name == "direct", unfinished
        assert any("updates-000000" not in path for path in unfinished), unfinished


def ends(training: Training, why: int, own: type[Exception] | None) -> None:
    """The training ends by the error `own` of this process, or by the news of another's that parts them."""
    try:
        list(training.epochs())
    except Parted as parted:
        assert own is None and parted.why == why
    except Exception as error:
        if own is None or not isinstance(error, own):
            raise
    else:
        raise AssertionError("it did not end")


def fail(folder: Path, accelerator: Accelerator) -> None:
    """An error in the last process ends the others too."""
    last = accelerator.process_index == accelerator.num_processes - 1

    def raise_error() -> None:
        raise KeyError("an error of the last process alone")

    training = start(make_run(folder / "failing", accelerator), watch=At(9, raise_error if last else lambda: None))
    ends(training, FAILS, KeyError if last else None)


def lose_the_reward(folder: Path, accelerator: Accelerator) -> None:
    """A reward that fails in the last process, in the second epoch: all is saved, and resumes as if it had not."""
    reference = start(make_run(folder / "kept", accelerator))
    list(reference.epochs())
    last = accelerator.process_index == accelerator.num_processes - 1

    class Lost(Brightness):
        calls = 0

        def score(self, images, prompts):
            self.calls += 1
            if last and self.calls == 4:
                raise RewardError("nobody answers")
            return super().score(images, prompts)

    run = make_run(folder / "lost", accelerator)
    ends(start(run, reward=Lost()), LACKS, RewardError if last else None)
    assert [path.name for path in sorted(run.checkpoints.iterdir())][1:] == ["epoch-0001-samples-000006-updates-000000"]
    accelerator.wait_for_everyone()
    again = start(RunFolder.open(run.path))
    list(again.epochs())
    assert same(lora_of(again), lora_of(reference))


MOMENTS = ("between epochs", "sampling", "updating")


RESUMED = ("with a critic", "sharded")


def new(path: Path, accelerator: Accelerator, name: str) -> RunFolder:
    policy = VARIANTS[name].get("policy", {}) | EPSILON
    return make_run(path, accelerator, **VARIANTS[name] | {"policy": policy, "critic": {"eps": EPSILON["eps"]}})


def begin(folder: Path, accelerator: Accelerator) -> None:
    """Trainings that are stopped at each of the MOMENTS, for another number of processes to finish."""
    for name, moment in product(RESUMED, MOMENTS):
        stop = threading.Event()

        def watch(phase: str, done: float, _total: int, moment=moment, stop=stop) -> None:
            if phase == moment and done >= 2:  # a micro-batch, or two updates
                stop.set()

        training = start(new(folder / name / moment, accelerator, name), stop, watch)
        for _ in training.epochs():
            stop.set()
        assert training.stopped and training.context.epoch == (moment == "between epochs")


def finish(folder: Path) -> None:
    for name, moment in product(RESUMED, MOMENTS):
        list(start(RunFolder.open(folder / name / moment)).epochs())


class Slow(Brightness):
    """The first score takes so many tenths of a second, as that of a service that is asked again and again."""

    def __init__(self, tenths: int):
        self.tenths = tenths

    def score(self, images, prompts):
        for _ in range(self.tenths):
            time.sleep(0.1)
            heed()
        self.tenths = 0
        return super().score(images, prompts)


def hang() -> None:
    """Live on without progress."""
    while True:
        time.sleep(0.1)


def end_itself(folder: Path, accelerator: Accelerator, act: Callable[[], None]) -> None:
    lookout.PATIENCE = limit = 4.0
    last = accelerator.process_index == accelerator.num_processes - 1
    slow = Slow(45 if last and act is hang else 0)  # which is no hanging
    run, stop = make_run(folder / "run", accelerator, epochs=9), threading.Event()
    training = start(run, stop, At(100, lambda: last and act()), reward=slow)
    with lookout.Lookout(training.processes, stop, limit, lambda: "resume it"):
        try:
            list(training.epochs())
        except Parted as parted:
            assert parted.why == LOST
            print(parted, file=sys.stderr, flush=True)
            os._exit(1)


if __name__ == "__main__":
    Keeper.end = lambda _: None  # the next run needs the connection that this would end
    place, mode, connected = Path(sys.argv[1]), sys.argv[2], Accelerator(cpu=True)
    if mode == "stop":
        stop_everywhere(place, connected)
        fail(place, connected)
        lose_the_reward(place, connected)
        begin(place / "begun by several", connected)
        finish(place / "begun by one")
    else:
        signals = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}
        end_itself(place, connected, hang if mode == "hanging" else partial(signal.raise_signal, signals[mode]))
    torch.distributed.destroy_process_group()
