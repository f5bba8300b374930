"""Reward models and their registry.

A reward model scores images, and may lend its image encoder to the critic. One is loaded only when it is asked for, and
torch with it, so that names can be checked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .shared import shared_while_used

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@runtime_checkable
class RewardModel(Protocol):
    """What every reward offers. Images are float (B, 3, H, W) in [0, 1]; preprocessing is the reward's own business.

    name: of the registry; embed_dim: the width D of `embed`, or None where there is no encoder to serve a critic.
    """

    name: str
    embed_dim: int | None

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings, float (B, D)."""
        ...

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores in upstream's units, float32 (B,), on the images' device."""
        ...

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise ValueError where it cannot score images of one of `prompts`; asked before a training begins."""
        ...


class RewardError(RuntimeError):
    """A reward model failed in the middle of a training; the message names it."""


# name -> "module:callable", where the callable takes (name, device) and returns a RewardModel.
REWARDS = {
    "shapes-aesthetic": "comfy_tdpo.rewards.shapes:ShapesAesthetic",
    "shapes-alignment": "comfy_tdpo.rewards.shapes:ShapesAlignment",
    "shapes-judge": "comfy_tdpo.rewards.shapes:ShapesJudge",
    "shapes-gold": "comfy_tdpo.rewards.shapes:ShapesGold",
}

# Known by name, so that a preset can name them; they are not written yet.
PLANNED = ("aesthetic", "pickscore", "hpsv2", "hpsv2.1", "imagereward", "clipscore")


def check_reward(name: str) -> None:
    """Raise ValueError where nothing is known of a reward `name`."""
    if name not in (*REWARDS, *PLANNED):
        raise ValueError(f"got reward {name!r}; expected one of {', '.join((*REWARDS, *PLANNED))}")


@shared_while_used
def load_reward(name: str, device: torch.device) -> RewardModel:
    """The reward `name` on `device`; asking again gives the same instance, for as long as anybody holds it."""
    check_reward(name)
    if name in PLANNED:
        raise ValueError(f"reward {name!r} is not available in this version; available are {', '.join(REWARDS)}")
    module, _, attribute = REWARDS[name].partition(":")
    factory: Callable[[str, torch.device], RewardModel] = getattr(import_module(module), attribute)
    return factory(name, device)


def name_of_sum(weights: dict[str, float]) -> str:
    """What the sum of the rewards in `weights` is called."""
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


class WeightedSum:
    """sum_i w_i R_i: several rewards as one. The first that has an encoder lends it to the critic."""

    def __init__(self, weights: dict[str, float], device: torch.device):
        self.parts = [(load_reward(name, device), weight) for name, weight in weights.items()]
        self.name = name_of_sum(weights)
        self._encoder = next((model for model, _ in self.parts if model.embed_dim), None)
        self.embed_dim = self._encoder.embed_dim if self._encoder else None

    def embed(self, images: Tensor) -> Tensor:
        assert self._encoder is not None, "embed_dim is None: there is no encoder"
        return self._encoder.embed(images)

    def check_prompts(self, prompts: list[str]) -> None:
        for model, _ in self.parts:
            model.check_prompts(prompts)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return sum(weight * model.score(images, prompts) for model, weight in self.parts)


def load_rewards(weights: dict[str, float], device: torch.device) -> RewardModel:
    """The weighted sum of the rewards in `weights`; a single one of weight 1 is itself."""
    if list(weights.values()) == [1.0]:
        return load_reward(next(iter(weights)), device)
    return WeightedSum(weights, device)
