"""Methods: what an algorithm samples, aims at and updates; and the registry of algorithms.

Shapes: N samples of an epoch in this process, T denoising steps, M rows of one gradient update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..registry import entry, look_up

if TYPE_CHECKING:
    from torch import Tensor

    from ..randomness import Coordinates
    from ..rollout import Trajectories
    from ..settings import MethodSettings
    from .context import Context

TensorGroup = dict[str, "Tensor"]
Metrics = dict[str, float]


class Method(Protocol):
    """One algorithm in a training, made with a Context: the configuration, the model, the rewards, the means to update.

    Epoch by epoch the trainer calls, in this order: `sample` for every micro-batch and `targets` once, which fill
    `context.progress`; `update` for each of `groups`; `metrics`; `finish`. All but `update` are called without
    gradients. A run may be saved and resumed after any of these calls, so what must outlive them is in
    `context.progress`, in what is trained of the model, or in `state`.

    samples_first: False for a method whose updates draw their own samples, with gradients. `sample` and `targets` are
    not called then, and each update appends the trajectories it has drawn to `context.progress.parts`.
    """

    samples_first: bool

    def __init__(self, context: Context): ...

    def sample(self, prompts: list[str], seeds: Sequence[Coordinates]) -> Trajectories:
        """One trajectory for each of `prompts`, its randomness drawn at `seeds`."""
        ...

    def targets(self, batch: Trajectories, prompts: list[str]) -> TensorGroup:
        """What the updates of an epoch aim at, (N, ...) each.

        `batch` holds this process's N samples, `prompts` those of all processes.
        """
        ...

    def groups(self, epoch: int) -> Sequence[Any]:
        """The gradient updates of an epoch, each whatever `update` takes."""
        ...

    def update(self, group: Any) -> None:
        """One gradient update; metrics are added up with `context.add` and `context.raise_to`."""
        ...

    def metrics(self, batch: Trajectories) -> Metrics:
        """Its own metrics of an epoch, beside those it has added up."""
        ...

    def finish(self, batch: Trajectories) -> Metrics:
        """What it does after the last update, and its metrics."""
        ...

    def state(self) -> tuple[dict[str, TensorGroup], dict[str, Any]]:
        """What it keeps beside the model: named groups of tensors, and plain values."""
        ...

    def load_state(self, tensors: dict[str, TensorGroup], plain: dict[str, Any]) -> None:
        """Put back what `state` gave; the dictionaries may hold more."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """A name that a user may choose.

    method, settings: "module:class" of a Method and of its MethodSettings, which is read without the former.
    values: the algorithm's own, laid over the defaults of the settings; summary: one line for people who choose.
    """

    method: str
    settings: str
    summary: str
    values: dict[str, Any] = field(default_factory=dict)


_POLICY_GRADIENT = "comfy_tdpo.methods.policy_gradient:PolicyGradient"
_SETTINGS = "comfy_tdpo.methods.settings:PolicyGradientSettings"

# Table 1 of the paper. The defaults of the settings are TDPO-R's.
ALGORITHMS = {
    "tdpo-r": Algorithm(_POLICY_GRADIENT, _SETTINGS, "TDPO with resets of the critic's active neurons"),
    "tdpo": Algorithm(
        _POLICY_GRADIENT,
        _SETTINGS,
        "a critic's temporal rewards, one update per timestep",
        {"neurons": {"reset": "none"}},
    ),
    "ddpo-100": Algorithm(
        _POLICY_GRADIENT,
        _SETTINGS,
        "no critic, one update per timestep",
        {"advantage_clip": 5.0, "critic": {"enabled": False}, "neurons": {"reset": "none"}},
    ),
    "ddpo-2": Algorithm(
        _POLICY_GRADIENT,
        _SETTINGS,
        "no critic, one update for all timesteps",
        {
            "updates": "trajectory",
            "advantage_clip": 5.0,
            "policy": {"lr": 3e-4},
            "critic": {"enabled": False},
            "neurons": {"reset": "none"},
        },
    ),
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm `name`; ValueError where there is none."""
    return entry(ALGORITHMS, "algorithm", name)


def settings_class(name: str) -> type[MethodSettings]:
    """The settings of the algorithm `name`."""
    return look_up(find_algorithm(name).settings)


def make_method(name: str, context: Context) -> Method:
    """The method of the algorithm `name` for one training."""
    return look_up(find_algorithm(name).method)(context)
