"""Tiny models of Stable Diffusion's true architectures, as diffusers folders and as files in the original layout.

The file in the original layout is made by benchmarks/full_architecture.py, whose table of names is written from the two
architectures and shares nothing with the conversion under test.
"""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from comfy_tdpo.models import shipped

ROOT = Path(__file__).parent.parent
SHIPPED = shipped.CONFIGS
MODEL = "model.diffusion_model."

# Sizes that make a family's architecture tiny and leave its layout as it is, layer by layer.
TINY_UNET = {"block_out_channels": [32, 64, 64, 64]}
TINY_SIZES = {
    "sd1": {
        "unet": TINY_UNET | {"cross_attention_dim": 32},
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    },
    "sd2": {
        "unet": TINY_UNET | {"cross_attention_dim": 48, "attention_head_dim": [1, 2, 2, 2]},
        "text_encoder": {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4},
    },
}
TINY_SIZES["sd2-v"] = TINY_SIZES["sd2"]
TINY_SIZES["sdxl"] = {
    "unet": {
        "block_out_channels": [32, 32, 64],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 2, 4],
        "cross_attention_dim": 32 + 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
    "text_encoder": TINY_SIZES["sd1"]["text_encoder"],
    "text_encoder_2": TINY_SIZES["sd2"]["text_encoder"] | {"num_hidden_layers": 3, "projection_dim": 48},
}


def make_tiny_configs(folder: Path) -> Path:
    """The shipped configurations with tiny sizes, in `folder`."""
    shutil.copytree(SHIPPED, folder)
    for family, parts in TINY_SIZES.items():
        for part, sizes in (parts | {"vae": {"block_out_channels": [32, 32, 64, 64]}}).items():
            path = folder / family / part / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    return folder


def make_tiny_model(folder: Path, configs: Path) -> tuple[Path, Path]:
    """The same random weights in float16 as a diffusers folder and as a single file, in `folder`."""
    return runpy.run_path(str(ROOT / "benchmarks" / "full_architecture.py"))["make_models"](folder, configs)


def edited(source: Path, target: Path, change: Callable[[dict], object], metadata: dict | None = None) -> str:
    """`source` with its weights changed in place by `change`, as `target`."""
    weights = load_file(source)
    change(weights)
    save_file(weights, target, metadata)
    return str(target)


def make_tiny_sd3(folder: Path, tokenizer, with_t5: bool = True) -> Path:
    """Stable Diffusion 3.5 with random weights, as a diffusers folder; `tokenizer` is CLIP's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "transformer": SD3Transformer2DModel(
                sample_size=16,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=64,
                joint_attention_dim=64,
                caption_projection_dim=128,
                pooled_projection_dim=48,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
            ),
            "text_encoder": _clip(tokenizer, 16),
            "text_encoder_2": _clip(tokenizer, 32),
            "text_encoder_3": _t5() if with_t5 else None,
        }
    StableDiffusion3Pipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=_t5_tokenizer() if with_t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def _clip(tokenizer, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4))


def _t5_tokenizer() -> T5TokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581green", "\u2581circle", "\u2581rabbit"]
    tokens = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=2))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokens, extra_ids=0)
