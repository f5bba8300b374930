"""Shows whether a KL penalty restrains the policy: `.venv/bin/python benchmarks/kl_penalty.py RUN`.

Takes the LoRA of a finished run on Shapes, which has drifted from the base model, and trains it further on a reward
that gives every image the same score, with a penalty of coefficient 1. A penalty that restrains brings the KL down; one
that does not lets it wander and grow. Prints the KL of each epoch for each form of the penalty.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from comfy_tdpo.rewards import load_reward
from comfy_tdpo.trainer.assemble import load_policy
from comfy_tdpo.trainer.config import override
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.checkpoint import load_latest
from comfy_tdpo.trainer.training import Training


class Indifferent:
    """The same score for every image."""

    name, embed_dim, differentiable, sources = "indifferent", None, True, ()

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError("it has no encoder")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.new_zeros(len(images))

    def check_prompts(self, prompts: list[str]) -> None:
        """It takes every prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the finished run")
    parser.add_argument("--forms", nargs="+", default=["exact", "sampled"])
    parser.add_argument("--coefficient", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=48, help="an epoch")
    parser.add_argument("--algorithm", default="ddpo-100")
    args = parser.parse_args()
    judge = load_reward("shapes-judge", torch.device("cpu"))
    for form in args.forms:
        with tempfile.TemporaryDirectory() as folder:
            training = make_training(args, form, RunFolder(Path(folder) / "run"))
            training.context.eval_rewards["shapes-judge"] = judge
            print(f"{args.algorithm}, {form}:", flush=True)
            for line in training.epochs():
                print(f"  {line['kl/nats']:.1f} nats, judge {line['eval/shapes-judge/mean']:.2f}", flush=True)


def make_training(args: argparse.Namespace, form: str, run: RunFolder) -> Training:
    changes = {
        "algorithm": args.algorithm,
        "advantage_clip": 5.0,
        "critic": {"enabled": False},
        "neurons": {"reset": "none"},
        "epochs": args.epochs,
        "samples_per_epoch": args.samples,
        "samples_per_update": args.samples // 2,
        "eval_rewards": [],
        "kl": {"coefficient": args.coefficient, "form": form},
        "output": {"grid_images": 1},
    }
    before = RunFolder.open(args.run)
    config = override(before.config, changes)
    policy = load_policy(config, torch.device("cpu"))
    found = load_latest(before.checkpoints)
    assert found is not None, "a finished run has a checkpoint"
    policy.trainable.load(found[0]["policy"])
    return Training(config, policy, Indifferent(), {}, run.create(config), Accelerator(cpu=True))


if __name__ == "__main__":
    main()
