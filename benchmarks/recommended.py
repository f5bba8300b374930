"""What the recommended LoRA keeps: `python benchmarks/recommended.py runs/frontier/recipe-seed*`.

For each run of a model of Shapes: recommends a LoRA, unless that has been done, and draws 180 images of the training
prompts with it and with the base model, from the same noise. Prints a table of the changes, in standard deviations of
the first epoch's rewards for the training reward, and whether the run's alarm rang.
"""

import argparse
import platform
from datetime import date
from pathlib import Path
from statistics import fmean

import torch

from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.rewards import load_reward
from comfy_tdpo.rollout import Decoder, draw_images
from comfy_tdpo.trainer.alarm import alarm_of
from comfy_tdpo.trainer.assemble import load_policy
from comfy_tdpo.trainer.recommend.options import Options
from comfy_tdpo.trainer.recommend.work import recommend
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.loras import baked_strength, epoch_of, read_lora

CPU = torch.device("cpu")
IMAGES_PER_PROMPT, BATCH = 4, 60
NAMES = ("shapes-aesthetic", "shapes-gold", "shapes-judge", "shapes-alignment", "shapes-match")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    args = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}\n")
    print("| run | alarm | LoRA | strength | " + " | ".join(NAMES) + " |")
    print("|---" * (4 + len(NAMES)) + "|", flush=True)
    for path in args.runs:
        print(line(RunFolder.open(path)), flush=True)


def line(run: RunFolder) -> str:
    if not run.recommended_lora.exists():
        recommend(run, Options(), CPU)
    metrics = run.metrics()
    alarm = alarm_of(metrics)
    rang = str(alarm.epoch) if alarm else "-"
    if not run.recommended_lora.exists():
        return f"| {run.path.name} | {rang} | none |" + " |" * (1 + len(NAMES))
    spread = metrics[0][f"reward/{NAMES[0]}/std"]
    before, after = means(run, None), means(run, run.recommended_lora)
    changes = [f"{(after[NAMES[0]] - before[NAMES[0]]) / spread:+.2f}"]
    changes += [f"{after[name] - before[name]:+.3f}" for name in NAMES[1:]]
    lora = run.recommended_lora
    cells = [run.path.name, rang, f"epoch {epoch_of(lora)}", f"{baked_strength(lora):g}", *changes]
    return "| " + " | ".join(cells) + " |"


@torch.no_grad()
def means(run: RunFolder, lora: Path | None) -> dict[str, float]:
    """The mean score of each reward over the images with `lora`, or with the base model."""
    policy = load_policy(run.config, CPU)
    if lora is not None:
        policy.trainable.load_exported(read_lora(lora))
    prompts = load_prompts("shapes") * IMAGES_PER_PROMPT
    images = draw_images(Decoder(policy, BATCH), prompts, [("recommended", i) for i in range(len(prompts))], BATCH)
    return {name: fmean(load_reward(name, CPU).score(images, prompts).tolist()) for name in NAMES}


if __name__ == "__main__":
    main()
