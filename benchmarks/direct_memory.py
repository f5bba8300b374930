"""How much GPU memory does DRaFT need at 512 px, and with it AlignProp, which differs in the number of steps?

`python benchmarks/direct_memory.py` writes the table in docs/direct-gradients.md; with another `--resolution`, it only
prints one, unless `--page` names a page.

Runs one update of one sample through the trainer's own code on Stable Diffusion 1.x and a reward of true size, with
fake tensors: they have shapes and no values, so that nothing is computed and no GPU is needed. Counts the bytes of all
tensors that are alive at once, as a GPU would hold them; see comfy_tdpo/memory/without_values.py.

Not counted: the CUDA context (0.3 to 0.6 GiB), the work space of kernels, and gaps that the allocator leaves.
"""

import argparse
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from comfy_tdpo.memory.counting import Held
from comfy_tdpo.memory.without_values import counted
from comfy_tdpo.methods.context import Context
from comfy_tdpo.methods.direct.direct_gradient import DirectGradient
from comfy_tdpo.models.components import Components
from comfy_tdpo.models.shipped import CONFIGS, clip_tokenizer
from comfy_tdpo.models.sizes import weights_of_dtype
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.optimizers import adamw
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.processes import Processes
from comfy_tdpo.rewards import aesthetic, hpsv2
from comfy_tdpo.rewards.clip import ClipImages
from comfy_tdpo.rewards.head import LinearHead
from comfy_tdpo.rollout import Decoder
from comfy_tdpo.trainer.assemble import DTYPES
from comfy_tdpo.trainer.config import TrainConfig, make_config

HERE = Path(__file__).parent
GIB = 2**30
PAGE = HERE.parent / "docs" / "direct-gradients.md"
RESOLUTION = 512  # pixels, of the page
BEGIN, END = "<!-- direct-memory: begin -->", "<!-- direct-memory: end -->"
OFF: dict[str, Any] = {"recompute": {"steps": False}}
STEPS: dict[str, Any] = {"recompute": {"steps": True}}
BLOCKS = STEPS | {"policy": {"gradient_checkpointing": True}}
ALL = BLOCKS | {"recompute": {"steps": True, "decoder": True, "reward": True}}
CASES = [  # reward, its precision, K, what is recomputed
    ("aesthetic", "fp32", 1, "nothing", OFF),
    ("aesthetic", "fp32", 2, "nothing", OFF),
    ("aesthetic", "fp32", 1, "steps (default)", STEPS),
    ("aesthetic", "fp32", 8, "steps (default)", STEPS),
    ("aesthetic", "fp32", 1, "steps, their blocks", BLOCKS),
    ("aesthetic", "fp32", 1, "steps, their blocks, decoder, reward", ALL),
    ("hpsv2", "fp32", 1, "steps (default)", STEPS),
    ("hpsv2", "fp32", 1, "steps, their blocks, decoder, reward", ALL),
    ("hpsv2", "bf16", 1, "steps, their blocks, decoder, reward", ALL),
]
PROMPT = "a photo of a cat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=RESOLUTION)
    parser.add_argument("--page", type=Path, help=f"page with the table (default: {PAGE.name}, at {RESOLUTION} px)")
    args = parser.parse_args()
    page = args.page or (PAGE if args.resolution == RESOLUTION else None)
    try:
        if page:
            around_table(page)  # before the work
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = [measured(*case, args.resolution) for case in CASES]
    table = report(rows, args.resolution)
    print(table)
    if page:
        before, after = around_table(page)
        page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def around_table(page: Path) -> tuple[str, str]:
    """The page before and after its table; ValueError if it has no place for one."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"got {page} without a place for the table; expected the lines {BEGIN} and {END}")
    return before, after


def measured(reward: str, precision: str, graded: int, what: str, recompute: dict[str, Any], resolution: int) -> dict:
    """Peaks, in bytes, of one update of one sample with `graded` steps with gradient."""
    settings = {"resolution": resolution, "micro_batch": 1, "decode_batch": 1, "reward_precision": precision}
    draft = {"algorithm": "draft", "last_steps": graded, "samples_per_epoch": 1, "samples_per_update": 1}
    config = make_config(f"sd14-{reward}", overrides={**settings, **draft, **recompute})
    with counted() as held:
        peaks = peaks_of(held, make_method(config, CONFIGS / "sd1"))
    found = {"reward": reward, "precision": precision, "K": graded, "what": what, **peaks}
    print(found, flush=True)
    return found


def peaks_of(held: Held, method: DirectGradient) -> dict[str, int]:
    """The most bytes alive in an update: in decoder and reward, and in the steps; and before it, the weights."""
    decoder, found = method.context.decoder, {"weights": held.bytes}

    def decode(*args: Any, **named: Any) -> Tensor:
        columns, found["in reward"] = held.peak_of(lambda: decoder(*args, **named))
        held.reset()
        return columns

    with patch.object(method.context, "decoder", decode):
        final, drawing = held.peak_of(lambda: draw(method))
        method._backward(final, [PROMPT], measure=False)
        method.context.optimizer.step()
    return found | {"in steps": max(drawing, held.peak())}


# --- an update without values


def draw(method: DirectGradient) -> Tensor:
    """The steps with gradient of one sample; those before them need less."""
    policy = method.policy
    conditioning = policy.encode_prompts([PROMPT])
    latents = torch.randn(1, *policy.latent_shape)
    for k in range(len(policy.process) - method.config.last_steps, len(policy.process)):
        mean, sigma, _ = method.take_step(latents, torch.full((1,), k), conditioning)
        latents = mean + sigma * torch.randn_like(latents)
    return latents


# --- what is trained


class Unchecked(DirectGradient):
    """With rewards that nobody looks at, since they have no values."""

    def loss(self, rewards: Tensor) -> Tensor:
        return -rewards

    def _rewards(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.context.reward.score(images, prompts)


def make_method(config: TrainConfig, sizes: Path) -> DirectGradient:
    """What draws and updates as `config` says, with a model whose configuration is in the folder `sizes`."""
    with unset_fake_temporarily():
        scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(sizes / "scheduler"))
    with weights_of_dtype(DTYPES[config.precision]):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sizes / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(sizes / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(sizes / "text_encoder"))
    components = Components(unet, vae, text, clip_tokenizer(sizes), scheduler, "Stable Diffusion 1.x")
    policy = DiffusionPolicy(
        StableDiffusion.from_components(components),
        steps=config.steps,
        guidance=config.guidance,
        resolution=config.resolution,
        settings=config.policy,
        autocast=None if config.precision == "fp32" else DTYPES[config.precision],
    )
    (name,) = config.rewards
    with weights_of_dtype(DTYPES[config.reward_precision]):
        reward = REWARDS[name](torch.get_default_dtype())
    context = Context(
        config=config,
        policy=policy,
        optimizer=adamw(policy.parameters, config.policy),
        decoder=Decoder(policy, config.decode_batch),
        reward=reward,
        eval_rewards={},
        processes=Processes(Accelerator(cpu=True)),
        samples=1,
        samples_per_update=1,
        micro_batch=1,
        prompts=lambda epoch: [PROMPT],
        check=lambda: None,
        record=lambda *_: None,
        record_policy=lambda *_: None,
    )
    return Unchecked(context)


def make_aesthetic(dtype: torch.dtype) -> aesthetic.Aesthetic:
    with weights_of_dtype(torch.float32):
        head = LinearHead(aesthetic.ARCHITECTURE.projection_dim)
    encoder = ClipImages(CLIPModel(aesthetic.ARCHITECTURE))
    size = aesthetic.ARCHITECTURE.vision_config.image_size
    return unloaded(aesthetic.Aesthetic, name="aesthetic", head=head, encoder=encoder, size=size, embed_dim=768)


def make_hpsv2(dtype: torch.dtype) -> hpsv2.HPSv2:
    encoder = CLIP(**hpsv2.ARCHITECTURE)
    more = {"tokenizer": SimpleTokenizer(), "size": 224, "dtype": dtype, "embed_dim": 1024}
    return unloaded(hpsv2.HPSv2, name="hpsv2", encoder=encoder, **more)


def unloaded(cls: type, **attributes: Any) -> Any:
    """A reward whose networks, among its `attributes`, are not read from a file."""
    reward: Any = object.__new__(cls)
    for value in attributes.values():
        if isinstance(value, nn.Module):
            value.requires_grad_(False).eval()
    vars(reward).update(attributes)
    return reward


REWARDS: dict[str, Callable[[torch.dtype], Any]] = {"aesthetic": make_aesthetic, "hpsv2": make_hpsv2}


def report(rows: list[dict], resolution: int) -> str:
    command = "python benchmarks/direct_memory.py" + f" --resolution {resolution}" * (resolution != RESOLUTION)
    lines = [
        f"Computed on {date.today()} by `{command}` (torch {torch.__version__}, Python {platform.python_version()}): "
        f"one sample at a time at {resolution} px, base model in bf16, GiB.",
        "",
        "| reward | its precision | K | computed again | weights | decoder and reward | steps | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = [row["weights"], row["in reward"], row["in steps"], max(row["in reward"], row["in steps"])]
        cells = [row["reward"], row["precision"], str(row["K"]), row["what"], *(f"{size / GIB:.1f}" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
