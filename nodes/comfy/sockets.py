"""The types of our own sockets: what our nodes pass to one another."""

from comfy_api.latest import io

CATEGORY = "TDPO"

Reward = io.Custom("TDPO_REWARD")  # a RewardChoice
Critic = io.Custom("TDPO_CRITIC")  # settings of critic and neurons, nested as in TrainConfig
Run = io.Custom("TDPO_RUN")  # a RunFolder
