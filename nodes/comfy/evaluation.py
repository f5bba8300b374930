"""What the Evaluate node does on ComfyUI's executor: it draws with copies of the models, and may be cancelled there."""

import gc

import comfy.model_management
import comfy.utils
import torch

from ...trainer.evaluation.asked import Options, ask, usual_folder
from ...trainer.evaluation.numbers import Evaluation
from ...trainer.evaluation.work import evaluate
from ...trainer.run import RunFolder
from ..runs.prompts import Prompts
from .baked import model_name
from .models_in import Wires


def evaluate_run(wires: Wires, run: RunFolder, options: Options) -> Evaluation:
    """Evaluate a run with the models on the wires.

    Raises:
        ValueError: it cannot be evaluated as asked, or the MODEL is not the run's.
    """
    wires.check()
    asked, config, device = ask([run], options, in_graph=True), run.config, comfy.model_management.get_torch_device()
    if (name := model_name(wires.model)) != config.model:
        raise ValueError(
            f"got the MODEL {name!r} for run {run.path.name!r}, which was trained on {config.model!r}; expected the "
            "same, without the run's LoRA: connect the MODEL that TDPO-R Train takes"
        )
    words = [prompt for prompts in asked.sets for prompt in prompts.prompts]
    prompts = Prompts(words, {own: line for prompts in asked.sets for own, line in prompts.written})
    make_policy = wires.policy_maker(config, prompts, device)  # in main memory until it is used
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    bar = comfy.utils.ProgressBar(1)
    try:
        with torch.inference_mode(False):
            return evaluate(
                asked,
                usual_folder([run]),
                device,
                make_policy,
                check=comfy.model_management.throw_exception_if_processing_interrupted,
                watch=lambda phase, done, total: bar.update_absolute(done, max(total, 1)),
            )
    finally:
        del make_policy
        gc.collect()  # a policy refers to itself
        comfy.model_management.soft_empty_cache()
