"""A run, judged by rewards and on prompts of one's choice."""

from comfy_api.latest import io

from comfy_tdpo.prompts import prompt_sets

from .comfy.sockets import CATEGORY, Reward, Run
from .runs.combos import AUTO
from .runs.wording import words_of_nodes


class Evaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPOEvaluate",
            display_name="TDPO Evaluate",
            category=CATEGORY,
            description="Draws the base model and every snapshot of a run on the same prompts from the same noise, and "
            "scores them with rewards of your choice. What was scored is kept in the run's folder, not scored again.",
            is_output_node=True,
            inputs=[
                Run.Input("run", tooltip="A run of TDPO-R Train."),
                io.Model.Input("model", tooltip="The MODEL that TDPO-R Train takes, without the run's LoRA."),
                io.Clip.Input("clip", tooltip="Encodes the prompts."),
                io.Vae.Input("vae", tooltip="Decodes the images that are scored."),
                io.Combo.Input(
                    "prompt_set",
                    [AUTO, *prompt_sets()],
                    default=AUTO,
                    tooltip="Prompts to draw, if there are none in 'prompts'. auto: the unseen and the complex "
                    "counterpart of the prompts that the run was trained on.",
                ),
                io.Int.Input(
                    "images",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Images per prompt. More take longer and make the intervals narrower.",
                ),
                io.String.Input(
                    "epochs",
                    default="",
                    tooltip="Epochs whose snapshots are evaluated, such as 5, 10, or 'last'. Empty: all snapshots.",
                ),
                Reward.Input(
                    "rewards",
                    optional=True,
                    tooltip="Rewards to judge by, besides the training reward; their weights are ignored. Without any, "
                    "those that the run has measured.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts to draw, one per line. If there are any, the prompt set is ignored.",
                ),
            ],
            outputs=[
                io.String.Output("table", display_name="table", tooltip="The mean rewards of every snapshot."),
                io.Image.Output(
                    "plot",
                    display_name="plot",
                    tooltip="Each other reward against the training reward, by epoch.",
                ),
                io.Image.Output("curves", display_name="curves", tooltip="All rewards against the reward queries."),
                io.Image.Output(
                    "pictures",
                    display_name="pictures",
                    tooltip="Images by the base model and by the snapshot with the highest training reward.",
                ),
            ],
        )

    @classmethod
    @words_of_nodes()
    def execute(
        cls, run, model, clip, vae, prompt_set: str, images: int, epochs: str, rewards=None, prompts: str = ""
    ) -> io.NodeOutput:
        from ..trainer.evaluation.table import told
        from .comfy.evaluation import evaluate_run
        from .comfy.models_in import Wires
        from .runs.evaluation import options, pictures

        found = evaluate_run(Wires(model, clip, vae), run, options(rewards, prompt_set, prompts, images, epochs))
        plot, curves, grid = pictures(run, found)
        return io.NodeOutput(told(found), plot, curves, grid, ui={"tdpo_evaluation": [run.path.name]})
