"""Options for loading a reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """dtype: of the encoder's weights and activations; weights: a file or folder to use instead of searching."""

    device: torch.device
    dtype: torch.dtype
    weights: Path | None = None

    @property
    def weights_folder(self) -> Path | None:
        """`weights` for a reward's additional files: None if it is a file, because that replaces only the main file."""
        return self.weights if self.weights is not None and not self.weights.is_file() else None
