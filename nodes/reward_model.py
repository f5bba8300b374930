"""A reward, chosen, weighed and summed."""

from comfy_api.latest import io

from comfy_tdpo.rewards import reward_names

from .comfy.folders import look_in_rewards_folder, remote_names, reward_file, reward_file_names
from .comfy.sockets import CATEGORY, in_a_sum, sum_of_rewards
from .runs.combos import AUTO, check_choice
from .runs.reward_choice import RewardChoice
from .runs.wording import words_of_nodes


class RewardModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        weight, also = in_a_sum()
        return io.Schema(
            node_id="TDPORewardModel",
            display_name="TDPO Reward Model",
            category=CATEGORY,
            description="Chooses a reward, which gives each image a number: the higher, the better. Chain several "
            "through 'also' to train on their weighted sum.",
            inputs=[
                io.Combo.Input(
                    "reward",
                    [*reward_names(), *remote_names()],
                    default="shapes-aesthetic",
                    tooltip="The reward that scores the images. Reward services are those that the owner of this "
                    "server has listed in models/tdpo_rewards/services.txt.",
                ),
                weight,
                io.Combo.Input(
                    "weights",
                    [AUTO, *reward_file_names()],
                    default=AUTO,
                    optional=True,
                    tooltip="The reward's file in models/tdpo_rewards. auto: looks for its published name there and in "
                    "the Hugging Face cache, then downloads it. Colourfulness, JPEG and Shapes have no file.",
                ),
                also,
            ],
            outputs=[sum_of_rewards()],
        )

    @classmethod
    @words_of_nodes()
    def execute(
        cls, reward: str, weight: float, weights: str = AUTO, also: RewardChoice | None = None
    ) -> io.NodeOutput:
        check_choice("reward", reward, [*reward_names(), *remote_names()])
        look_in_rewards_folder()
        file = None if weights == AUTO else reward_file(weights)
        return io.NodeOutput((also or RewardChoice({})).with_reward(reward, weight, file))
