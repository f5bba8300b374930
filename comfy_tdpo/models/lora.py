"""LoRA (arXiv 2106.09685) on a network, exported to one safetensors file that common tools can load.

Files of U-Nets use kohya's key format, which ComfyUI, A1111 and diffusers all read. ComfyUI silently skips diffusers'
own keys for attention projections of U-Nets. Files of transformers use diffusers' keys, which ComfyUI reads too. They
have no alpha, since diffusers rejects a file of SD 3 that has one; alpha / rank is part of B.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..randomness import generator_at
from ..tensor_files import write_tensors

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "attention": ATTENTION,
    "attention+feed-forward": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),
}


class Lora(ABC):
    """A Trainable: a float32 LoRA on a network, whose output is unchanged until the LoRA is trained.

    Args:
        network: gets the LoRA; of diffusers, or another with `add_adapter`.
        rank, alpha: of the LoRA, whose output is scaled by alpha / rank.
        modules: the ends of the names of the layers that get it.
        seed: for the initial A, normal with std 1/rank as in the authors' code; B starts at zero.
    """

    sharded = False

    def __init__(self, network: Any, rank: int, alpha: float, modules: Sequence[str], seed: int):
        self.network, self.rank, self.alpha = network, rank, alpha
        self.base: dict[str, Tensor] = {}  # nothing of the base model is trained
        with torch.random.fork_rng([]):  # peft uses torch's global generator; its A is replaced below
            network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules)))
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad
        }
        for name, parameter in self.parameters.items():
            parameter.data = parameter.data.float()
            if "lora_A" in name:
                fresh = torch.randn(parameter.shape, generator=generator_at(seed, "lora", name)) / rank
                parameter.data.copy_(fresh)

    def state(self) -> dict[str, Tensor]:
        """The LoRA's weights under peft's names, for checkpoints."""
        return get_peft_model_state_dict(self.network)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: `state` belongs to a different LoRA.
        """
        different = sorted(state.keys() ^ self.state().keys())
        if different:
            raise ValueError(
                f"got LoRA weights of another model or of other targets: {different[0]!r} (and maybe more) is in only "
                "one of the two; expected weights of the same model and policy.targets"
            )
        set_peft_model_state_dict(self.network, state)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block, the LoRA is off and the network is the frozen base model."""
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    @abstractmethod
    def file_state(self) -> dict[str, Tensor]:
        """The tensors of a file, by name."""

    @abstractmethod
    def _from_file(self, key: str, weights: dict[str, Tensor]) -> Tensor:
        """Of the `weights` of a file, the one that has the name `key` in `state`."""

    def load_exported(self, weights: dict[str, Tensor], strength: float = 1.0) -> None:
        """Load the `weights` of a file that `export` wrote, with `strength` times their effect.

        lora_B carries the strength, so that `export` then writes it as part of the file.

        Raises:
            ValueError: the file belongs to a different LoRA.
        """
        own = self.file_state()
        for name in sorted(weights.keys() | own.keys()):
            got, expected = (_described(name, state.get(name)) for state in (weights, own))
            if got != expected:
                raise ValueError(
                    f"got a LoRA file of another model or of other settings: its {name} is {got}, here it is {expected}"
                )
        state = {}
        for key in self.state():
            weight = self._from_file(key, weights)
            state[key] = weight * strength if "lora_B" in key else weight
        self.load(state)

    def export(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the LoRA to `path`; `metadata` goes into the file's header."""
        write_tensors(path, self.file_state(), {"format": "pt", **metadata})


class UNetLora(Lora):
    """A LoRA on a U-Net; `targets` is a key of TARGETS.

    Its file has kohya's names: lora_unet_<path>.lora_down.weight, .lora_up.weight and .alpha.
    """

    def __init__(self, unet: UNet2DConditionModel, rank: int, alpha: float, targets: str, seed: int):
        if targets not in TARGETS:
            raise ValueError(f"got LoRA targets {targets!r}; expected one of {', '.join(TARGETS)}")
        super().__init__(unet, rank, alpha, TARGETS[targets], seed)

    def file_state(self) -> dict[str, Tensor]:
        state = {}
        for key, weight in self.state().items():
            module, direction = _kohya_name(key)
            state[f"{module}.{direction}.weight"] = weight.detach().float()
            state[f"{module}.alpha"] = torch.tensor(float(self.alpha))
        return state

    def _from_file(self, key: str, weights: dict[str, Tensor]) -> Tensor:
        module, direction = _kohya_name(key)
        return weights[f"{module}.{direction}.weight"]


class TransformerLora(Lora):
    """A LoRA on a transformer. Its file has diffusers' names: transformer.<path>.lora_A.weight and .lora_B.weight."""

    @property
    def _scale(self) -> float:
        return self.alpha / self.rank

    def file_state(self) -> dict[str, Tensor]:
        state = {key: weight.detach().float() for key, weight in self.state().items()}
        return {f"transformer.{key}": w * self._scale if "lora_B" in key else w for key, w in state.items()}

    def _from_file(self, key: str, weights: dict[str, Tensor]) -> Tensor:
        weight = weights[f"transformer.{key}"]
        return weight / self._scale if "lora_B" in key else weight


def _kohya_name(key: str) -> tuple[str, str]:
    """kohya's module, lora_unet_<path>, and matrix, lora_down or lora_up, of a weight under peft's name."""
    path, matrix, _ = key.rsplit(".", 2)  # down_blocks.0...to_q, lora_A, weight
    return f"lora_unet_{path.replace('.', '_')}", {"lora_A": "lora_down", "lora_B": "lora_up"}[matrix]


def _described(name: str, weight: Tensor | None) -> str:
    """What must be the same in two files: a weight's shape, and the value of an alpha."""
    if weight is None:
        return "missing"
    return f"{weight.item():g}" if name.endswith(".alpha") and weight.ndim == 0 else f"of shape {tuple(weight.shape)}"
