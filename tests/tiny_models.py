"""Tiny models of Stable Diffusion's true architectures, as diffusers folders and as files in the original layout.

The file in the original layout is made by benchmarks/full_architecture.py, whose table of names is written from the two
architectures and shares nothing with the conversion under test.
"""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

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
