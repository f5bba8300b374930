"""AdamW built from its settings, its learning rate's schedule, and its state keyed by parameter name."""

import math

import torch
from torch import Tensor, nn

from .settings import OptimizerSettings, PolicySettings


def adamw(parameters: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def scheduled_lr(settings: PolicySettings, update: int, updates: int) -> float:
    """The learning rate of update 0, 1, ... of the run's planned `updates`; greater than 0 for each of them."""
    warmup = settings.warmup_updates
    if update < warmup:
        return settings.lr * (update + 1) / warmup
    done = (update - warmup) / (updates - warmup)  # in [0, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.lr_schedule]
    return settings.lr * factor


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state under keys of the form <parameter's name>:<moment's name>."""
    return {
        f"{name}:{moment}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned, matching parameters by name; the optimizer has a single group."""
    (group,) = optimizer.param_groups
    names = {parameter: name for name, parameter in parameters.items()}
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(":")
        state.setdefault(name, {})[moment] = value
    by_position = {i: state[names[p]] for i, p in enumerate(group["params"]) if names[p] in state}
    optimizer.load_state_dict({"state": by_position, "param_groups": optimizer.state_dict()["param_groups"]})
