"""Full fine-tuning: every weight of a denoiser is trained, and exported under diffusers' names.

The file holds what the network's `load_state_dict` reads, in the precision in which the base model was loaded. ComfyUI
reads it as a diffusion model.
"""

from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from ..swapping import swapped
from ..tensor_files import write_tensors


class AllWeights:
    """A Trainable: all weights of `network`, in float32 or, in low precision, as they were loaded."""

    sharded = False

    def __init__(self, network: nn.Module, low_precision: bool = False):
        self.network = network
        self.dtype = next(network.parameters()).dtype
        self.base = {name: _on_cpu(parameter) for name, parameter in network.named_parameters()}
        self.parameters: dict[str, nn.Parameter] = dict(network.requires_grad_(True).named_parameters())
        if not low_precision:
            for parameter in self.parameters.values():
                parameter.data = parameter.data.float()

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        _check_same("weights", state, self.state())
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])

    def reference(self) -> AbstractContextManager[None]:
        return swapped(self.parameters, self.base, in_place=self.sharded)

    def load_exported(self, weights: dict[str, Tensor], strength: float = 1.0) -> None:
        """Load the `weights` of a file that `export` wrote, with `strength` times their distance from the base model:

            base + strength (weights - base).

        Raises:
            ValueError: the file belongs to a different model.
        """
        _check_same("a file with weights", weights, self.network.state_dict())
        for name, parameter in self.parameters.items():
            weight = weights[name]
            if strength != 1:
                base = self.base[name].float()
                weight = base + strength * (weight.to(base) - base)
            parameter.data.copy_(weight)

    def export(self, path: Path, metadata: dict[str, str]) -> None:
        """Write all weights to `path`; `metadata` goes into the file's header."""
        self._write(path, self.network.state_dict(), metadata)

    def _write(self, path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
        stored = {name: weight.detach().to("cpu", self.dtype) for name, weight in weights.items()}
        write_tensors(path, stored, {"format": "pt", **metadata})


def _on_cpu(parameter: nn.Parameter) -> Tensor:
    """A copy in main memory, from where it is copied back faster if it is pinned."""
    copy = parameter.detach().to("cpu", copy=True)
    return copy.pin_memory() if parameter.device.type == "cuda" else copy


def _check_same(what: str, got: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ValueError unless both have the same names and shapes."""
    for name in sorted(got.keys() | own.keys()):
        found, expected = (_described(weights.get(name)) for weights in (got, own))
        if found != expected:
            raise ValueError(
                f"got {what} of another model: its {name} is {found}, here it is {expected}; expected those of a run "
                "on this model with policy.train full"
            )


def _described(weight: Tensor | None) -> str:
    return "missing" if weight is None else f"of shape {tuple(weight.shape)}"
