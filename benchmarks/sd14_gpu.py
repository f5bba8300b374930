"""Stable Diffusion v1.4's architecture on a GPU, random weights: `python benchmarks/sd14_gpu.py`.

Settings: 512 px, T = 50, guidance 5, LoRA rank 4, a ViT-L/14 image encoder like CLIP's. For each precision and
micro-batch: the largest ratio drift, seconds per sample of each phase, the share of the card's peak arithmetic that
training reaches (MFU), and peak memory; and what MemoryBudget would choose. Nothing is downloaded. `--compile` measures
everything again with compiled transformer blocks, as the setting `compile` has them.

Exits with 1 if a ratio of a fresh sample is off by more than GATE. `--small` runs all of it on a CPU, with a tiny
model, in a minute or, with `--compile`, in many minutes, and writes no page.
"""

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from comfy_tdpo.memory.budget import MemoryBudget
from comfy_tdpo.memory.gauges import gauge_of
from comfy_tdpo.memory.running_out import out_of_memory
from comfy_tdpo.memory.without_values import flops_of
from comfy_tdpo.methods.objectives import policy_loss
from comfy_tdpo.models.components import Components
from comfy_tdpo.models.shipped import CONFIGS, clip_tokenizer
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.process.gaussian import log_prob, scaled_clip_range
from comfy_tdpo.rehearsal import Rehearsal
from comfy_tdpo.rollout import Decoder, denoise, draw_noise
from comfy_tdpo.trainer.assemble import DTYPES

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PROMPT = "a photo of a cat"
DECODE_BATCH = 16  # as the configuration's default
UPDATE = 128  # samples of an update, for the budget
GATE = 1e-6  # of |ratio - 1|, which is 0 where kernels repeat
TARGET_MFU, TARGET_SECONDS = 0.45, 2.0  # per sample, on an H100
# Dense TFLOP/s of 16-bit and of float32 arithmetic without TF32, by the vendor, for names that contain all these words.
PEAKS = {
    ("H100", "HBM3"): (989.4, 66.9),
    ("H200",): (989.4, 66.9),
    ("A100",): (312.0, 19.5),
    ("RTX 4090",): (165.2, 82.6),
}
SMALL = {"steps": 2, "resolution": 64, "train_steps": 1, "micro_batches": [1, 2], "device": "cpu"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["bf16", "fp16", "fp32"])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train-steps", type=int, default=10, help="timesteps that are trained for the timing")
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to show that the script runs")
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    elif torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; expected one, or --small for a tiny model on the CPU")
    rows, chosen = [], []
    for precision in args.precisions:
        for compiled in (False, True) if args.compile else (False,):
            found, line = of_precision(precision, compiled, args)
            rows += found
            chosen += [f"{precision}: {line}"] if line else []
    text = report(rows, chosen, args)
    print(text)
    if not args.small:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    drift = max(row["drift"] for row in rows)
    print(f"ratio gate: {'passed' if drift <= GATE else 'FAILED'}, at most {drift:.1e} of {GATE:.0e}", file=sys.stderr)
    return int(drift > GATE)


def of_precision(precision: str, compiled: bool, args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The rows of a precision, and what MemoryBudget says: nothing where memory cannot be measured, and if `compiled`,
    since it measures what is not."""
    gc.collect()  # a compiled policy refers to itself
    torch.cuda.empty_cache()
    policy, encoder = make_policy(precision, args), make_encoder(precision, args)
    if compiled:
        policy.compile()
    with torch.no_grad():
        policy.encode_ahead([PROMPT])
    rows = []
    for size in args.micro_batches:
        try:
            start = time.perf_counter()
            measure(policy, encoder, size, train_steps=1)  # the first of a size also chooses and loads its kernels
            first = time.perf_counter() - start
            row = {"precision": precision, "compiled": compiled, "first": first}
            rows.append(row | measure(policy, encoder, size, args.train_steps))
        except Exception as error:
            if not out_of_memory(error):
                raise
            print(f"{precision}: no room for {size} samples at once", file=sys.stderr)
        torch.cuda.empty_cache()
    if compiled:
        return rows, ""
    budget = MemoryBudget(gauge_of(policy.device), UPDATE, UPDATE, DECODE_BATCH)
    _, line = budget.settle(Rehearsal(policy, PROMPT, [])) if budget.gauge.exact else (None, "")
    return rows, line


def make_policy(precision: str, args: argparse.Namespace) -> DiffusionPolicy:
    """The real configuration classes with random weights, LoRA B moved off zero as after some training."""
    torch.manual_seed(0)
    sd1, dtype = CONFIGS / "sd1", DTYPES[precision]
    narrow = {"block_out_channels": [32, 32, 64, 64]} if args.small else {}
    texts = {"num_hidden_layers": 1, "intermediate_size": 64} if args.small else {}
    with torch.device(args.device):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sd1 / "unet") | narrow).to(dtype)
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(sd1 / "vae") | narrow).to(dtype)
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(sd1 / "text_encoder", **texts)).to(dtype)
    scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(sd1 / "scheduler"))
    components = Components(unet, vae, text, clip_tokenizer(sd1), scheduler, "random SD 1.x")
    policy = DiffusionPolicy(
        StableDiffusion.from_components(components),
        steps=args.steps,
        guidance=5.0,
        resolution=args.resolution,
        device=args.device,
        autocast=None if dtype == torch.float32 else dtype,
    )
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    return policy


def make_encoder(precision: str, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """A ViT-L/14 at 224 px, as the aesthetic reward's, with the critic's preprocessing on the device."""
    dtype = DTYPES[precision]
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=1 if args.small else 24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device(args.device):
        model = CLIPVisionModelWithProjection(config).to(dtype).eval()

    def embed(images: Tensor) -> Tensor:
        small = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True)
        return torch.nn.functional.normalize(model(small.to(dtype)).image_embeds.float(), dim=-1)

    return embed


def measure(
    policy: DiffusionPolicy, encoder: Callable[[Tensor], Tensor], size: int, train_steps: int
) -> dict[str, Any]:
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
    peak = gauge.peak()
    with policy.uncompiled():
        operations = flops_of(lambda: train(policy, latents, log_probs, 1))
    return {
        "micro_batch": size,
        "drift": drift,
        "sampling": sampling / size,
        "decoding": decoding / size,
        "encoding": encoding / size,
        "training": training / size * len(policy.process) / train_steps,
        "rate": operations * train_steps / training,
        "peak": peak / 2**30,
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


def peak_rate(precision: str) -> float | None:
    """The card's floating-point operations per second at most; None for a card that PEAKS lacks."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = next((rates for words, rates in PEAKS.items() if all(word in name for word in words)), None)
    return found and 1e12 * found[precision == "fp32"]


def report(rows: list[dict[str, Any]], chosen: list[str], args: argparse.Namespace) -> str:
    return "\n".join(_lines(rows, chosen, args))


def _lines(rows: list[dict[str, Any]], chosen: list[str], args: argparse.Namespace) -> Iterator[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    yield (
        f"`python benchmarks/sd14_gpu.py` on {date.today()}: {device}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; {args.resolution} px, T = {args.steps}, guidance 5, LoRA rank 4, random "
        f"weights. Seconds per sample; training extrapolated from {args.train_steps} of {args.steps} steps. The first "
        "batch of a size, with one trained step, includes what is compiled, loaded and chosen then."
    )
    yield ""
    yield (
        "| precision | compiled | micro-batch | worst abs(ratio - 1) | sampling | decoding | encoding | training | "
        "in all | TFLOP/s in training | MFU | peak memory, GiB | first batch, s |"
    )
    yield "|---" * 13 + "|"
    best: tuple[float, float] | None = None
    for row in rows:
        most = peak_rate(row["precision"])
        mfu = "-" if most is None else f"{row['rate'] / most:.0%}"
        total = sum(row[phase] for phase in ("sampling", "decoding", "encoding", "training"))
        if most is not None and (best is None or total < best[0]):
            best = total, row["rate"] / most
        yield (
            f"| {row['precision']} | {'yes' if row['compiled'] else 'no'} | {row['micro_batch']} | "
            f"{row['drift']:.1e} | {row['sampling']:.2f} | "
            f"{row['decoding']:.2f} | {row['encoding']:.2f} | {row['training']:.2f} | {total:.2f} | "
            f"{row['rate'] / 1e12:.2f} | {mfu} | {row['peak']:.1f} | {row['first']:.0f} |"
        )
    yield ""
    if best is not None:
        yield (
            f"The fastest takes {best[0]:.2f} s a sample at an MFU of {best[1]:.0%}; wanted on an H100: at most "
            f"{TARGET_SECONDS:g} s and at least {TARGET_MFU:.0%}. MFU counts products of matrices and convolutions, "
            "forward and backward, against the dense rate that the vendor gives."
        )
        yield ""
    for line in chosen:
        yield f"- {line}"


if __name__ == "__main__":
    sys.exit(main())
