"""One update, in this process or in one of several: python updating.py FOLDER keeps its gradients and averages."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tint import TintModel
from torch import Tensor
from toy import Brightness, new_run

from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.trainer.training import Training

ALGORITHMS = ("tdpo-r", "ddpo-2", "alignprop")
SETTINGS = {"samples_per_epoch": 8, "samples_per_update": 8, "micro_batch": 2, "resolution": 8, "guidance": 1.0}


def gradients(folder: Path, algorithm: str) -> dict[str, Tensor]:
    """Of policy and critic, as the optimizers get them, in the first update of a policy that has drifted; and the
    averaged weights after it."""
    accelerator, kept = Accelerator(cpu=True), {}
    run = new_run(folder / f"{algorithm}-{accelerator.process_index}", algorithm=algorithm, **SETTINGS)
    policy = DiffusionPolicy(
        TintModel(), steps=run.config.steps, guidance=1.0, resolution=8, settings=PolicySettings(ema=0.5)
    )
    for parameter in policy.parameters:
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(parameter)))
    training = Training(run.config, policy, Brightness(), {}, run, accelerator)
    optimizers = {"policy": training.context.optimizer}
    if getattr(training.method, "critic", None) is not None:
        training.method.critic.network.dropout = (0.0,) * 4  # its masks are drawn for a process's own rows
        optimizers["critic"] = training.method.critic.optimizer
    for name, optimizer in optimizers.items():
        parameters = optimizer.param_groups[0]["params"]
        optimizer.register_step_pre_hook(
            lambda *_, name=name, parameters=parameters: kept.update(
                {f"{name}.{i}": parameter.grad.clone() for i, parameter in enumerate(parameters)}
            )
        )
    if training.method.samples_first:
        training._sample()
    training.method.update(training.method.groups(1)[0])
    return kept | {f"average.{name}": weight for name, weight in policy.average.weights.items()}


if __name__ == "__main__":
    place, rank = Path(sys.argv[1]), Accelerator(cpu=True).process_index
    for algorithm in ALGORITHMS:
        save_file(gradients(place, algorithm), place / f"{algorithm}-{rank}.safetensors")
