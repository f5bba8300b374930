"""LoRA (arXiv 2106.09685) on a U-Net: adapters in, one safetensors file out that every tool loads.

Files are in kohya's key format, read by ComfyUI, A1111 and diffusers alike; ComfyUI skips diffusers' own keys for
attention projections without a word.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from .randomness import generator_at
from .tensor_files import write_tensors

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "attention": ATTENTION,
    "attention+feed-forward": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),
}


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Put trainable float32 adapters on the U-Net's `targets`; the adapted U-Net computes what it did before.

    Args:
        rank: the adapters' rank; alpha: their scale times the rank; targets: a key of TARGETS; seed: of A's draw
            from N(0, 1/rank), as in the authors' code. B starts at zero.
    """
    if targets not in TARGETS:
        raise ValueError(f"got LoRA targets {targets!r}; expected one of {', '.join(TARGETS)}")
    with torch.random.fork_rng([]):  # peft draws from torch's global generator; its draw of A is replaced below
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS[targets])))
    for name, parameter in named_lora_parameters(unet).items():
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            fresh = torch.randn(parameter.shape, generator=generator_at(seed, "lora", name)) / rank
            parameter.data.copy_(fresh)


def named_lora_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters under their names in the U-Net."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights under peft's names, for checkpoints."""
    return get_peft_model_state_dict(unet)


def load_lora_state(unet: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `lora_state` gave."""
    different = sorted(state.keys() ^ lora_state(unet).keys())
    if different:
        raise ValueError(
            f"got adapter weights of another model or of other targets: {different[0]!r} (and maybe more) is in one of "
            "the two only; expected those of the same model and policy.targets"
        )
    set_peft_model_state_dict(unet, state)


def kohya_state(unet: nn.Module, alpha: float) -> dict[str, Tensor]:
    """The adapters' weights under kohya's names: lora_unet_<path>.lora_down.weight, .lora_up.weight and .alpha."""
    state = {}
    for key, weight in lora_state(unet).items():
        path, matrix, _ = key.rsplit(".", 2)  # down_blocks.0...to_q, lora_A, weight
        module = f"lora_unet_{path.replace('.', '_')}"
        direction = {"lora_A": "lora_down", "lora_B": "lora_up"}[matrix]
        state[f"{module}.{direction}.weight"] = weight.detach().float()
        state[f"{module}.alpha"] = torch.tensor(float(alpha))
    return state


def save_lora(unet: nn.Module, path: Path, alpha: float, metadata: dict[str, str]) -> None:
    """Write the adapters to `path` in kohya's format; `metadata` goes into the file's header."""
    write_tensors(path, kohya_state(unet, alpha), {"format": "pt", **metadata})
