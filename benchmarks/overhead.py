"""How much of an epoch is the work of the models themselves, and what does the critic cost?

`python benchmarks/overhead.py` trains Stable Diffusion in miniature at 128 px with random weights (in GFLOP an image:
U-Net 0.81, decoder 2.74, the reward's encoder 0.25), 16 samples of 10 steps with guidance, by TDPO-R, by TDPO-R with a
critic that reads small images, those of a tiny decoder, or some steps only, and by DDPO-100. Between their epochs, it
does the same work with nothing around it: the calls of U-Net, decoder and encoder, forwards and, for the updates,
backwards. Prints the ratios of the times, epoch by epoch, and their medians. Take a quiet machine; what each way of
reading keeps is measured by critic_reading.py.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from pairs import machine
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from comfy_tdpo.models.components import load_components
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.shapes import MODELS
from comfy_tdpo.trainer.assemble import policy_settings
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.run import EpochMetrics, RunFolder
from comfy_tdpo.trainer.training import Training

SIDE, SAMPLES, STEPS = 128, 16, 10
SMALL = 32  # pixels, of the images that the critic may read instead
FEW = 5  # of so many steps, the critic may read one
EPOCHS = 5
VARIANTS: dict[str, dict[str, Any]] = {
    "tdpo-r": {"algorithm": "tdpo-r"},
    f"tdpo-r, critic at {SMALL} px": {"algorithm": "tdpo-r", "critic": {"image_size": SMALL}},
    "tdpo-r, tiny decoder": {"algorithm": "tdpo-r", "critic": {"decoder": "tiny"}},
    f"tdpo-r, every {FEW}th": {"algorithm": "tdpo-r", "critic": {"read_every": FEW}},
    f"tdpo-r, tiny decoder at {SMALL} px, every {FEW}th": {
        "algorithm": "tdpo-r",
        "critic": {"decoder": "tiny", "image_size": SMALL, "read_every": FEW},
    },
    "ddpo-100": {"algorithm": "ddpo-100"},
}


class Encoder:
    """A reward whose image encoder is a small vision transformer with random weights."""

    name, embed_dim, differentiable = "miniature", 128, True

    def __init__(self) -> None:
        sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
        config = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=16, projection_dim=self.embed_dim)
        self.network = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)

    def embed(self, images: Tensor) -> Tensor:
        if images.shape[-1] != SIDE:
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear")
        return F.normalize(self.network(images).image_embeds, dim=-1)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.embed(images)[:, 0]

    def check_prompts(self, prompts: list[str]) -> None:
        pass


def miniature() -> StableDiffusion:
    """Stable Diffusion's architecture with the text encoder of Shapes, and random weights."""
    torch.manual_seed(0)
    parts = load_components(str(MODELS["shapes"]))
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=parts.text_encoder.config.hidden_size,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    return StableDiffusion.from_components(replace(parts, unet=unet, vae=vae))


def training(folder: Path, variant: str, epochs: int) -> Training:
    overrides: dict[str, Any] = {
        "epochs": epochs,
        "samples_per_epoch": SAMPLES,
        "samples_per_update": SAMPLES,
        "steps": STEPS,
        "resolution": SIDE,
        "eval_rewards": [],
        "guards": [],
        "overoptimisation": {"reward": None},
        "output": {"grid_images": 1, "samples_every": epochs, "checkpoint_every": epochs},
    }
    config = make_config("shapes", overrides=overrides | VARIANTS[variant])
    policy = DiffusionPolicy(miniature(), **policy_settings(config, torch.device("cpu")))
    run = RunFolder(folder).create(config)
    return Training(config, policy, Encoder(), {}, run, Accelerator(cpu=True))


def bare_sampling(training: Training) -> None:
    """The calls of the models that an epoch's sampling cannot do without."""
    policy, config = training.policy, training.config
    latents = torch.randn(SAMPLES, *policy.latent_shape)
    both, conditioning = latents.repeat(2, 1, 1, 1), policy.encode_prompts(["a red circle"]).expand(2 * SAMPLES)
    with torch.no_grad():
        for _ in range(STEPS):
            policy.model.denoise(both, torch.full((2 * SAMPLES,), 500), conditioning)
        training.context.reward.embed(policy.decode(latents))
        reading = training.method.critic.reading([]) if config.critic.enabled else None
        if reading:
            for _ in reading.positions(STEPS):
                training.context.reward.embed(policy.decode(latents, reading.image_size, reading.decode))


def bare_updates(training: Training) -> None:
    """The forwards and backwards of the network that an epoch's updates cannot do without."""
    policy = training.policy
    both = torch.randn(2 * SAMPLES, *policy.latent_shape)
    conditioning = policy.encode_prompts(["a red circle"]).expand(2 * SAMPLES)
    for _ in range(STEPS):
        policy.model.denoise(both, torch.full((2 * SAMPLES,), 500), conditioning).sum().backward()
    training.context.optimizer.zero_grad()


def seconds(work: Callable[[Training], None], training: Training) -> float:
    start = time.perf_counter()
    work(training)
    return time.perf_counter() - start


def rounds(trainings: dict[str, Training], epochs: int) -> Iterator[dict[str, tuple[EpochMetrics, float, float]]]:
    """After an epoch to warm up, of each variant: an epoch's metrics, and the seconds of the bare work beside it."""
    running = {name: training.epochs() for name, training in trainings.items()}
    for metrics in running.values():
        next(metrics)
    for _ in range(epochs):
        yield {
            name: (next(running[name]), seconds(bare_sampling, training), seconds(bare_updates, training))
            for name, training in trainings.items()
        }


def ratios(found: dict[str, tuple[EpochMetrics, float, float]]) -> dict[str, float]:
    """What is printed of a round."""
    epochs = {name: metrics["time/epoch_s"] for name, (metrics, *_) in found.items()}
    table = {}
    for name, (metrics, sampling, updates) in found.items():
        table[f"{name}: sampling / models alone"] = metrics["time/sample_s"] / sampling
        table[f"{name}: updates / network alone"] = metrics["time/train_s"] / updates
        table[f"{name}: epoch / models alone"] = epochs[name] / (sampling + updates)
        if name != "ddpo-100":
            table[f"{name}: epoch / epoch of ddpo-100"] = epochs[name] / epochs["ddpo-100"]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of each variant that are measured")
    args = parser.parse_args()
    print(f"{date.today()}, {machine()}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        trainings = {name: training(Path(folder) / str(i), name, 1 + args.epochs) for i, name in enumerate(VARIANTS)}
        columns: list[dict[str, float]] = []
        for found in rounds(trainings, args.epochs):
            columns.append(ratios(found))
            for name, (metrics, sampling, updates) in found.items():
                took = f"{metrics['time/sample_s']:.1f} + {metrics['time/train_s']:.1f} s"
                print(f"{name}: {took}, the models alone {sampling:.1f} + {updates:.1f} s", flush=True)
        print()
        for name in columns[0]:
            values = [column[name] for column in columns]
            print(f"{name:<55} {statistics.median(values):5.2f}  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
