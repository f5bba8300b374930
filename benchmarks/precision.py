"""How far does a precision move the ratio? `python benchmarks/precision.py` writes benchmarks/precision.md.

The U-Net of Stable Diffusion 1.x at true size with random weights, and a LoRA after 0, 1 and 10 updates. In each
precision it predicts the means of the same steps. What is compared with float32:

- at equal weights, the log-ratio between the two precisions;
- after the updates, the log-ratio of the moved policy to the first, both in that precision. Where that leaves the clip
  range though float32's stays inside, precision alone has clipped the sample.

Noise and states are drawn, not sampled: every x_k is standard normal, as a latent of unit variance is at each step. The
weights are rounded to bf16, so that all precisions hold the same ones. The last layer is scaled until the output has
the size of the noise that a trained model predicts. Under autocast, normalisation is in float32, as on CUDA.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import NormalDist
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from pairs import REMEDY, Line, machine, results, row, when_and_where
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_tdpo.memory.without_values import in_float32
from comfy_tdpo.methods.objectives import policy_loss
from comfy_tdpo.models.conditioning import TensorConditioning
from comfy_tdpo.models.shipped import CONFIGS
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.optimizers import adamw
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.process.gaussian import log_prob
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.trainer.run.json_lines import append_lines, read_lines

HERE = Path(__file__).parent
STEPS, GUIDANCE, CLIP = 50, 5.0, 1e-4
UPDATES = (0, 1, 10)
ROWS = 2  # of an update
REFERENCE_SIZE = 4 * 64 * 64  # elements of a latent at 512 px, which the clip range is for
# name -> dtype of the weights, and of autocast
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bf16, autocast": (torch.bfloat16, torch.bfloat16),
    "bf16 weights alone": (torch.bfloat16, None),
    "fp16, autocast": (torch.float16, torch.float16),
    "fp16 weights alone": (torch.float16, None),
}
CONCLUSION = (
    "So float32 is the default, and the presets of Stable Diffusion 1.x and XL use fp16, as the paper's runs did. "
    "In bf16, rounding moves a log-ratio by more than an update does, and out of the clip range nearly always; in "
    "fp16, rarely. TF32 rounds what a product or a convolution takes to fp16's 10 bits of mantissa, and nothing else; "
    "simulated on the network of Shapes, it moves a step about half as far as fp16 does. So a float32 run has it "
    "off, in cuDNN too. Models of flow matching overflow in fp16 and stay in bf16. The mean error is -r^2 / 2, so "
    "larger latents do not help bf16. Half precision without autocast has the larger errors, and is not offered. "
    "These numbers cannot say how a trained network or CUDA's kernels round, nor how well a run learns from such "
    "ratios: a good sample that rounding makes look less likely keeps its gradient."
)
Means = dict[int, Tensor]  # updates -> (S, C, H, W), of each state's step


class NoDecoder:
    """A LatentDecoder that is never asked."""

    factor = 8

    def __call__(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--states", type=int, default=12, help="steps that are compared, spread over the 50")
    parser.add_argument("--sizes", type=Path, default=CONFIGS / "sd1", help="folder with the model's configuration")
    parser.add_argument("--work", type=Path, default=Path("precision-work"), help="what is kept between two starts")
    parser.add_argument("--out", type=Path, default=HERE / "precision.jsonl")
    parser.add_argument("--page", type=Path, default=HERE / "precision.md")
    args = parser.parse_args()
    measure_missing(args)
    args.page.write_text(page(results(args.out)), encoding="utf-8")
    print(args.page.read_text(encoding="utf-8"))


# --- what is measured


def measure_missing(args: argparse.Namespace) -> None:
    """Measure the precisions that `args.out` lacks."""
    args.work.mkdir(exist_ok=True)
    done = {line["precision"] for line in results(args.out)}
    missing = [name for name in PRECISIONS if name != "float32" and name not in done]
    if not missing:
        return
    policy = make_policy(args)
    latents, positions, noise = states(policy, args.states)
    reference = trained(policy, latents, positions, noise, args.work)
    for name in missing:
        print(f"--- {name}", flush=True)
        found = means(policy, name, latents, positions, args.work)
        lines = list(compared(policy, name, found, reference, positions, noise))
        read_lines(args.out, lambda line: None, REMEDY)  # removes a line that was cut off
        append_lines(args.out, lines)


def make_policy(args: argparse.Namespace) -> DiffusionPolicy:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(args.sizes / "unet"))
    scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(args.sizes / "scheduler"))

    def encode(prompts: list[str]) -> TensorConditioning:
        shape = (77, unet.config.cross_attention_dim)
        states = torch.stack([torch.randn(shape, generator=generator_at("prompt", prompt)) for prompt in prompts])
        return TensorConditioning(states=states.bfloat16().to(unet.conv_in.weight.dtype))

    model = StableDiffusion(unet, scheduler, encode, NoDecoder(), "random SD 1.x")
    policy = DiffusionPolicy(
        model, steps=STEPS, guidance=GUIDANCE, resolution=args.resolution, settings=PolicySettings()
    )
    with torch.no_grad():
        latents = torch.randn(2, *policy.latent_shape, generator=generator_at("scale"))
        output = model.denoise(latents, policy.process.times[[0, STEPS // 2]], encode(["a", "b"]))
        scale = 1 / output.std()
        for weight in (unet.conv_out.weight, unet.conv_out.bias):
            weight.mul_(scale)
        for weight in unet.parameters():
            if not weight.requires_grad:
                weight.copy_(weight.bfloat16())
    return policy


def states(policy: DiffusionPolicy, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents x_k, positions k, and the noise of the step that is taken there."""
    draw = generator_at("states")
    latents, noise = (torch.randn(count, *policy.latent_shape, generator=draw) for _ in range(2))
    return latents, torch.linspace(0, STEPS - 1, count).round().long(), noise


def trained(policy: DiffusionPolicy, latents: Tensor, positions: Tensor, noise: Tensor, work: Path) -> Means:
    """The means in float32; the LoRA after each of UPDATES is kept in `work`."""
    optimizer = adamw(policy.parameters, PolicySettings())
    draw = generator_at("updates")
    for update in range(max(UPDATES) + 1):
        if update in UPDATES:
            save_file({name: w.detach() for name, w in policy.trainable.parameters.items()}, lora(work, update))
        if update < max(UPDATES) and not lora(work, max(UPDATES)).exists():
            step(policy, optimizer, draw)
            print(f"update {update + 1}", flush=True)
    return means(policy, "float32", latents, positions, work)


def lora(work: Path, updates: int) -> Path:
    return work / f"lora-{updates}.safetensors"


def step(policy: DiffusionPolicy, optimizer: torch.optim.Optimizer, draw: torch.Generator) -> None:
    """A policy gradient on new samples, half of which are to become more likely and half less."""
    latents, noise = (torch.randn(ROWS, *policy.latent_shape, generator=draw) for _ in range(2))
    positions = torch.randint(STEPS, (ROWS,), generator=draw)
    optimizer.zero_grad()
    for i in range(ROWS):
        here = slice(i, i + 1)
        mean, sigma, _ = policy.step(latents[here], positions[here], policy.encode_prompts([f"prompt {i}"]))
        sample = mean.detach() + sigma * noise[here]
        log_ratio = log_prob(sample, mean, sigma) - log_prob(sample, mean.detach(), sigma)
        policy_loss(log_ratio.exp(), torch.tensor([1.0 - 2 * i]), CLIP).sum().backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
    optimizer.step()


@torch.no_grad()
def means(policy: DiffusionPolicy, name: str, latents: Tensor, positions: Tensor, work: Path) -> Means:
    """What the policy predicts in the precision `name`, for each of UPDATES; one state at a time."""
    weights, autocast = PRECISIONS[name]
    for parameter in policy.model.network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(weights)
    policy.autocast = autocast
    policy._encoded.clear()  # they have the weights' dtype
    found = {}
    for updates in UPDATES:
        for key, weight in load_file(lora(work, updates)).items():
            policy.trainable.parameters[key].copy_(weight)
        with as_on_cuda():
            rows = [slice(i, i + 1) for i in range(len(latents))]
            prompts = [policy.encode_prompts([f"prompt {i}"]) for i in range(len(latents))]
            steps = [policy.step(latents[r], positions[r], prompt) for r, prompt in zip(rows, prompts, strict=True)]
        found[updates] = torch.cat([step.mean for step in steps])
        print(f"{name}, {updates} updates", flush=True)
    return found


def as_on_cuda() -> ExitStack:
    """Inside the block, autocast normalises in float32."""
    stack = ExitStack()
    for norm in ("group_norm", "layer_norm"):
        stack.enter_context(patch.object(F, norm, in_float32(getattr(F, norm))))
    return stack


def compared(
    policy: DiffusionPolicy, name: str, found: Means, reference: Means, positions: Tensor, noise: Tensor
) -> Iterator[Line]:
    """A line for each number of updates: of each state, in units of the step's noise, how far the precision moves the
    mean, and how far it moves the update's own change of the mean; and both log-ratios."""
    sigma = policy.process.sigma[positions].view(-1, 1, 1, 1)
    for updates in UPDATES:
        moved = (found[updates] - reference[updates]) / sigma
        changes = [(means[updates] - means[0]) / sigma for means in (found, reference)]
        yield {
            "precision": name,
            "updates": updates,
            "elements": policy.latent_size,
            "positions": positions.tolist(),
            "moved": rms(moved),
            "changed": rms(changes[1]),
            "change_moved": rms(changes[0] - changes[1]),
            "log_ratio_of_precision": rounded(log_ratios(-moved, noise)),
            "log_ratio": rounded(log_ratios(changes[0], noise)),
            "log_ratio_float32": rounded(log_ratios(changes[1], noise)),
            "date": str(date.today()),
            "machine": f"{machine()}, torch {torch.__version__}",
        }


def log_ratios(change: Tensor, noise: Tensor) -> Tensor:
    """log p_new - log p_old, (S,), averaged over elements, of samples old mean + sigma * noise, where the new mean is
    `change` sigmas away."""
    return (noise * change - change**2 / 2).mean((1, 2, 3))


def rms(values: Tensor) -> list[float]:
    return rounded(values.square().mean((1, 2, 3)).sqrt())


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


# --- the page


def page(lines: list[Line]) -> str:
    size, count = lines[0]["elements"], len(lines[0]["positions"])
    text = [
        "# How far a precision moves the ratio",
        "",
        f"`python benchmarks/precision.py` on {when_and_where(lines)}: the U-Net of Stable Diffusion 1.x at true size, "
        f"random weights, latents of {size} elements, guidance {GUIDANCE:g}, a LoRA of rank 4 after as many updates of "
        f"learning rate 1e-4; {count} of {STEPS} steps. The script says what is drawn and what is as on CUDA. Raw "
        "results: `precision.jsonl`.",
        "",
        "- at equal weights: log-ratio between this precision and float32, root mean square (rms) over steps;",
        "- update: the log-ratio of the moved policy to the first in float32, rms, for comparison;",
        "- error: how far the same log-ratio in this precision is from that, rms;",
        f"- error at 512 px: the same on latents of {REFERENCE_SIZE} elements. Where the precision moves an element's "
        "change by r sigmas (rms), a log-ratio is off by -r^2 / 2 on average, with a standard deviation of "
        "r / sqrt(elements), since the noise of a step is independent of the rounding;",
        f"- clipped: share of steps that such an error takes out of a clip range of {CLIP:g} from a log-ratio of 0.",
        "",
        *row(
            "precision",
            "updates",
            "at equal weights",
            "update",
            "error",
            "error at 512 px",
            "clipped at 512 px",
            head=True,
        ),
    ]
    for line in lines:
        if line["updates"]:
            text += row(*cells(line))
    text += ["", CONCLUSION]
    return "\n".join(text) + "\n"


def cells(line: Line) -> list[str]:
    errors = [a - b for a, b in zip(line["log_ratio"], line["log_ratio_float32"], strict=True)]
    large = [NormalDist(-(r**2) / 2, r / math.sqrt(REFERENCE_SIZE)) for r in line["change_moved"]]
    clipped = statistics.fmean(1 - error.cdf(CLIP) + error.cdf(-CLIP) for error in large)
    sizes = (line["log_ratio_of_precision"], line["log_ratio_float32"], errors)
    numbers = [f"{math.sqrt(statistics.fmean(value**2 for value in values)):.1e}" for values in sizes]
    at_512 = math.sqrt(statistics.fmean(error.mean**2 + error.variance for error in large))
    return [line["precision"], str(line["updates"]), *numbers, f"{at_512:.1e}", f"{clipped:.1%}"]


if __name__ == "__main__":
    main()
