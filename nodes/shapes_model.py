"""The embedded world in a graph."""

from comfy_api.latest import io

from .comfy.sockets import CATEGORY
from .runs.combos import SHAPES_NETWORKS, check_choice
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
            inputs=[
                io.Combo.Input(
                    "network",
                    list(SHAPES_NETWORKS),
                    default="U-Net",
                    optional=True,  # older workflows lack it
                    tooltip="U-Net: a small Stable Diffusion 1.x. flow: a small Stable Diffusion 3, a transformer on "
                    "flow matching. Both come with the same CLIP and VAE.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The network. It draws 64 x 64 pixels."),
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
    def execute(cls, network: str = "U-Net") -> io.NodeOutput:
        from .comfy.shapes_out import shapes_native

        check_choice("network", network, list(SHAPES_NETWORKS))
        return io.NodeOutput(*shapes_native(SHAPES_NETWORKS[network]))
