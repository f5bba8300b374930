"""Rewards in a graph: chosen, weighed, summed, and asked."""

from comfy_api.latest import io
from torch import Tensor

from comfy_tdpo.rewards import reward_names

from . import reward_files
from .scoring import RewardChoice, captioned, described, prompt_of_each, score
from .wires import CATEGORY, Reward
from .words import AUTO, check_choice

ROOM = 5 * 2**30  # bytes: the largest reward in float32, and what it computes with


class RewardModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPORewardModel",
            display_name="TDPO Reward Model",
            category=CATEGORY,
            description="A model that scores images. Chain several by 'also' to train on their weighted sum.",
            inputs=[
                io.Combo.Input("reward", reward_names(), default="shapes-aesthetic", tooltip="What scores the images."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.1,
                    round=0.0001,
                    tooltip="What its score is multiplied by in the sum. That of a held-out reward does not count.",
                ),
                io.Combo.Input(
                    "weights",
                    [AUTO, *reward_files.names()],
                    default=AUTO,
                    optional=True,
                    tooltip="The reward's file in models/tdpo_rewards. auto: looked for there by its published name, "
                    "then downloaded. Rewards of Shapes and of JPEG have none.",
                ),
                Reward.Input("also", optional=True, tooltip="Another Reward Model, whose weighted score is added."),
            ],
            outputs=[
                Reward.Output(
                    "rewards", display_name="reward", tooltip="Goes into Train, into Score Images, or another's 'also'."
                )
            ],
        )

    @classmethod
    def execute(
        cls, reward: str, weight: float, weights: str = AUTO, also: RewardChoice | None = None
    ) -> io.NodeOutput:
        check_choice("reward", reward, reward_names())
        reward_files.look_there()
        file = None if weights == AUTO else reward_files.path_of(weights)
        return io.NodeOutput((also or RewardChoice({})).with_reward(reward, weight, file))


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPOScoreImages",
            display_name="TDPO Score Images",
            category=CATEGORY,
            description="Asks a reward what it thinks of images: as numbers, as text, and written under the images. "
            "One before and one after alignment show what has changed.",
            inputs=[
                io.Image.Input("images", tooltip="The images to score."),
                Reward.Input("reward", tooltip="What scores them; several in a chain are summed by weight."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the images were made from: one line for all of them, or one line an image.",
                ),
            ],
            outputs=[
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="One number an image."),
                io.String.Output("text", display_name="text", tooltip="The mean, the spread, and each image's score."),
                io.Image.Output("captioned", display_name="images", tooltip="The images, with the score under each."),
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, reward: RewardChoice, prompt: str) -> io.NodeOutput:
        from comfy import model_management

        prompts, device = prompt_of_each(prompt, len(images)), model_management.get_torch_device()
        model_management.free_memory(ROOM, device)
        scores = score(images, prompts, reward, device)
        return io.NodeOutput(scores, described(scores, reward), captioned(images, scores))
