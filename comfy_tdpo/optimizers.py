"""AdamW built from its settings, its learning rate's schedule, and its state keyed by parameter name."""

import math

import torch
from torch import Tensor, nn

from .low_precision import LowPrecisionAdamW
from .settings import OptimizerSettings, PolicySettings


def adamw(parameters: list[nn.Parameter], settings: OptimizerSettings, one_by_one: bool = False) -> torch.optim.AdamW:
    """AdamW; with `one_by_one`, it never needs memory for more than one parameter at a time.

    On CUDA it is torch's fused one, a single kernel for all parameters that needs no memory of its own. On the CPU that
    would round otherwise than the loop, and so change the results of fixed seeds.
    """
    fused = on_cuda(parameters)
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False if one_by_one and not fused else None,
        fused=fused or None,
    )


def on_cuda(parameters: list[nn.Parameter]) -> bool:
    return all(parameter.is_cuda for parameter in parameters)


def policy_optimizer(parameters: list[nn.Parameter], settings: PolicySettings, seed: int) -> torch.optim.Optimizer:
    """The optimizer that `settings` name; `seed`: of the run, for rounding at random."""
    if settings.optimizer == "adamw-8bit":
        return LowPrecisionAdamW(parameters, settings, seed)
    return adamw(parameters, settings, one_by_one=settings.trains_all)


def bytes_of_moments(count: int, settings: PolicySettings) -> int:
    """The bytes of the moments of `count` numbers, but for the scales of those in 8 bits."""
    return 2 * count * (1 if settings.optimizer == "adamw-8bit" else 4)


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
    """The optimizer's state under keys of the form <parameter's name>:<moment's name>."""
    return {
        f"{name}:{moment}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned, matching parameters by name.

    The optimizer's own `load_state_dict` would give every moment the dtype of its parameter.
    """
    counts_there = optimizer.defaults.get("fused")  # otherwise AdamW counts its steps on the CPU
    for key, value in tensors.items():
        name, _, moment = key.rpartition(":")
        where = parameters[name].device if moment != "step" or counts_there else "cpu"
        optimizer.state[parameters[name]][moment] = value.to(where)
