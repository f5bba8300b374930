"""The types of our own sockets, which our nodes pass to one another, and the sockets that several nodes share."""

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
    return telling(socket, advanced=True)


def telling(socket: Any, **more: Any) -> Any:
    """The same input, with more for the browser, which gets it with the node's definition."""
    socket.extra_dict |= more
    return socket


def in_a_sum() -> list[Any]:
    """The inputs of a node that adds its reward to others: how much it counts, and what it is added to."""
    return [
        io.Float.Input(
            "weight",
            default=1.0,
            min=-1000.0,
            max=1000.0,
            step=0.1,
            round=0.0001,
            tooltip="How much this reward counts in a sum: it is multiplied by this. A negative weight avoids what the "
            "reward likes. Weights of held-out rewards are ignored.",
        ),
        Reward.Input(
            "also",
            optional=True,
            tooltip="Another TDPO Reward Model or TDPO Taste; its weighted reward is added.",
        ),
    ]


def sum_of_rewards() -> Any:
    """The output of such a node."""
    return Reward.Output(
        "rewards",
        display_name="reward",
        tooltip="For TDPO-R Train, TDPO Score Images, or the 'also' of another TDPO Reward Model or TDPO Taste.",
    )
