"""The types of our own sockets: what our nodes pass to one another."""

from typing import Any

from comfy_api.latest import io

CATEGORY = "TDPO"

Reward = io.Custom("TDPO_REWARD")  # a RewardChoice
Critic = io.Custom("TDPO_CRITIC")  # settings of critic and neurons, nested as in TrainConfig
Run = io.Custom("TDPO_RUN")  # a RunFolder


def advanced(socket: Any) -> Any:
    """The same input, which newer frontends show only on request; 0.3.64 has no argument for that yet."""
    socket.extra_dict["advanced"] = True
    return socket
