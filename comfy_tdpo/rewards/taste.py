"""A taste as a reward: the log-odds that the artist likes a picture, predicted from the embedding of another reward's
image encoder. comfy_tdpo/tastes holds the votes and the head that is fitted to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..tastes.ballot import ballot_of, embedded
from ..tastes.fitted import Fitted, digest_of, read_fitted
from ..tastes.folder import TasteFolder
from ..tastes.head import fit, predicted
from ..tastes.names import FITTED
from ..tastes.votes import Vote
from . import REWARDS, RewardModel, WeightedSum, embed_images, has_encoder, load_reward


class Taste:
    """A fitted head on the unit embeddings of `encoder`."""

    def __init__(self, name: str, encoder: RewardModel, fitted: Fitted):
        self.name, self.encoder, self.fitted = name, encoder, fitted
        self.embed_dim, self.differentiable = encoder.embed_dim, encoder.differentiable

    def embed(self, images: Tensor) -> Tensor:
        return self.encoder.embed(images)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.fitted.head.log_odds(self.embed(images))

    def doubt(self, images: Tensor) -> Tensor:
        """The standard deviation of each image's log-odds, float64 (B,) on the CPU."""
        return self.fitted.head.doubt(self.embed(images))

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt is fine: only images are scored."""


def load_taste(
    name: str, path: Path | None, device: torch.device, precision: str, weights: Mapping[str, str] | None
) -> Taste:
    """The taste at `path`: a folder, whose votes are fitted now, or a fitted file.

    The other arguments are those of load_reward.
    """
    if path is None:
        raise ValueError(
            f"got reward {name!r} without its folder; expected where its votes are: reward_weights {name}=FOLDER"
        )
    fitted = read_fitted(path) if path.suffix == FITTED and not path.is_dir() else None
    encoder_name = fitted.encoder if fitted else TasteFolder(path).encoder
    encoder = load_encoder(encoder_name, path, device, precision, weights)
    fitted = fitted or fit_folder(TasteFolder(path), encoder, device, precision)
    if len(fitted.head.center) != encoder.embed_dim:
        raise ValueError(
            f"got '{path}' as a taste of {len(fitted.head.center)} numbers, but the encoder of {encoder_name} gives "
            f"{encoder.embed_dim}; expected as many: fit the taste again from its votes"
        )
    return Taste(name, encoder, fitted)


def load_encoder(
    name: str, path: Path, device: torch.device, precision: str, weights: Mapping[str, str] | None
) -> RewardModel:
    """The reward `name`, whose encoder the taste at `path` reads through."""
    try:
        check_encoder(name)
    except ValueError as error:
        raise ValueError(f"the taste '{path}' cannot be used: {error}") from error
    return load_reward(name, device, precision, weights)


def check_encoder(name: str) -> None:
    """Raise ValueError if there is no reward `name` with an image encoder.

    Only rewards of the registry count: the name may come from somebody else's file, and must not run code.
    """
    if name not in REWARDS or not has_encoder(name):
        raise ValueError(
            f"got encoder {name[:80]!r}; expected a reward with an image encoder, such as aesthetic or shapes-aesthetic"
        )


def fit_folder(taste: TasteFolder, encoder: RewardModel, device: torch.device, precision: str) -> Fitted:
    """The head fitted to the votes of `taste` that count."""
    votes = taste.counted()
    ballot = ballot_of(votes, _embedded(taste, votes, encoder, device, precision), taste.path)
    return Fitted(fit(ballot), encoder.name, len(votes), digest_of(votes))


def _embedded(
    taste: TasteFolder, votes: list[Vote], encoder: RewardModel, device: torch.device, precision: str
) -> dict[str, Tensor]:
    def embed(pictures: Tensor) -> Tensor:
        return embed_images(encoder, pictures.to(device))

    return embedded(taste, votes, embed, f"{encoder.name}-{precision}")


@dataclass(frozen=True)
class Report:
    """How good a taste is by its own votes: how many of them it predicts from the others, and the share of pairs of its
    pictures that it expects to order rightly."""

    votes: int
    predicted: int
    sureness: float


def report(taste: TasteFolder, encoder: RewardModel, device: torch.device) -> Report:
    """Raises ValueError if the votes contrast nothing."""
    votes = taste.counted()
    embeds = _embedded(taste, votes, encoder, device, "fp32")
    ballot = ballot_of(votes, embeds, taste.path)
    head = fit(ballot)
    return Report(len(votes), predicted(head, ballot), head.sureness(torch.stack(list(embeds.values()))))


def tastes_among(rewards: list[RewardModel]) -> dict[str, Taste]:
    """The tastes in `rewards` and in their sums, by name."""
    parts = [part for reward in rewards for part in (_parts(reward))]
    return {part.name: part for part in parts if isinstance(part, Taste)}


def _parts(reward: RewardModel) -> list[RewardModel]:
    return [model for model, _, _ in reward.parts] if isinstance(reward, WeightedSum) else [reward]
