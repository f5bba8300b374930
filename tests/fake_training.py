"""A fake training: it writes what a real one writes to the run's folder, at a pace set by the test."""

import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.nodes.runs.marks import Place
from comfy_tdpo.nodes.runs.registry import Runs
from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
from comfy_tdpo.nodes.runs.settings import Wanted
from comfy_tdpo.nodes.runs.start import prepare, start
from comfy_tdpo.trainer.job import Job
from comfy_tdpo.trainer.run import EpochMetrics, RunFolder

REWARD, CPU = "shapes-aesthetic", torch.device("cpu")
PLACE = Place("7", "a workflow")


class FakeTraining:
    """Epochs that end when `go` is released, or at once where there is none."""

    def __init__(self, run: RunFolder, stop: threading.Event, watch, go: threading.Semaphore | None = None):
        self.run, self.stop, self.watch, self.go, self.stopped = run, stop, watch, go, False

    def epochs(self) -> Iterator[EpochMetrics]:
        for epoch in range(len(self.run.metrics()) + 1, self.run.config.epochs + 1):
            self.watch("sampling", 0, 4)
            while self.go and not self.go.acquire(timeout=0.01) and not self.stop.is_set():
                pass
            if self.stop.is_set():
                self.stopped = True
                return
            yield self._keep(epoch)

    def _keep(self, epoch: int) -> EpochMetrics:
        metrics = {"epoch": epoch, "reward_queries": 4 * epoch, "time/epoch_s": 1.0}
        metrics |= {f"reward/{REWARD}/mean": float(epoch), f"reward/{REWARD}/std": 1.0}
        self.run.append_metrics(metrics)
        (self.run.path / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(self.run.sample_grid(epoch))
        weights = {"lora_unet_x.lora_up.weight": torch.full((1, 1), float(epoch))}
        for path in (self.run.lora(epoch), self.run.latest_lora):
            write_atomically(path, lambda file: save_file(weights, file, {"epoch": str(epoch)}))
        return metrics


def runs_in(folder: Path) -> Runs:
    return Runs(folder / "output" / "tdpo", folder / "loras")


def wanted(epochs: int = 2, **changes) -> Wanted:
    asked = {
        "model": "comfyui:Test:1",
        "preset": "shapes",
        "reward": RewardChoice({REWARD: 1.0}),
        "text": "a red circle",
    }
    return Wanted(**(asked | {"numbers": {"epochs": epochs, "samples_per_epoch": 4}} | changes))


def begin(
    runs: Runs,
    name: str = "one",
    go: threading.Semaphore | None = None,
    tell=lambda detail: None,
    because: str = "",
    **asked,
) -> Job:
    """A job on a run of that name, started."""
    run, want = runs.folder(name), wanted(**asked)
    prepare(runs, run, want.config(), want.prompts())

    def factory(run: RunFolder, stop: threading.Event, watch) -> FakeTraining:
        return FakeTraining(run, stop, watch, go)

    return start(runs, run, factory, CPU, PLACE, tell, because=because, widgets=want.widgets)
