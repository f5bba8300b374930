"""Conditioning: what a denoiser needs to know of prompts. All other code treats it as opaque.

Shapes: B prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

Rows = slice | list[int]  # or int64 (B,)


class Conditioning(ABC):
    """The conditioning of B prompts, one row per prompt."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, rows: Rows | Tensor) -> Self:
        """The given rows, in that order."""

    @classmethod
    @abstractmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all `parts`, in order."""

    @abstractmethod
    def expand(self, count: int) -> Self:
        """Its only row, repeated `count` times."""

    @abstractmethod
    def summary(self) -> Tensor:
        """One vector for each prompt, float32 (B, P), for networks that need to know roughly what the prompt says."""


class TensorConditioning(Conditioning):
    """A Conditioning made of named tensors, (B, ...) each; the denoiser knows the names."""

    def __init__(self, **parts: Tensor):
        self.parts = parts

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: Rows | Tensor) -> TensorConditioning:
        return self._each(lambda part: part[rows])

    @classmethod
    def cat(cls, parts: Sequence[TensorConditioning]) -> TensorConditioning:
        return cls(**{name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts})

    def expand(self, count: int) -> TensorConditioning:
        return self._each(lambda part: part.expand(count, *part.shape[1:]))

    def summary(self) -> Tensor:
        """All parts side by side, averaged over tokens."""
        flat = [part.float().flatten(1, -2).mean(1) if part.ndim > 2 else part.float() for part in self.parts.values()]
        return torch.cat([part.reshape(len(self), -1) for part in flat], dim=1)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TensorConditioning:
        return type(self)(**{name: change(part) for name, part in self.parts.items()})


class ListConditioning(Conditioning):
    """A Conditioning made of one tensor of states, (L, E), for each prompt; the lengths L may differ."""

    def __init__(self, states: Sequence[Tensor]):
        self.states = list(states)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Rows | Tensor) -> ListConditioning:
        return type(self)([self.states[row] for row in torch.arange(len(self))[rows].tolist()])

    @classmethod
    def cat(cls, parts: Sequence[ListConditioning]) -> ListConditioning:
        return cls([states for part in parts for states in part.states])

    def expand(self, count: int) -> ListConditioning:
        (states,) = self.states
        return type(self)([states] * count)

    def summary(self) -> Tensor:
        """The states averaged over tokens."""
        return torch.stack([states.float().mean(0) for states in self.states])
