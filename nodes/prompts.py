"""Prompts, one after the other."""

from comfy_api.latest import io

from comfy_tdpo.prompts import prompt_sets

from .comfy.sockets import CATEGORY
from .runs.combos import check_choice
from .runs.wording import words_of_nodes


class Prompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPOPrompts",
            display_name="TDPO Prompts",
            category=CATEGORY,
            description="A list of prompts: what is connected to it runs once for each. Draws pictures of many prompts "
            "with one KSampler, to vote on or to score.",
            inputs=[
                io.Combo.Input(
                    "prompt_set",
                    prompt_sets(),
                    default="shapes",
                    tooltip="Prompts that ship with the pack; used if there are none in 'prompts'.",
                ),
                io.String.Input(
                    "prompts", default="", multiline=True, tooltip="Your own prompts, one per line, instead of a set."
                ),
                io.Int.Input(
                    "count",
                    default=16,
                    min=1,
                    max=1000,
                    tooltip="How many of the prompts, spread evenly over the list; at most all.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompt",
                    display_name="prompt",
                    is_output_list=True,
                    tooltip="Each prompt by itself, for the text of CLIP Text Encode.",
                )
            ],
        )

    @classmethod
    @words_of_nodes()
    def execute(cls, prompt_set: str, prompts: str, count: int) -> io.NodeOutput:
        from comfy_tdpo.prompts import load_prompts

        from .runs.prompts import read_lines, spread

        check_choice("prompt_set", prompt_set, prompt_sets())
        lines = [line for _, line in read_lines(prompts, "prompts")] or load_prompts(prompt_set)
        return io.NodeOutput(spread(lines, count))
