"""The Train node: from a graph's wires to a run, and from a run to what it has."""

from typing import Any

from comfy_api.latest import io

from comfy_tdpo.methods import ALGORITHMS
from comfy_tdpo.prompts import prompt_sets

from .comfy.sockets import CATEGORY, Critic, Reward, Run, advanced, telling
from .runs.combos import AUTO, CONTINUE, MODES, RESUME, WAIT, check_choice
from .runs.used import used_by
from .runs.wording import words_of_nodes

AS_PRESET = (
    " 0: the preset's value; the preset is 'shapes' or 'shapes-flow' for the Shapes Model, 'sdxl' for Stable Diffusion "
    "XL, 'sd3' for Stable Diffusion 3, 'flux-dev' or 'flux-schnell' for FLUX.1, 'z-image-turbo' for Z-Image ('z-image' "
    "if its shift is 6), and 'sd15' for any other model."
)


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TDPOTrain",
            display_name="TDPO-R Train",
            category=CATEGORY,
            description="Aligns a model with a reward, a number that says how good an image is: draws images, scores "
            "them, and trains a LoRA to make images like the best ones more likely. Runs are kept in output/tdpo, and "
            "resume where they were stopped.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Stable Diffusion 1.x, 2.x, XL, 3 or 3.5 medium, FLUX.1, Z-Image, or the Shapes Model. "
                    "LoRAs already applied to it become part of the base model.",
                ),
                io.Clip.Input("clip", tooltip="Encodes the prompts once, before the training starts."),
                io.Vae.Input("vae", tooltip="Decodes the images that are scored."),
                Reward.Input("reward", tooltip="The training reward: a TDPO Reward Model, or several in a chain."),
                io.String.Input(
                    "run_name",
                    default="my run",
                    tooltip="The name of the run's folder in output/tdpo, and of its LoRA in the list of Load LoRA.",
                ),
                io.Combo.Input(
                    "resume",
                    RESUME,
                    default=CONTINUE,
                    tooltip="What to do if a run of this name exists. continue: resume it, or output its results if it "
                    "has finished; with other settings, 'name-2' starts. new: start 'name-2' also if it was stopped. "
                    "as it is: do not train.",
                ),
                io.Combo.Input(
                    "mode",
                    MODES,
                    default=WAIT,
                    tooltip="wait: the graph continues when the training ends; Cancel saves and stops the run. "
                    "background: "
                    "the graph continues at once with what the run has so far; queue it again for newer results.",
                ),
                telling(
                    io.Combo.Input(
                        "algorithm",
                        list(ALGORITHMS),
                        default="ddpo-g",
                        tooltip="How the model learns. Choose ddpo-g; the others are for comparison. A critic is a "
                        "small network that predicts the reward of unfinished images. "
                        + " ".join(f"{name}: {algorithm.summary}." for name, algorithm in ALGORITHMS.items()),
                    ),
                    used_by=used_by(),
                ),
                io.Int.Input(
                    "epochs", default=0, min=0, max=9999, tooltip="Rounds of sampling and updating." + AS_PRESET
                ),
                advanced(
                    io.Int.Input(
                        "samples_per_epoch",
                        default=0,
                        min=0,
                        max=100_000,
                        tooltip="Images drawn and scored per epoch; each update uses half of them." + AS_PRESET,
                    )
                ),
                advanced(
                    io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Denoising steps per image." + AS_PRESET)
                ),
                advanced(
                    io.Float.Input(
                        "guidance",
                        default=0.0,
                        min=0.0,
                        max=100.0,
                        step=0.5,
                        round=0.01,
                        tooltip="Classifier-free guidance (cfg) in training; use about the same when you sample. "
                        "FLUX.1 takes 1, and dev's own guidance is embedded_guidance in settings." + AS_PRESET,
                    )
                ),
                advanced(
                    io.Int.Input(
                        "resolution",
                        default=0,
                        min=0,
                        max=8192,
                        step=8,
                        tooltip="Width and height in pixels in training. Lower it if memory runs out. For images "
                        'that are not square, leave 0 here and write resolution = "832x1216" into settings.'
                        + AS_PRESET,
                    )
                ),
                advanced(io.Int.Input("rank", default=0, min=0, max=1024, tooltip="Rank of the LoRA." + AS_PRESET)),
                advanced(
                    io.Float.Input(
                        "learning_rate",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=1e-5,
                        round=1e-8,
                        tooltip="Learning rate of the LoRA." + AS_PRESET,
                    )
                ),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**63 - 1,
                    tooltip="The source of every random number: the same seed and settings give the same run.",
                ),
                io.Combo.Input(
                    "prompt_set",
                    [AUTO, *prompt_sets()],
                    default=AUTO,
                    tooltip="Prompts to train on, if there are none in 'prompts'. auto: the preset's.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts to train on, one per line. If there are any, the prompt set is ignored. CLIP "
                    "reads weights such as (red:1.3) as in CLIP Text Encode; rewards read the words alone.",
                ),
                Critic.Input(
                    "critic",
                    optional=True,
                    tooltip="A TDPO Temporal Critic: settings of the small network that predicts the reward of "
                    "unfinished images. You need none: the preset has values for it.",
                ),
                Reward.Input(
                    "held_out",
                    optional=True,
                    tooltip="Held-out rewards: a second opinion, measured every epoch and never trained on. They show "
                    "whether the images get better or only score better on the training reward. Their weights are "
                    "ignored.",
                ),
                io.String.Input(
                    "settings",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Further settings, one per line, as in a run's config.toml: micro_batch = 4, "
                    "policy.gradient_checkpointing = true.",
                ),
            ],
            outputs=[
                Run.Output(
                    "run", display_name="run", tooltip="The run, for TDPO LoRA Apply and TDPO Neuron Reset Inspector."
                ),
                io.LoraModel.Output(
                    "lora",
                    display_name="lora",
                    tooltip="The newest LoRA, for ComfyUI's Load LoRA Model and Save LoRA; empty if all weights are "
                    "trained.",
                ),
                io.Image.Output("samples", display_name="samples", tooltip="The newest grid of sample images."),
                io.Image.Output("plot", display_name="plot", tooltip="The rewards over the epochs."),
            ],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None) -> bool | str:
        from .runs.names import problem_with

        if run_name is None:  # it comes along a wire, and later
            return True
        return (
            problem_with(run_name) or True if isinstance(run_name, str) else f"got run name {run_name!r}; expected text"
        )

    @classmethod
    def fingerprint_inputs(
        cls, run_name: str | None, mode: str | None, resume: str | None = None, **others: Any
    ) -> str | float:
        if run_name is None:
            return float("nan")  # equals nothing, so that the node runs whenever it is queued
        from .comfy.folders import all_runs
        from .runs.select import token

        return token(all_runs(), run_name, mode == WAIT, resume or CONTINUE, others)

    @classmethod
    @words_of_nodes()
    def execute(
        cls,
        model,
        clip,
        vae,
        reward,
        run_name: str,
        resume: str,
        mode: str,
        algorithm: str,
        epochs: int,
        samples_per_epoch: int,
        steps: int,
        guidance: float,
        resolution: int,
        rank: int,
        learning_rate: float,
        seed: int,
        prompt_set: str,
        prompts: str = "",
        critic=None,
        held_out=None,
        settings: str = "",
    ) -> io.NodeOutput:
        from .comfy.executor import train
        from .comfy.models_in import Wires
        from .runs.marks import Place, workflow_id
        from .runs.outputs import lora_weights, plot_image, sample_image

        check_choice("resume", resume, RESUME)
        check_choice("mode", mode, MODES)
        numbers = {
            "epochs": epochs,
            "samples_per_epoch": samples_per_epoch,
            "steps": steps,
            "guidance": guidance,
            "resolution": resolution,
            "rank": rank,
            "learning_rate": learning_rate,
        }
        wires = Wires(model, clip, vae)
        wanted = wires.wanted(
            reward=reward,
            algorithm=algorithm,
            seed=seed,
            numbers=numbers,
            held_out=held_out,
            critic=critic,
            text=prompts,
            prompt_set=prompt_set,
            settings=settings,
        )
        node = cls.hidden.dynprompt.get_display_node_id(cls.hidden.unique_id)  # a loop runs copies with other ids
        place = Place(node, workflow_id(cls.hidden.extra_pnginfo))
        run = train(wires, wanted, run_name, resume, mode == WAIT, place)
        return io.NodeOutput(
            run, lora_weights(run), sample_image(run), plot_image(run), ui={"tdpo_run": [run.path.name]}
        )
