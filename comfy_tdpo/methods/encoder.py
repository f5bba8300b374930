"""Which reward's image encoder the critic uses.

The paper's critic shares the encoder of the training reward. Some rewards have none: JPEG, a program, a user's
function. Then the critic takes that of a guard, which is loaded anyway, or else a small one. Held-out rewards lend
none, so that they stay independent.
"""

from typing import Any

from ..models import OF_GRAPH
from ..rewards import has_encoder
from ..shapes import MODELS

OF_SHAPES, OF_PHOTOS = "shapes-aesthetic", "clipscore"  # ships with the package; the smallest of the others


def encoder_of(config: Any) -> str:
    """The name of the reward whose encoder the critic of a run of `config` uses.

    In a sum of training rewards, it is the first that has one.
    """
    if config.critic.encoder:
        return config.critic.encoder
    candidates = [*config.trained_on, *config.guards]
    return next(filter(has_encoder, candidates), OF_SHAPES if _is_of_shapes(config) else OF_PHOTOS)


def is_model_of_shapes(model: str) -> bool:
    """Whether a model of this name is one of the embedded world's; in a graph, its MODEL has a name of its own."""
    return model in MODELS or model.startswith(f"{OF_GRAPH}Shapes")


def _is_of_shapes(config: Any) -> bool:
    """Whether a run trains on the embedded world."""
    names = [*config.trained_on, *config.guards]  # not those that are measured, which may change within a run
    return is_model_of_shapes(config.model) or any(name.startswith("shapes-") for name in names)
