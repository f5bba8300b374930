"""Updates, in this process or in one of several: python updating.py FOLDER keeps what they come to.

Of one update the gradients and averages; of a few epochs the weights and the metrics.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from tint import TintModel
from torch import Tensor
from toy import Brightness, Contrast, new_run, timeless

from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.trainer.training import Training

ALGORITHMS = ("tdpo-r", "ddpo-2", "alignprop")
SETTINGS = {"samples_per_epoch": 8, "samples_per_update": 8, "micro_batch": 2, "resolution": 8, "guidance": 1.0}

EPOCHS = 3
COMMON = SETTINGS | {
    "epochs": EPOCHS,
    "seed": 1,  # with which the training reward rises, so that the alarm has something to say
    "guards": ["shapes-alignment"],
    "eval_rewards": ["shapes-judge"],
    "overoptimisation": {"reward": "shapes-judge", "window": 1},
    # at an epsilon of 1e-8 Adam's first step is the gradient's sign, which rounding decides near 0
    "policy": {"lr": 5e-3, "eps": 1e-3, "ema": 0.5, "timestep_order": "denoising"},
}
RUNS = {
    "recipe": COMMON | {"algorithm": "tdpo-g", "guard_images": 4, "guard_adaptation": 0.5},
    "groups and KL": COMMON
    | {
        "algorithm": "tdpo-r",
        "samples_per_prompt": 2,
        "favour_diversity": True,
        "moments": {"baseline": "group"},
        "kl": {"coefficient": 0.03, "target": 1.0, "controller": "proportional-integral", "gate": True},
        "critic": {"gae_lambda": 0.7, "eps": 1e-3},
    },
    "replay and resets": COMMON
    | {
        "algorithm": "tdpo-r",
        "samples_per_epoch": 16,
        "policy": COMMON["policy"] | {"replay": 1, "replay_share": 0.5, "timestep_order": "shuffled"},
        "neurons": {"every": 2, "reset": "active", "policy_reset": "active"},
        "critic": {"eps": 1e-3},
    },
    "sharded": COMMON
    | {
        "algorithm": "tdpo-r",
        "policy": COMMON["policy"] | {"train": "full", "shard": True},
        "kl": {"coefficient": 0.03, "reset_every": 2},
        "critic": {"eps": 1e-3},
    },
    "pairs": COMMON | {"algorithm": "sdpo", "samples_per_prompt": 2, "guards": []},
}


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


def epochs(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights of policy and critic, the averaged ones, and every epoch's metrics."""
    accelerator = Accelerator(cpu=True)
    folder.mkdir(exist_ok=True)
    prompts = folder / f"prompts-{accelerator.process_index}.txt"
    prompts.write_text("a red circle\na green star\na blue square\n")
    settings = RUNS[name] | {"prompts": str(prompts)}
    run = new_run(folder / f"{name}-{accelerator.process_index}", **settings)
    policy = DiffusionPolicy(
        TintModel(),
        steps=run.config.steps,
        guidance=1.0,
        resolution=8,
        settings=run.config.policy,
        seed=run.config.seed,
    )
    held_out, guards = {"shapes-judge": Contrast()}, {"contrast": Contrast()}
    training = Training(run.config, policy, Brightness(), held_out, run, accelerator, guards=guards)
    metrics = timeless([training._run_epoch() for _ in range(EPOCHS)])
    found = {f"policy.{i}": _whole(policy, parameter.detach()) for i, parameter in enumerate(policy.parameters)}
    if critic := getattr(training.method, "critic", None):
        found |= {f"critic.{name}": weight.clone() for name, weight in critic.network.state_dict().items()}
    found |= {f"average.{name}": _whole(policy, weight) for name, weight in policy.average.weights.items()}
    return found | {
        f"epoch {line['epoch']}, {key}": torch.tensor(float(value)) for line in metrics for key, value in line.items()
    }


def _whole(policy: DiffusionPolicy, tensor: Tensor) -> Tensor:
    """All rows of a tensor of which a process may have its own alone."""
    if not policy.trainable.sharded:
        return tensor.clone()
    parts: list[Tensor] = [tensor] * dist.get_world_size()
    dist.all_gather_object(parts, tensor)
    return torch.cat(parts)


if __name__ == "__main__":
    place, rank = Path(sys.argv[1]), Accelerator(cpu=True).process_index
    for algorithm in ALGORITHMS:
        save_file(gradients(place, algorithm), place / f"{algorithm}-{rank}.safetensors")
    for name in RUNS:
        save_file(epochs(place / "runs", name), place / f"{name}-{rank}.safetensors")
