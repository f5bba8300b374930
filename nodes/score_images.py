"""Rewards, asked about images."""

from comfy_api.latest import io
from torch import Tensor

from .comfy.scoring import captioned, described, device_with_room, prompt_of_each, score
from .comfy.sockets import CATEGORY, Reward
from .runs.reward_choice import RewardChoice
from .runs.wording import words_of_nodes


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPOScoreImages",
            display_name="TDPO Score Images",
            category=CATEGORY,
            description="Scores images with a reward and returns the scores as numbers, as text, and written under the "
            "images: the higher, the better. Score images from before and after training to see what has changed.",
            inputs=[
                io.Image.Input("images", tooltip="The images to score."),
                Reward.Input("reward", tooltip="The reward that scores them, or the weighted sum of a chain."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="The prompt the images were made from: one line for all of them, or one line per image. "
                    "Weights such as (red:1.3) are left out.",
                ),
            ],
            outputs=[
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="One number per image."),
                io.String.Output("text", display_name="text", tooltip="The mean, the spread, and each image's score."),
                io.Image.Output("captioned", display_name="images", tooltip="The images, each with its score below."),
            ],
        )

    @classmethod
    @words_of_nodes()
    def execute(cls, images: Tensor, reward: RewardChoice, prompt: str) -> io.NodeOutput:
        prompts = prompt_of_each(prompt, len(images))
        scores = score(images, prompts, reward, device_with_room())
        return io.NodeOutput(scores, described(scores, reward), captioned(images, scores))
