"""How a reward is to be loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """dtype: of an encoder's weights and activations; weights: a file or folder to use instead of looking for one."""

    device: torch.device
    dtype: torch.dtype
    weights: Path | None = None

    @property
    def weights_folder(self) -> Path | None:
        """For what a reward needs beside its main file: a file that is named stands for the main one alone."""
        return self.weights if self.weights is not None and not self.weights.is_file() else None
