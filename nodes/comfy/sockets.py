"""The types of our own sockets: what our nodes pass to one another."""

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

CATEGORY = "TDPO"

Reward = io.Custom("TDPO_REWARD")  # a RewardChoice
Critic = io.Custom("TDPO_CRITIC")  # settings of critic and neurons, nested as in TrainConfig
Run = io.Custom("TDPO_RUN")  # a RunFolder


def waiting() -> ExecutionBlocker:
    """An output whose nodes are to wait: they do not run, and nothing turns red."""
    return ExecutionBlocker(None)


def advanced(socket: Any) -> Any:
    """The same input, which newer frontends show only on request; 0.3.64 has no argument for that yet."""
    socket.extra_dict["advanced"] = True
    return socket
