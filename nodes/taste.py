"""A reward made of the user's own choices."""

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from comfy_tdpo.rewards import has_encoder, reward_names

from .comfy.sockets import CATEGORY, in_a_sum, sum_of_rewards, waiting
from .runs.combos import AUTO, check_choice
from .runs.reward_choice import RewardChoice
from .runs.wording import words_of_nodes

ENCODERS = [AUTO, *filter(has_encoder, reward_names())]


class Taste(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        weight, also = in_a_sum()
        return io.Schema(
            node_id="TDPOTaste",
            display_name="TDPO Taste",
            category=CATEGORY,
            description="A reward that learns what you like. Connect pictures and click on those you like and dislike. "
            "Each click is a vote, and votes are kept. About a hundred votes make a usable reward.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "name",
                    default="my taste",
                    tooltip="The name of the taste, and of its folder in output/tdpo_tastes.",
                ),
                weight,
                io.Image.Input(
                    "pictures",
                    optional=True,
                    tooltip="Pictures to vote on: the node shows them, and you click. What comes after this node waits "
                    "until there are enough votes.",
                ),
                io.Image.Input(
                    "liked",
                    optional=True,
                    tooltip="Pictures you like, all of them, without a click. A picture counts once.",
                ),
                io.Image.Input(
                    "disliked",
                    optional=True,
                    tooltip="Pictures you do not like, all of them, without a click. If you have voted on a picture "
                    "before, the last vote counts.",
                ),
                io.Combo.Input(
                    "encoder",
                    ENCODERS,
                    default=AUTO,
                    optional=True,
                    tooltip="The reward whose image encoder, a network that describes a picture in numbers, reads the "
                    "pictures; fixed when the taste is made. auto: that of "
                    "Shapes if the first picture has 64 x 64 pixels, else CLIP ViT-L/14, that of 'aesthetic'.",
                ),
                io.Int.Input(
                    "votes_needed",
                    default=0,
                    min=0,
                    max=10_000,
                    optional=True,
                    tooltip="How many votes the taste needs before it is used. It always needs a liked picture and a "
                    "disliked one.",
                ),
                also,
            ],
            outputs=[sum_of_rewards()],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        from .runs.names import check_taste_name

        try:
            return name is None or bool(check_taste_name(name))  # None: it comes along a wire, and later
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, name: str | None, **_: Any) -> str | float:
        from .comfy.folders import all_tastes
        from .runs.names import problem_with

        if name is None or problem_with(name):
            return float("nan")  # equals nothing, so that the node runs whenever it is queued
        return all_tastes().state(name)

    @classmethod
    @words_of_nodes()
    def execute(
        cls,
        name: str,
        weight: float,
        pictures: Tensor | None = None,
        liked: Tensor | None = None,
        disliked: Tensor | None = None,
        encoder: str = AUTO,
        votes_needed: int = 0,
        also: RewardChoice | None = None,
    ) -> io.NodeOutput:
        from .comfy.folders import all_tastes, shown_pictures
        from .comfy.scoring import pictures_of
        from .runs.tastes import with_taste

        check_choice("encoder", encoder, ENCODERS)
        tastes, shown = all_tastes(), pictures_of(pictures)
        taste = tastes.vote(name, pictures_of(liked), pictures_of(disliked), encoder, shown)
        folder = shown_pictures()
        ballot = tastes.show(name, [folder.keep(picture) for picture in shown], votes_needed, folder)
        is_enough = tastes.is_enough(name, votes_needed, is_shown=bool(shown))
        reward = with_taste(also or RewardChoice({}), name, taste, weight) if is_enough else waiting()
        return io.NodeOutput(reward, ui={"tdpo_ballot": [ballot]})
