"""Does it train the real architecture? `python benchmarks/full_architecture.py` (4.5 GB of disk, 16 GB of memory).

Makes Stable Diffusion 1.x at full size with random fp16 weights (860 M U-Net, VAE, CLIP-L text encoder), as a
diffusers folder and as one checkpoint in the original layout. Then it trains one epoch of two samples at 64 px on each
through the command line. This shows that every part fits together at full size, not how well anything learns.

Options: `--family sdxl` makes Stable Diffusion XL instead (2.6 B U-Net, 14 GB of disk), which is trained at 128 px in
bf16; `--work DIR` keeps the models in DIR and reuses them; `--make-only` makes the models and trains nothing. A wired
MODEL of SDXL is trained likewise by `python -m pytest -m full tests/test_comfyui.py`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfy_tdpo.models.shipped import CONFIGS, clip_tokenizer

TRAINING = (
    *("--epochs", "1", "--samples-per-epoch", "2", "--samples-per-update", "2", "--steps", "4"),
    *("--output.grid-images", "1", "--reward", "shapes-aesthetic"),
    *("--guard", "shapes-alignment", "--overoptimisation.reward", "none"),  # the default ones are downloaded
)
SIZES = {
    "sd1": ("--resolution", "64", "--precision", "fp32"),  # few CPUs compute in bf16
    "sdxl": ("--resolution", "128", "--precision", "bf16", "--micro-batch", "1", "--policy.gradient-checkpointing"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the models and the runs; the default is removed after")
    parser.add_argument("--make-only", action="store_true", help="make the models and stop")
    parser.add_argument("--family", choices=SIZES, default="sd1", help="what to make; default sd1")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        models = make_models(work, CONFIGS / args.family)
        for model in () if args.make_only else models:
            subprocess.run(training_command(model, work / f"run-{model.stem}", args.family), check=True)


def training_command(model: Path, run: Path, family: str = "sd1") -> list[str]:
    program = [sys.executable, "-m", "comfy_tdpo.trainer"]
    return [*program, "--model", str(model), "--run-dir", str(run), *TRAINING, *SIZES[family]]


def make_models(work: Path, configs: Path) -> tuple[Path, Path]:
    """The same random weights twice, as work/folder and work/single.safetensors; `configs` gives the sizes."""
    folder, single = work / "folder", work / "single.safetensors"
    if not single.is_file():
        work.mkdir(parents=True, exist_ok=True)
        pipeline = random_pipeline(configs)
        pipeline.save_pretrained(folder)
        save_file(to_ldm(pipeline), single)
    return folder, single


def random_pipeline(configs: Path) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Components as in `configs`, initialised at random, in float16."""
    torch.manual_seed(0)

    def config(name: str) -> dict:
        return json.loads((configs / name).read_text(encoding="utf-8"))

    def text(cls: Any, name: str) -> nn.Module:
        return cls(CLIPTextConfig.from_pretrained(configs / name)).half()

    parts = {
        "unet": UNet2DConditionModel.from_config(config("unet/config.json")).half(),
        "vae": AutoencoderKL.from_config(config("vae/config.json")).half(),
        "text_encoder": text(CLIPTextModel, "text_encoder"),
        "tokenizer": clip_tokenizer(configs),
        "scheduler": DDIMScheduler.from_config(config("scheduler/scheduler_config.json")),
    }
    if (configs / "text_encoder_2").is_dir():
        second = text(CLIPTextModelWithProjection, "text_encoder_2")
        tokenizer = clip_tokenizer(configs, "tokenizer_2")
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **unused)


# --- the original (LDM) names of diffusers' weights, written from the two architectures


def to_ldm(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """`pipeline`'s weights under the keys of an original Stable Diffusion 1.x, 2.x or XL checkpoint."""
    parts = {
        "model.diffusion_model.": unet_to_ldm(pipeline.unet),
        "first_stage_model.": vae_to_ldm(pipeline.vae),
    }
    if hasattr(pipeline, "text_encoder_2"):
        parts["conditioner.embedders.0."] = sd1_text_to_ldm(pipeline.text_encoder)
        parts["conditioner.embedders.1."] = xl_text_to_ldm(pipeline.text_encoder_2)
    else:
        text = sd2_text_to_ldm if pipeline.unet.config.use_linear_projection else sd1_text_to_ldm
        parts["cond_stage_model."] = text(pipeline.text_encoder)
    return {prefix + key: weight.contiguous() for prefix, part in parts.items() for key, weight in part.items()}


def unet_to_ldm(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    attention = ["CrossAttn" in block for block in unet.config.up_block_types]

    def place(m: re.Match, first: int = 0) -> int:
        """LDM numbers layers straight through; a block has one more than `layers`: a resampler, or an up layer."""
        return first + int(m[1]) * (layers + 1) + int(m[2])

    def upsampler(m: re.Match) -> str:
        block = int(m[1])
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attention[block] else 1}."

    outer = [
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f"input_blocks.{place(m, 1)}.0."),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)\.", lambda m: f"input_blocks.{place(m, 1)}.1."),
        (r"^down_blocks\.(\d+)\.downsamplers\.(0)\.conv\.", lambda m: f"input_blocks.{place(m, layers + 1)}.0.op."),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f"output_blocks.{place(m)}.0."),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)\.", lambda m: f"output_blocks.{place(m)}.1."),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.", upsampler),
    ]
    resnet = [
        (r"\.norm1\.", ".in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.norm2\.", ".out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    ]
    return {
        rename(rename(key, resnet) if ".resnets." in key else key, outer): weight
        for key, weight in unet.state_dict().items()
    }


def vae_to_ldm(vae: AutoencoderKL) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    names = [
        (r"down_blocks\.(\d+)\.resnets\.", lambda m: f"down.{m[1]}.block."),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", lambda m: f"down.{m[1]}.downsample."),
        (r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block."),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample."),
        (r"mid_block\.resnets\.([01])\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"conv_norm_out\.", "norm_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
        (r"group_norm\.", "norm."),
        (r"to_([qkv])\.", lambda m: f"{m[1]}."),
        (r"to_out\.0\.", "proj_out."),
    ]
    state = {rename(key, names): weight for key, weight in vae.state_dict().items()}
    # the original's attention is made of 1x1 convolutions
    return {key: w[:, :, None, None] if "attn_1" in key and w.ndim == 2 else w for key, w in state.items()}


def sd1_text_to_ldm(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """transformers' own names of 2022, with the buffer they had."""
    state = text_weights(text_encoder)
    length = text_encoder.config.max_position_embeddings
    named = {f"transformer.text_model.{key}": weight for key, weight in state.items()}
    return named | {"transformer.text_model.embeddings.position_ids": torch.arange(length)[None]}


def sd2_text_to_ldm(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """open_clip's names, with the 24th layer, projection and temperature that SD 2.x carries and does not use."""
    ldm, depth = open_clip_names(text_encoder), text_encoder.config.num_hidden_layers
    width, top = text_encoder.config.hidden_size, f"transformer.resblocks.{depth - 1}."
    unused = {key.replace(top, f"transformer.resblocks.{depth}."): w for key, w in ldm.items() if key.startswith(top)}
    extra = {"text_projection": torch.randn(width, width), "logit_scale": torch.tensor(4.6)}
    return {f"model.{key}": weight.clone() for key, weight in (ldm | unused | extra).items()}


def xl_text_to_ldm(text_encoder: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """open_clip's names, whose projection is applied from the right, with the temperature that XL does not use."""
    extra = {"text_projection": text_encoder.text_projection.weight.T, "logit_scale": torch.tensor(4.6)}
    return {f"model.{key}": weight.clone() for key, weight in (open_clip_names(text_encoder) | extra).items()}


def open_clip_names(text_encoder: nn.Module) -> dict[str, Tensor]:
    """A text model's weights, without its projection, under open_clip's names."""
    state, depth = text_weights(text_encoder), text_encoder.config.num_hidden_layers
    names = [
        (r"^embeddings\.token_embedding\.", "token_embedding."),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^final_layer_norm\.", "ln_final."),
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
        (r"\.layer_norm([12])\.", lambda m: f".ln_{m[1]}."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ]
    ldm = {rename(key, names): weight for key, weight in state.items() if not re.search(r"\.[qkv]_proj\.", key)}
    for layer in range(depth):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ldm[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return ldm


def text_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Without the level "text_model", which transformers 5 dropped, and without a projection."""
    state = text_encoder.state_dict()
    return {key.removeprefix("text_model."): w for key, w in state.items() if not key.startswith("text_projection")}


def rename(key: str, names: list) -> str:
    for pattern, name in names:
        key = re.sub(pattern, name, key)
    return key


if __name__ == "__main__":
    main()
