"""A run's LoRA on a MODEL, or its weights if it trained all of them."""

from typing import Any

from comfy_api.latest import io

from .comfy.folders import lora_modified, lora_names
from .comfy.sockets import CATEGORY, Run
from .runs.combos import BLENDS, LATEST, NO_BLEND, NO_FILE, SNAPSHOTS, check_choice
from .runs.wording import words_of_nodes


class ApplyLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPOApplyLoRA",
            display_name="TDPO LoRA Apply",
            category=CATEGORY,
            description="Applies the LoRA of a run, or of a file, to a model; of a run that trained all weights, "
            "these. If no part of them fits the model, it raises an error instead of returning the model unchanged.",
            inputs=[
                io.Model.Input("model", tooltip="The model the run was trained on."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How strongly the LoRA is applied. 1 applies it as trained.",
                ),
                io.Combo.Input(
                    "snapshot",
                    SNAPSHOTS,
                    default=LATEST,
                    tooltip="Which snapshot of the run: the latest, the recommended one with its recommended strength, "
                    "the one whose images scored best on the training reward or on the first held-out reward, or the "
                    "one of the epoch given below.",
                ),
                io.Int.Input(
                    "epoch", default=1, min=1, max=9999, tooltip="Used if snapshot is 'epoch'. Not every epoch is kept."
                ),
                io.Combo.Input(
                    "lora_name",
                    [NO_FILE, *lora_names()],
                    default=NO_FILE,
                    tooltip="A LoRA file; used if no run is connected.",
                ),
                Run.Input("run", optional=True, tooltip="A run of TDPO-R Train. If connected, lora_name is ignored."),
                io.Combo.Input(
                    "blend_over_steps",
                    BLENDS,
                    default=NO_BLEND,
                    optional=True,
                    tooltip="How the strength changes over the sampling steps. none: all of it at every step; linear, "
                    "power_2, power_4: it grows from 0 at the first, so that the base model composes the image; "
                    "step_0.6: from 60 % of the steps on; until_0.5: in the first half of the steps only.",
                ),
            ],
            outputs=[
                io.Model.Output("aligned", display_name="MODEL", tooltip="The model with the LoRA applied."),
                io.String.Output("info", display_name="info", tooltip="What was applied."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = NO_FILE, **_: Any) -> str:
        """A file may be overwritten; a newer snapshot of a run shows in the fingerprint of its Train node."""
        return lora_modified(lora_name)

    @classmethod
    @words_of_nodes()
    def execute(
        cls,
        model,
        strength: float,
        snapshot: str,
        epoch: int,
        lora_name: str,
        run=None,
        blend_over_steps: str = NO_BLEND,
    ) -> io.NodeOutput:
        from .comfy.lora import apply_file, apply_run

        check_choice("blend_over_steps", blend_over_steps, BLENDS)
        if run is not None:
            return io.NodeOutput(*apply_run(model, run, snapshot, epoch, strength, blend_over_steps))
        return io.NodeOutput(*apply_file(model, lora_name, strength, blend_over_steps))
