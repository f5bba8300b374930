"""The embedded world in a graph."""

from comfy_api.latest import io

from .comfy.sockets import CATEGORY
from .runs.wording import words_of_nodes


class ShapesModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPOShapesModel",
            display_name="Shapes Model",
            category=CATEGORY,
            description="A tiny text-to-image model of coloured shapes that ships with the pack: 64 x 64 pixels, "
            "nothing to download, and minutes to train on any machine. It draws prompts such as 'a red circle on a "
            "blue background'.",
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The U-Net. It draws 64 x 64 pixels."),
                io.Clip.Output(
                    "clip", display_name="CLIP", tooltip="The text encoder. It knows only the words of Shapes."
                ),
                io.Vae.Output(
                    "vae", display_name="VAE", tooltip="The autoencoder: 8 x 8 pixels for each element of a latent."
                ),
            ],
        )

    @classmethod
    @words_of_nodes()
    def execute(cls) -> io.NodeOutput:
        from .comfy.shapes_out import shapes_native

        return io.NodeOutput(*shapes_native())
