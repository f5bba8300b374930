"""Which algorithms use what a Train node can be given, so that the node can say what has no effect.

The configuration decides: an algorithm does not use a setting that it does not have, nor a critic that it turns off.
"""

from functools import cache
from typing import Any

from comfy_tdpo.methods import ALGORITHMS

from ...trainer.config import TrainConfig, make_config
from ...trainer.config.schema import algorithms_with, leaf_fields


def used_of_critic(config: TrainConfig) -> list[str]:
    """The sections of a TDPO Temporal Critic that count for the algorithm's own `config`."""
    if "critic" not in type(config).model_fields or not config.critic.enabled:
        return []
    return ["critic"] if config.neurons.reset == "none" else ["critic", "neurons"]  # TDPO is TDPO-R without resets


@cache
def used_by() -> dict[str, Any]:
    """The algorithms that use a critic on the wire; its resets; and each of the settings that not all have, by its
    dotted name."""
    of_critic = {name: used_of_critic(make_config(overrides={"algorithm": name})) for name in ALGORITHMS}
    settings = {name: algorithms_with(name) for name, _ in leaf_fields()}
    return {
        "critic": [name for name, sections in of_critic.items() if "critic" in sections],
        "resets": [name for name, sections in of_critic.items() if "neurons" in sections],
        "settings": {name: users for name, users in settings.items() if len(users) < len(ALGORITHMS)},
    }
