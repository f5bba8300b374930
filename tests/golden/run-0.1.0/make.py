"""Makes this folder with the code of version 0.1.0, which must be the one imported: python make.py FOLDER.

A run on Shapes that was stopped in the middle of its second epoch, and what that version's code made of it afterwards.
Its critic is narrow, to be small on disk.
"""

import os
import shutil
import sys
import threading
from pathlib import Path

from comfy_tdpo import __version__, critic

critic.WIDTHS = (8, 8, 4, 4, 1)

from comfy_tdpo.trainer.assemble import assemble  # noqa: E402
from comfy_tdpo.trainer.config import make_config  # noqa: E402
from comfy_tdpo.trainer.run import RunFolder  # noqa: E402

SETTINGS = {
    "epochs": 3,
    "samples_per_epoch": 4,
    "samples_per_update": 2,
    "micro_batch": 2,
    "steps": 2,
    "resolution": 32,
    "eval_rewards": ["shapes-judge"],
    "prompts": "two.txt",
    "policy": {"rank": 1, "targets": "attention", "eps": 1e-4},
    "critic": {"eps": 1e-4, "image_size": None},
    "neurons": {"every": 1},
    "moments": {"min_count": 2},
    "output": {"grid_images": 1, "samples_every": 3},
}


def train(path: Path, stop_in_epoch: int | None = None) -> None:
    run, stop = RunFolder.open(path), threading.Event()

    def watch(phase: str, done: int, total: int) -> None:
        if (phase, done, len(run.metrics()) + 1) == ("updating", 2, stop_in_epoch):
            stop.set()

    list(assemble(run.config, run, stop, watch, cpu=True).epochs())


if __name__ == "__main__":
    assert __version__ == "0.1.0"
    Path(sys.argv[1]).mkdir(exist_ok=True)
    os.chdir(sys.argv[1])
    stopped, continued, prompts = Path("stopped"), Path("continued"), Path("two.txt")
    prompts.write_text("a red circle\na green star\n")
    RunFolder(stopped).create(make_config("shapes", overrides=SETTINGS))
    prompts.unlink()
    train(stopped, stop_in_epoch=2)
    shutil.rmtree(stopped / "samples")
    shutil.copytree(stopped, continued)
    train(continued)
    for path in [*continued.iterdir(), continued / "lora" / "epoch-0003.safetensors"]:
        if path.name not in ("metrics.jsonl", "lora"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(stopped / "lora")
