"""The temporal critic's settings; the defaults are the paper's."""

from typing import get_args

from comfy_api.latest import io

from comfy_tdpo.methods.decoder import FULL, TINY
from comfy_tdpo.methods.sections import CriticActivation, NeuronData, Neurons

from .comfy.folders import tiny_decoder_file, tiny_decoder_names
from .comfy.sockets import CATEGORY, Critic
from .runs.wording import words_of_nodes


class TemporalCritic(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPOTemporalCritic",
            display_name="TDPO Temporal Critic",
            category=CATEGORY,
            description="Sets how the critic of TDPO-R, a small network, learns to predict the reward of a "
            "half-finished image, and which of its neurons are reset. Resets counter overoptimisation: a reward that "
            "rises while the images get worse. The defaults are the paper's, for tdpo-r; that of activation is from "
            "the authors' code. For tdpo-g, see the help.",
            inputs=[
                io.Combo.Input(
                    "activation",
                    list(get_args(CriticActivation)),
                    default="identity",
                    tooltip="Activation between the critic's layers. The authors' code uses identity; the paper "
                    "describes the other two.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-5,
                    round=1e-8,
                    tooltip="Learning rate of the critic. The Shapes preset, which has few epochs, uses 0.001.",
                ),
                io.Float.Input(
                    "clip_range",
                    default=0.2,
                    min=0.001,
                    max=100.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How far an epoch's updates may move a prediction from its old value, in normalised "
                    "reward.",
                ),
                io.Combo.Input(
                    "reset",
                    list(get_args(Neurons)),
                    default="active",
                    tooltip="Which neurons are reset: active (TDPO-R), dormant, all, or none (TDPO).",
                ),
                io.Int.Input("reset_every", default=10, min=1, max=10_000, tooltip="Epochs between two resets."),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="A neuron counts as active if its mean activation, relative to its layer's mean, is above "
                    "this.",
                ),
                io.Combo.Input(
                    "activation_data",
                    list(get_args(NeuronData)),
                    default="epoch",
                    tooltip="Steps on which neurons are measured: all steps of the epoch's images, only the noisiest, "
                    "or those of one batch of images, as in the authors' code.",
                ),
                io.Combo.Input(
                    "decoder",
                    [FULL, TINY, *tiny_decoder_names()],
                    default=FULL,
                    optional=True,
                    tooltip="What decodes the half-finished images that the critic sees. full: the VAE. tiny: a small "
                    "network for the Shapes Model. Or a small one for your MODEL's latents in models/vae_approx, such "
                    "as taesd_decoder: faster and less exact. Rewards always see what the VAE decodes.",
                ),
                io.Int.Input(
                    "read_every",
                    default=1,
                    min=1,
                    max=10_000,
                    optional=True,
                    tooltip="Of how many steps the critic sees one. Higher is faster; between them it goes by the "
                    "last one that it saw.",
                ),
            ],
            outputs=[
                Critic.Output("critic", display_name="critic", tooltip="For the critic input of TDPO-R Train."),
            ],
        )

    @classmethod
    @words_of_nodes()
    def execute(
        cls,
        activation: str,
        learning_rate: float,
        clip_range: float,
        reset: str,
        reset_every: int,
        threshold: float,
        activation_data: str,
        decoder: str = FULL,
        read_every: int = 1,
    ) -> io.NodeOutput:
        file = decoder if decoder in (FULL, TINY) else tiny_decoder_file(decoder)
        reading = {"decoder": file, "read_every": read_every}
        return io.NodeOutput(
            {
                "critic": {"activation": activation, "lr": learning_rate, "clip_range": clip_range} | reading,
                "neurons": {"reset": reset, "every": reset_every, "threshold": threshold, "data": activation_data},
            }
        )
