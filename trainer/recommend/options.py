"""What a recommendation is asked for: the strengths, the held-out reward, the prompts and the number of images."""

import math
from dataclasses import dataclass

from comfy_tdpo.counts import number_of
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.rewards import ONLY_EVALUATE, check_reward
from comfy_tdpo.shapes import MODELS

from ..config import TrainConfig
from ..config.schema import IMAGES, MOST_IMAGES

STRENGTHS = (0.5, 0.75, 1.0)
TOLERANCE = 0.2
SHAPES = "shapes-"  # how the rewards of the embedded world begin
HELD_OUT_OF_SHAPES = ("shapes-match", "shapes-alignment")  # the first one without another role
LARGEST = 10.0  # strength, as in LoRA Apply


@dataclass(frozen=True)
class Options:
    """How to choose.

    strengths: to draw every snapshot at; prompts: a prompt set or file, or None for those of `unseen_prompts`.
    held_out: a reward that is not trained on, or None for that of `held_out_reward`.
    images: per snapshot and strength, spread over the prompts.
    tolerance: how far the held-out reward may surely be below the base model's, in standard deviations of its images.

    Raises:
        ValueError: a value is out of range.
    """

    strengths: tuple[float, ...] = STRENGTHS
    prompts: str | None = None
    held_out: str | None = None
    images: int = IMAGES
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        sound = self.strengths and all(0 < strength <= LARGEST for strength in self.strengths)
        if not sound or len(set(self.strengths)) < len(self.strengths):
            raise ValueError(
                f"got strengths {','.join(f'{strength:g}' for strength in self.strengths) or 'none'}; expected "
                f"different numbers above 0 and up to {LARGEST:g}, such as 0.5,0.75,1"
            )
        if not 2 <= self.images <= MOST_IMAGES:
            raise ValueError(
                f"got {number_of(self.images, 'image')}; expected 2 to {MOST_IMAGES} per snapshot and strength"
            )
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"got tolerance {self.tolerance:g}; expected a number of standard deviations, 0 or more")


# --- the held-out reward ----------------------------------------------------------------------------------------------


def held_out_reward(config: TrainConfig, given: str | None = None) -> str:
    """The name of the reward that a run of `config` is judged by.

    It is the one `given`, else the one that is watched for overoptimisation, else the first other held-out reward,
    else, for Shapes, one of Shapes.

    Raises:
        ValueError: there is none, or the one `given` was trained on or may only evaluate.
    """
    if given is not None:
        check_held_out(config, given)
        return given
    watched = [name for name in (config.overoptimisation.reward, *config.eval_rewards) if name]
    if is_of_shapes(config):
        watched += HELD_OUT_OF_SHAPES
    for name in watched:
        if not _objection(config, name):
            return name
    raise ValueError(
        "got a run that watches no held-out reward which may choose its LoRA; expected one that is neither trained on "
        f"nor one of {', '.join(ONLY_EVALUATE)}: name it with --held-out NAME"
    )


def check_held_out(config: TrainConfig, name: str) -> None:
    """Raise ValueError unless the reward `name` may choose between the LoRAs of a run of `config`."""
    check_reward(name)
    if objection := _objection(config, name):
        raise ValueError(f"got the held-out reward {name!r}, {objection}; choose another with --held-out NAME")


def _objection(config: TrainConfig, name: str) -> str:
    if name in config.trained_on:
        return "which the run trains on"
    if name in config.guards:
        return "which guards the run's training"
    return "which may only evaluate what was chosen by others" if name in ONLY_EVALUATE else ""


def is_of_shapes(config: TrainConfig) -> bool:
    """Whether a run trains on the embedded world; in a graph, its MODEL has a name of its own."""
    return config.model in MODELS or any(name.startswith(SHAPES) for name in config.trained_on)


# --- the prompts ------------------------------------------------------------------------------------------------------


def unseen_prompts(
    config: TrainConfig, trained: list[str], shown: list[str], given: str | None = None
) -> tuple[list[str], str]:
    """The prompts to draw, and what they are as text.

    They are those `given`, else the shipped counterpart of the training prompts, else those of the sample grids that
    are not trained on, else the training prompts.

    Args:
        trained: the prompts of the run; shown: those of its sample grids.
    """
    source = given or counterpart(config, trained)
    if source is not None:
        prompts = list(dict.fromkeys(load_prompts(source)))
        known = len(set(prompts) & set(trained))
        return prompts, f"{source} ({number_of(len(prompts), 'prompt')}, {known or 'none'} of them trained on)"
    if unseen := [prompt for prompt in dict.fromkeys(shown) if prompt not in set(trained)]:
        return unseen, f"the prompts of the sample grids ({len(unseen)}, none of them trained on)"
    return list(dict.fromkeys(trained)), "the training prompts, since no others are known"


def counterpart(config: TrainConfig, trained: list[str]) -> str | None:
    """The shipped set that goes with the one trained on, if there is one."""
    if is_of_shapes(config):
        return "shapes-unseen"
    return "unseen-animals" if set(trained) == set(load_prompts("simple-animals")) else None
