"""Reward models and their registry.

A reward model scores images, and the critic may use its image encoder. Reward models and torch are imported only when
a reward is loaded, so that names can be checked quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..registry import look_up
from ..tastes.names import check_taste, is_taste
from .answers import RewardError, checked
from .function import check_function, is_function
from .options import Options
from .remote import check_remote, class_of, is_remote
from .shared import shared_while_used

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .weights import Source


@runtime_checkable
class RewardModel(Protocol):
    """The interface of all rewards. Images are float (B, 3, H, W) in [0, 1]; each reward does its own preprocessing.

    Neither `embed` nor `score` enables or disables gradients; the caller decides. Weights are frozen, so a graph is
    kept only if the images require gradients.

    Its networks are those among its attributes, and those of a reward among them. A training may have them in main
    memory meanwhile, so call it by `score_images` and `embed_images`, which bring them to their device, or in `needed`.

    name: its name in the registry; embed_dim: the width D of `embed`, or None if it has no encoder for a critic;
    differentiable: whether gradients flow through `score` to the images.
    A reward may also have `elsewhere`, which says that another program computes its scores. It is asked on a thread of
    its own while the next images are drawn, see `scored_elsewhere`.
    """

    name: str
    embed_dim: int | None
    differentiable: bool

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings, float (B, D)."""
        ...

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores in upstream's units, float32 (B,), on the images' device."""
        ...

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise ValueError if it cannot score images for one of `prompts`; called before training starts."""
        ...


class RewardClass(Protocol):
    """A callable that creates a reward; `sources` are the published files that it reads."""

    sources: tuple[Source, ...]

    def __call__(self, name: str, options: Options) -> RewardModel: ...


# name -> "module:class", where the class is a RewardClass.
REWARDS = {
    "aesthetic": "comfy_tdpo.rewards.aesthetic:Aesthetic",
    "pickscore": "comfy_tdpo.rewards.pickscore:PickScore",
    "hpsv2": "comfy_tdpo.rewards.hpsv2:HPSv2",
    "hpsv2.1": "comfy_tdpo.rewards.hpsv2:HPSv21",
    "imagereward": "comfy_tdpo.rewards.imagereward:ImageReward",
    "clipscore": "comfy_tdpo.rewards.clipscore:ClipScore",
    "colourfulness": "comfy_tdpo.rewards.colourfulness:Colourfulness",
    "jpeg-compressibility": "comfy_tdpo.rewards.jpeg:JpegSize",
    "jpeg-incompressibility": "comfy_tdpo.rewards.jpeg:JpegSize",
    "shapes-aesthetic": "comfy_tdpo.rewards.shapes:ShapesAesthetic",
    "shapes-alignment": "comfy_tdpo.rewards.shapes:ShapesAlignment",
    "shapes-judge": "comfy_tdpo.rewards.shapes:ShapesJudge",
    "shapes-match": "comfy_tdpo.rewards.shapes:ShapesMatch",
    "shapes-gold": "comfy_tdpo.rewards.shapes:ShapesGold",
}

# Those without an image encoder that a critic could use; users' functions and remote rewards have none either.
WITHOUT_ENCODER = {"colourfulness", "imagereward", "jpeg-compressibility", "jpeg-incompressibility", "shapes-gold"}

# What evaluates runs must have no part in restraining them, nor in choosing what they keep.
ONLY_EVALUATE = ("shapes-gold", "shapes-judge")

Score = Callable[["RewardModel", "Tensor", list[str]], "Tensor"]  # like `score_images`

# How to write the rewards that have no name of their own, besides tastes.
FORMS = "http://HOST:PORT, judge:http://HOST:PORT/v1#MODEL, or python:module:function"

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}  # torch's name for each


def reward_names() -> list[str]:
    """All rewards that can be chosen by name alone."""
    return list(REWARDS)


def check_reward(name: str) -> None:
    """Raise ValueError if there is no reward `name`."""
    if is_function(name):
        check_function(name)
    elif is_remote(name):
        check_remote(name)
    elif is_taste(name):
        check_taste(name)
    elif name not in REWARDS:
        raise ValueError(f"got reward {name!r}; expected one of {', '.join(REWARDS)}, taste:NAME, {FORMS}")


def has_encoder(name: str) -> bool:
    """Whether the reward `name` has an image encoder that a critic could use."""
    return not is_function(name) and not is_remote(name) and name not in WITHOUT_ENCODER


def reward_class(name: str) -> RewardClass:
    """The class of the reward `name`, which is no taste."""
    check_reward(name)
    if is_remote(name):
        return look_up(class_of(name))
    return look_up("comfy_tdpo.rewards.function:UserFunction" if is_function(name) else REWARDS[name])


def load_reward(
    name: str, device: torch.device, precision: str = "fp32", weights: Mapping[str, str] | None = None
) -> RewardModel:
    """The reward `name` on `device`. Later calls return the same instance as long as it is in use; of a taste, whose
    votes may have grown, the encoder alone.

    precision: "fp32" or "bf16", for its encoder.
    weights: name -> file or folder, for tastes, and for rewards whose weights should not be searched for or downloaded.
    Raises ValueError if the reward cannot be loaded.
    """
    import torch

    given = (weights or {}).get(name)
    path = Path(given).expanduser() if given else None
    device = torch.empty(0, device=device).device  # makes "cuda" and "cuda:0" the same key
    if is_taste(name):
        check_taste(name)
        from .taste import load_taste

        return load_taste(name, path, device, precision, weights)
    return _load(name, Options(device, getattr(torch, PRECISIONS[precision]), path))


@shared_while_used
def _load(name: str, options: Options) -> RewardModel:
    make = reward_class(name)
    if options.weights and not make.sources:
        raise ValueError(
            f"got {options.weights} as the weights of reward {name!r}, which has none; remove that setting"
        )
    return make(name, options)


class WeightedSum:
    """sum_i w_i R_i / s_i: several rewards as one. The critic uses the encoder of the first reward that has one.

    The scales s_i are constants set by the user, so a sum has no state to save with a run and is the same for every
    batch. During training the sum is normalised again, per prompt (advantages.py).

    Args:
        parts: (model, w_i, s_i) for each reward.
    """

    def __init__(self, parts: list[tuple[RewardModel, float, float]]):
        self.parts = parts
        self.name = " + ".join(_term(model.name, weight, scale) for model, weight, scale in parts)
        self.encoder = next((model for model, _, _ in parts if model.embed_dim), None)
        self.embed_dim = self.encoder.embed_dim if self.encoder else None
        self.differentiable = all(model.differentiable for model, _, _ in parts)

    def embed(self, images: Tensor) -> Tensor:
        assert self.encoder is not None, "embed_dim is None: there is no encoder"
        return self.encoder.embed(images)

    def check_prompts(self, prompts: list[str]) -> None:
        for model, _, _ in self.parts:
            model.check_prompts(prompts)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.total(self.score_parts(images, prompts))

    def score_parts(self, images: Tensor, prompts: list[str], score: Score | None = None) -> dict[str, Tensor]:
        """The scores R_i of each reward, by name, in its own units; by `score` instead of `score_images`, if given."""
        return {model.name: (score or score_images)(model, images, prompts) for model, _, _ in self.parts}

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        return sum(weight / scale * scores[model.name] for model, weight, scale in self.parts)


def encoder_name(model: RewardModel) -> str:
    """The name of the reward whose encoder `model` provides; for a sum, that of one of its parts."""
    return model.encoder.name if isinstance(model, WeightedSum) and model.encoder else model.name


def name_of_sum(terms: Mapping[str, float], scales: Mapping[str, float] | None = None) -> str:
    """The name that load_rewards gives the sum of `terms`."""
    return " + ".join(_term(name, weight, (scales or {}).get(name, 1.0)) for name, weight in terms.items() if weight)


def _term(name: str, weight: float, scale: float) -> str:
    return (f"{weight:g} " if weight != 1 else "") + name + (f" / {scale:g}" if scale != 1 else "")


def load_rewards(
    terms: Mapping[str, float],
    device: torch.device,
    precision: str = "fp32",
    weights: Mapping[str, str] | None = None,
    scales: Mapping[str, float] | None = None,
) -> RewardModel:
    """The weighted sum of the rewards in `terms`, name -> weight, each divided by its scale if it has one.

    A single reward of weight 1 is returned as it is, and rewards of weight 0 are not loaded. The other arguments are
    those of load_reward.
    """
    parts = [
        (load_reward(name, device, precision, weights), weight, (scales or {}).get(name, 1.0))
        for name, weight in terms.items()
        if weight
    ]
    if not parts:
        raise ValueError(
            f"the weights of {', '.join(terms) or 'no reward'} are all 0; give at least one reward another weight"
        )
    (model, weight, scale), *others = parts
    return model if not others and weight == scale == 1 else WeightedSum(parts)


def terms_of(model: RewardModel) -> list[RewardModel]:
    """The rewards that `model` sums; itself if it is no sum."""
    return [term for term, _, _ in model.parts] if isinstance(model, WeightedSum) else [model]


def scored_elsewhere(model: RewardModel) -> bool:
    """Whether another program computes the scores of `model`, which is no sum."""
    return bool(getattr(model, "elsewhere", False))


def score_with_parts(
    model: RewardModel, images: Tensor, prompts: list[str], score: Score | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `score_images` returns, and the scores of each reward that `model` sums; none unless it sums several.

    score: gives the scores of each reward that is no sum, instead of `score_images`.
    """
    score = score or score_images
    if not isinstance(model, WeightedSum):
        return score(model, images, prompts), {}
    scores = model.score_parts(images, prompts, score)
    return checked(model.name, model.total(scores), images), scores if len(scores) > 1 else {}


def score_images(model: RewardModel, images: Tensor, prompts: list[str]) -> Tensor:
    """`model`'s scores, float32 (B,), on the images' device. Raises RewardError, which names it, if it fails."""
    import torch

    from ..memory.running_out import out_of_memory
    from .networks import needed

    if not torch.isfinite(images).all():
        raise RewardError(
            f"got images that are not finite for reward {model.name!r}; the model that generated them overflows: set "
            "precision to fp32, or use another VAE"
        )
    try:
        with needed([model]):
            return checked(model.name, model.score(images, prompts), images)
    except RewardError:
        raise  # it already names the part of a sum that failed
    except (Exception, SystemExit) as error:  # it may be user code, and the user must learn whose code failed
        if out_of_memory(error):
            raise  # the caller handles that
        unlike = is_function(model.name) and isinstance(error, (TypeError, AttributeError))  # it may expect PIL images
        given = f"; its images were a float tensor {tuple(images.shape)} in [0, 1]" if unlike else ""
        raise RewardError(f"reward {model.name!r} failed: {type(error).__name__}: {error}{given}") from error


def embed_images(model: RewardModel, images: Tensor) -> Tensor:
    """`model`'s unit embeddings, float (B, D), of images (B, 3, H, W)."""
    from .networks import needed

    with needed([model]):
        return model.embed(images)
