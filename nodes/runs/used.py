"""Which algorithms use what a Train node can be given, so that the node can say what has no effect.

The configuration decides: an algorithm does not use a setting that it does not have, nor a critic that it turns off.
"""

from functools import cache
from typing import Any

from comfy_tdpo.methods import ALGORITHMS

from ...trainer.config import TrainConfig, make_config
from ...trainer.config.schema import algorithms_using, algorithms_with, leaf_fields


def used_of_critic(config: TrainConfig) -> list[str]:
    """The sections of a TDPO Temporal Critic that count for the algorithm's own `config`."""
    if "critic" not in type(config).model_fields or not config.critic.enabled:
        return []
    return ["critic"] if config.neurons.reset == "none" else ["critic", "neurons"]  # TDPO is TDPO-R without resets


@cache
def used_by() -> dict[str, Any]:
    """The algorithms that use a critic on the wire; and its resets. By the dotted name of a setting that not all have,
    those that have it; and of a critic's, those in which it has an effect."""
    configs = {name: make_config(overrides={"algorithm": name}) for name in ALGORITHMS}
    settings = {name: algorithms_with(name) for name, _ in leaf_fields()}
    of_critic = [name for name in settings if name.startswith("critic.") and name != "critic.enabled"]
    return {
        "critic": algorithms_using("critic"),
        "resets": [name for name, config in configs.items() if "neurons" in used_of_critic(config)],
        "settings": {name: users for name, users in settings.items() if len(users) < len(ALGORITHMS)},
        "effects": {name: algorithms_using(name) for name in of_critic},
    }
