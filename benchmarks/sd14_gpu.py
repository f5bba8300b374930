"""Stable Diffusion v1.4's architecture on a GPU, random weights: `python benchmarks/sd14_gpu.py`.

Settings: 512 px, T = 50, bf16, guidance 5, LoRA rank 4, a ViT-L/14 image encoder like CLIP's. Measures the largest
ratio drift, peak memory, and seconds per sample of each phase, for several micro-batch sizes. Nothing is downloaded.
"""

import argparse
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from comfy_tdpo.memory.gauges import gauge_of
from comfy_tdpo.methods.objectives import policy_loss
from comfy_tdpo.models.components import Components
from comfy_tdpo.models.shipped import CONFIGS, clip_tokenizer
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.process.gaussian import log_prob, scaled_clip_range
from comfy_tdpo.rollout import Decoder, denoise, draw_noise

PROMPT = "a photo of a cat"
DECODE_BATCH = 16  # as the configuration's default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train-steps", type=int, default=10, help="timesteps that are trained for the timing")
    parser.add_argument("--device", default="cuda", help="cpu, with few steps and pixels, shows that the script runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/sd14_gpu.md"))
    args = parser.parse_args()
    policy = make_policy(args.steps, args.resolution, args.device)
    encoder = make_encoder(args.device)
    rows = []
    for size in args.micro_batches:
        measure(policy, encoder, size, train_steps=1)  # the first of a size also chooses and loads its kernels
        rows.append(measure(policy, encoder, size, args.train_steps))
    text = report(rows, args)
    args.out.write_text(text, encoding="utf-8")
    print(text)


def make_policy(steps: int, resolution: int, device: str) -> DiffusionPolicy:
    """The real configuration classes with random weights, LoRA B moved off zero as after some training."""
    torch.manual_seed(0)
    sd1 = CONFIGS / "sd1"
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sd1 / "unet")).to(torch.bfloat16)
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(sd1 / "vae")).to(torch.bfloat16)
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(sd1 / "text_encoder")).to(torch.bfloat16)
    scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(sd1 / "scheduler"))
    components = Components(unet, vae, text, clip_tokenizer(sd1), scheduler, "random SD 1.x")
    policy = DiffusionPolicy(
        StableDiffusion.from_components(components),
        steps=steps,
        guidance=5.0,
        resolution=resolution,
        device=device,
        autocast=torch.bfloat16,
    )
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    return policy


def make_encoder(device: str) -> Callable[[Tensor], Tensor]:
    """A ViT-L/14 at 224 px, as the aesthetic reward's, with the critic's preprocessing on the device."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device(device):
        model = CLIPVisionModelWithProjection(config).to(torch.bfloat16).eval()

    def embed(images: Tensor) -> Tensor:
        small = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True)
        return torch.nn.functional.normalize(model(small.to(torch.bfloat16)).image_embeds.float(), dim=-1)

    return embed


def measure(
    policy: DiffusionPolicy, encoder: Callable[[Tensor], Tensor], size: int, train_steps: int
) -> dict[str, float]:
    """One trajectory batch of `size` samples through every phase; seconds are per sample."""
    gauge = gauge_of(policy.device)
    gauge.reset()
    with torch.no_grad():
        noise = draw_noise(policy, [("benchmark", row) for row in range(size)])
        latents, log_probs, _, _, sampling = timed(lambda: denoise(policy, [PROMPT] * size, noise))
        decode, count = Decoder(policy, DECODE_BATCH), size * len(policy.process)
        _, decoding = timed(lambda: decode(latents[:, :-1].flatten(0, 1), read=lambda images, rows: images[:, :, 0, 0]))
        images = decode(latents[:1, -1]).expand(DECODE_BATCH, -1, -1, -1)
        _, encoding = timed(lambda: [encoder(images[: count - begin]) for begin in range(0, count, DECODE_BATCH)])
    drift, training = timed(lambda: train(policy, latents, log_probs, train_steps))
    return {
        "micro_batch": size,
        "drift": drift,
        "sampling": sampling / size,
        "decoding": decoding / size,
        "encoding": encoding / size,
        "training": training / size * len(policy.process) / train_steps,
        "peak": gauge.peak() / 2**30,
    }


def timed(work: Callable) -> tuple:
    """What `work` gives, and the seconds it took on the device."""
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    seconds = time.perf_counter() - start
    return (*result, seconds) if isinstance(result, tuple) else (result, seconds)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(policy: DiffusionPolicy, latents: Tensor, log_probs: Tensor, train_steps: int) -> float:
    """Forward and backward at `train_steps` positions spread over the schedule, no update; the worst |ratio - 1|."""
    size, worst = len(latents), 0.0
    embeds, clip = policy.encode_prompts([PROMPT] * size), scaled_clip_range(1e-4, policy.latent_size)
    positions = torch.linspace(0, len(policy.process) - 1, train_steps).round().long().tolist()
    for k in positions:
        mean, sigma, _ = policy.step(latents[:, k], torch.full((size,), k, device=policy.device), embeds)
        ratio = (log_prob(latents[:, k + 1], mean, sigma) - log_probs[:, k]).exp()
        policy_loss(ratio, torch.ones_like(ratio), clip).mean().backward()
        worst = max(worst, (ratio.detach() - 1).abs().max().item())
    for parameter in policy.parameters:
        parameter.grad = None
    return worst


def report(rows: list[dict[str, float]], args: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [
        "# SD 1.4's architecture on a GPU",
        "",
        f"`python benchmarks/sd14_gpu.py` on {date.today()}: {device}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; {args.resolution} px, T = {args.steps}, bf16, guidance 5, LoRA rank 4, random "
        "weights. Seconds per sample; training extrapolated from "
        f"{args.train_steps} of {args.steps} steps.",
        "",
        "| micro-batch | worst abs(ratio - 1) | sampling | decoding | encoding | training | peak memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['micro_batch']:.0f} | {row['drift']:.1e} | {row['sampling']:.2f} | {row['decoding']:.2f} | "
            f"{row['encoding']:.2f} | {row['training']:.2f} | {row['peak']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
