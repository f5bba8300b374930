"""How much of the policy's gradient is signal: `python benchmarks/gradient_signal.py RUN --lora epoch-0003`.

A single sample's gradient at a step is its advantage times the score function. Its mean over samples is what training
follows, all else is noise. This draws samples with a LoRA of RUN (of a model of Shapes), measures the gradient of each
sample at each step, and prints, for each way of computing advantages, the squared length of the mean over the mean
squared length, times 10,000: with twice the number, half the samples give a gradient as good.

The mean's squared length is estimated without bias by products of different samples' gradients. The gradients are kept
as count sketches, which preserve products up to a relative error of about 1/sqrt(WIDTH). Advantages compare a sample
with the other samples of its prompt; predictions are linear in the scores of the predicted clean image and
cross-fitted, so that no sample predicts its own return.

N: samples, T: steps.
"""

import argparse
import platform
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from comfy_tdpo.methods.advantages import generalised_advantages
from comfy_tdpo.methods.step_regression import StepRegression
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.process.gaussian import log_prob
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.reading import Reading
from comfy_tdpo.rewards import load_reward
from comfy_tdpo.rollout import Decoder, Sampler, Trajectories
from comfy_tdpo.trainer.assemble import load_policy
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.loras import read_lora

CPU = torch.device("cpu")
WIDTH = 4096
FOLDS = 4
REWARD, GUARD = "shapes-aesthetic", "shapes-match"
LAMBDAS = (1.0, 0.9, 0.7, 0.5, 0.25, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lora", default="latest", help="a snapshot of the run")
    parser.add_argument("--samples", type=int, default=720)
    args = parser.parse_args()
    run = RunFolder.open(args.run)
    policy = load_policy(run.config, CPU)
    policy.trainable.load_exported(read_lora(run.path / "lora" / f"{args.lora}.safetensors"))
    shapes = load_prompts("shapes")
    if args.samples < 2 * len(shapes):
        parser.error(f"got {args.samples} samples; expected two of each of the {len(shapes)} prompts or more")
    prompts = (shapes * args.samples)[: args.samples]
    batch, sketches = draw(policy, prompts)
    report(batch, sketches)


def draw(policy: DiffusionPolicy, prompts: list[str], size: int = 45) -> tuple[Trajectories, Tensor]:
    """The samples, and their score functions as sketches, (N, T, WIDTH)."""
    reward, guard = load_reward(REWARD, CPU), load_reward(GUARD, CPU)
    sampler = Sampler(
        Decoder(policy, 48),
        reward,
        {},
        Reading(reward.embed, clean=True, rewards=[reward, guard]),
        guards={GUARD: guard},
    )
    sketch = Sketch(sum(parameter.numel() for parameter in policy.parameters))
    batches, sketches = [], []
    for begin in tqdm(range(0, len(prompts), size)):
        asked = prompts[begin : begin + size]
        with torch.no_grad():
            seeds = [("gradient signal", begin + i) for i in range(len(asked))]
            batch = sampler.sample(asked, seeds).trajectories()
        batches.append(batch)
        sketches += [scores(policy, batch, row, sketch) for row in range(len(asked))]
    return Trajectories.concatenate(batches), torch.stack(sketches)


class Sketch:
    """A random map to WIDTH numbers that preserves inner products in expectation (count sketch)."""

    def __init__(self, size: int):
        generator = torch.Generator().manual_seed(0)
        self.place = torch.randint(WIDTH, (size,), generator=generator)
        self.sign = 2.0 * torch.randint(2, (size,), generator=generator) - 1

    def __call__(self, vector: Tensor) -> Tensor:
        return torch.zeros(WIDTH).index_add_(0, self.place, self.sign * vector)


def scores(policy: DiffusionPolicy, batch: Trajectories, row: int, sketch: Sketch) -> Tensor:
    """The gradient of each step's log-probability, sketched, (T, WIDTH)."""
    found, conditioning = [], policy.encode_prompts([batch.prompts[row]])
    for k in range(len(policy.process)):
        step = policy.step(batch.latents[row : row + 1, k], torch.tensor([k]), conditioning)
        log_probability = log_prob(batch.latents[row : row + 1, k + 1], step.mean, step.std).sum()
        gradients = torch.autograd.grad(log_probability, policy.parameters)
        found.append(sketch(torch.cat([gradient.flatten() for gradient in gradients])))
    return torch.stack(found)


def report(batch: Trajectories, sketches: Tensor) -> None:
    names = {prompt: i for i, prompt in enumerate(dict.fromkeys(batch.prompts))}
    prompts = torch.tensor([names[prompt] for prompt in batch.prompts])
    assert batch.step_scores is not None
    rewards, guards = (
        standardised(final, steps, prompts)
        for final, steps in zip((batch.rewards, batch.guard_rewards[GUARD]), batch.step_scores.unbind(-1), strict=True)
    )
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}; {len(batch)} samples\n")
    steps = sketches.shape[1]
    print("| trained on | advantage | " + " | ".join(f"step {k + 1}" for k in range(steps)) + " |")
    print("|---" * (steps + 2) + "|")
    for name, weight in (("reward", 0.0), ("reward + guard", 1.0), ("reward + 2 guard", 2.0)):
        returns = (rewards[0] + weight * guards[0])[:, None].expand(-1, steps)
        values = cross_fitted(rewards[1][..., None], rewards[0]) + weight * cross_fitted(
            guards[1][..., None], guards[0]
        )
        line(name, "return", returns, sketches)
        for gae_lambda in LAMBDAS:
            advantages = generalised_advantages(returns - values, 1.0, gae_lambda, range(steps))
            line(name, f"lambda {gae_lambda:g}", advantages, sketches)


def standardised(final: Tensor, steps: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the images, (N,), and of the steps, (N, T), minus their prompts' means, in the images' deviations."""
    centred = torch.cat([final[:, None], steps], dim=1)
    for prompt in prompts.unique():
        own = prompts == prompt
        count = int(own.sum())
        centred[own] = (centred[own] - centred[own].mean(0)) * count / (count - 1)  # the mean of the others
    return centred[:, 0] / centred[:, 0].std(), centred[:, 1:] / centred[:, 0].std()


def cross_fitted(scores: Tensor, returns: Tensor) -> Tensor:
    """What a regression on the other folds predicts, (N, T)."""
    values = torch.empty(scores.shape[:2])
    fold = torch.arange(len(scores)) * FOLDS // len(scores)
    targets = returns[:, None].expand(-1, scores.shape[1])
    for held_out in range(FOLDS):
        rest, own = fold != held_out, fold == held_out
        values[own] = StepRegression.fit(scores[rest], targets[rest])(scores[own])
    return values


def line(name: str, how: str, advantages: Tensor, sketches: Tensor) -> None:
    gradients = advantages[..., None] * sketches
    count, squares = len(gradients), gradients.square().sum((0, 2))
    signal = (gradients.sum(0).square().sum(1) - squares) / (count * (count - 1))
    cells = [f"{1e4 * ratio:.1f}" for ratio in (signal / (squares / count)).tolist()]
    print(f"| {name} | {how} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
