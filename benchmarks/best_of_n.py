"""What selection alone would keep: `python benchmarks/best_of_n.py`.

Draws images of the training prompts of Shapes with the base model and chooses the best of n by the training reward, or
by its sum with a guard, each in its standard deviation among the images of a group. No training is involved, so this
shows what an ideal policy could gain, and how much gold that would cost. The best of n is log(n) - (n - 1) / n nats
from the base model.

A group is of one prompt and shares the noise of the beginning: none, the initial noise, or that and the first steps.
Also prints which share of a reward's variance within a prompt that noise decides; the rest is decided later.
"""

import argparse
import math
import platform
from datetime import date

import torch
from torch import Tensor
from tqdm import tqdm

from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.rewards import RewardModel, load_reward
from comfy_tdpo.rollout import Decoder, denoise, draw_noise
from comfy_tdpo.trainer.assemble import load_policy
from comfy_tdpo.trainer.config import make_config

CPU = torch.device("cpu")
NAMES = ("shapes-aesthetic", "shapes-match", "shapes-gold", "shapes-judge")
REWARD, GUARD = 0, 1  # which of NAMES
SHARED = {0: "nothing", 1: "initial noise", 4: "initial noise and three steps"}
GROUPS = 2  # of a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=32, help="of a group, a power of two")
    size = parser.parse_args().images
    if size < 2 or size & (size - 1):
        parser.error(f"got --images {size}; expected a power of two, at least 2")
    policy = load_policy(make_config("shapes"), CPU)
    rewards = [load_reward(name, CPU) for name in NAMES]
    scores = {shared: draw(policy, rewards, shared, size) for shared in SHARED}
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}\n")
    print("| shared | " + " | ".join(f"{name}: decided" for name in NAMES[:3]) + " |")
    print("|---" * 4 + "|")
    for shared in list(SHARED)[1:]:
        print(f"| {SHARED[shared]} | " + " | ".join(f"{share:.2f}" for share in decided(scores[shared])[:3]) + " |")
    print("\n| shared | chosen by | n | nats | " + " | ".join(NAMES) + " |")
    print("|---" * (4 + len(NAMES)) + "|")
    for shared, found in scores.items():
        for weight, by in ((0.0, "reward"), (1.0, "reward + guard")):
            for n in (2**i for i in range(int(math.log2(size)) + 1)):
                means = best(found, n, weight)
                nats = math.log(n) - (n - 1) / n
                cells = [SHARED[shared], by, str(n), f"{nats:.1f}", *(f"{mean:.3f}" for mean in means)]
                print("| " + " | ".join(cells) + " |")


@torch.no_grad()
def draw(policy: DiffusionPolicy, rewards: list[RewardModel], shared: int, size: int) -> Tensor:
    """The scores of all groups, (prompts, GROUPS, size, rewards) float64."""
    decoder, found = Decoder(policy, size), []
    for prompt in tqdm(load_prompts("shapes"), f"sharing {SHARED[shared]}"):
        for group in range(GROUPS):
            noise = draw_noise(policy, [("best of n", shared, prompt, group, i) for i in range(size)])
            noise[:, :shared] = noise[:1, :shared]
            images = decoder(denoise(policy, [prompt] * size, noise).latents[:, -1])
            found.append(torch.stack([reward.score(images, [prompt] * size).double() for reward in rewards], dim=-1))
    return torch.stack(found).unflatten(0, (-1, GROUPS))


def decided(scores: Tensor) -> list[float]:
    """The share of each reward's variance within a prompt that is between groups (intraclass correlation)."""
    within = scores.var(2).mean((0, 1))
    between = scores.mean(2).var(1).mean(0) - within / scores.shape[2]
    return (between / (between + within)).tolist()


def best(scores: Tensor, n: int, weight: float) -> list[float]:
    """The mean scores of the best of every n images of a group."""
    centred = scores - scores.mean(2, keepdim=True)
    deviations = centred.square().mean((0, 1, 2)).sqrt()
    value = (centred[..., REWARD] / deviations[REWARD] + weight * centred[..., GUARD] / deviations[GUARD]).flatten()
    rows = value.unflatten(0, (-1, n)).argmax(1) + torch.arange(0, len(value), n)
    return scores.flatten(0, 2)[rows].mean(0).tolist()


if __name__ == "__main__":
    main()
