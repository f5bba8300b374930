"""A look at the critic's neurons."""

from comfy_api.latest import io

from .comfy.sockets import CATEGORY, Run
from .runs.used import used_by
from .runs.wording import words_of_nodes


class NeuronInspector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPONeuronInspector",
            display_name="TDPO Neuron Reset Inspector",
            category=CATEGORY,
            description="Shows the neurons of the critic, a small network that predicts rewards, over the epochs: "
            "how active each one is, when it was reset, how "
            "many are dormant and how many of those stay dormant.",
            inputs=[
                Run.Input(
                    "run",
                    tooltip=f"A run of TDPO-R Train whose algorithm has a critic: {', '.join(used_by()['critic'])}.",
                ),
            ],
            outputs=[
                io.Image.Output("picture", display_name="picture", tooltip="Each neuron's activation, layer by layer."),
                io.String.Output(
                    "text", display_name="text", tooltip="Dormant neurons, their overlap and resets, epoch by epoch."
                ),
            ],
        )

    @classmethod
    @words_of_nodes()
    def execute(cls, run) -> io.NodeOutput:
        from ..trainer.plots.neurons import described, neuron_figure
        from .runs.outputs import as_tensor

        return io.NodeOutput(as_tensor(neuron_figure(run)), described(run))
