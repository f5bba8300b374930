"""Trainings that end early, in each of several processes: python ending.py FOLDER stop, killed or frozen.

stop: a training that is stopped at many moments by one of the processes and resumed, and one that fails; killed,
frozen: what the last process does to itself in mid-epoch.
"""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
from accelerate import Accelerator
from tint import TintModel
from toy import Brightness, Contrast, lora_of, new_run, same, timeless

from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.processes import FAILS, LOST, Parted
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
}
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


def fail(folder: Path, accelerator: Accelerator) -> None:
    """An error in the last process ends the others too."""
    last = accelerator.process_index == accelerator.num_processes - 1

    class Failing(Brightness):
        def score(self, images, prompts):
            if last:
                raise KeyError("an error of the last process alone")
            return super().score(images, prompts)

    training = start(make_run(folder / "failing", accelerator), reward=Failing())
    try:
        list(training.epochs())
    except Parted as parted:
        assert not last and parted.why == FAILS
    except RewardError:
        assert last
    else:
        raise AssertionError("it did not fail")


def end_itself(folder: Path, accelerator: Accelerator, signum: int) -> None:
    lookout.PATIENCE = 4.0
    last = accelerator.process_index == accelerator.num_processes - 1
    run, stop = make_run(folder / "run", accelerator, epochs=9), threading.Event()
    training = start(run, stop, At(100, lambda: last and signal.raise_signal(signum)))
    with lookout.Lookout(training.processes, stop, lambda: "resume it"):
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
    else:
        end_itself(place, connected, {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}[mode])
    torch.distributed.destroy_process_group()
