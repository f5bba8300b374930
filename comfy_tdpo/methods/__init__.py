"""Methods: how an algorithm samples, computes its training targets and updates; and the registry of algorithms.

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
    from ..rollout import Sampled, Trajectories
    from ..settings import MethodSettings
    from .context import Context

TensorGroup = dict[str, "Tensor"]
Metrics = dict[str, float]


class Method(Protocol):
    """The implementation of an algorithm, constructed with the run's Context.

    In each epoch the trainer calls, in this order: `sample` for every micro-batch and `targets` once, which fill
    `context.progress`; `update` for each of `groups`; `metrics`; `finish`. All but `update` are called with gradients
    disabled. A run may be saved and resumed after any of these calls, so everything that must survive them is in
    `context.progress`, in the trained part of the model, or in `state`.

    samples_first: False for a method whose updates draw their own samples, with gradients. In that case `sample` and
    `targets` are not called, each update appends the trajectories it has drawn to `context.progress.parts`, and the
    method calls `context.begin`.
    """

    samples_first: bool

    def __init__(self, context: Context): ...

    def sample(self, prompts: list[str], seeds: Sequence[Coordinates]) -> Sampled:
        """One trajectory per prompt, with random numbers drawn from its coordinates in `seeds`. The trainer has the
        rewards that other programs compute asked while it draws the next ones."""
        ...

    def targets(self, batch: Trajectories, prompts: list[str]) -> TensorGroup:
        """The training targets of an epoch, (N, ...) each.

        `batch` holds this process's N samples; `prompts` are those of all processes.
        """
        ...

    def groups(self, epoch: int) -> Sequence[Any]:
        """The gradient updates of an epoch, each an argument for `update`."""
        ...

    def update(self, group: Any) -> None:
        """One gradient update; it reports metrics with `context.add` and `context.raise_to`."""
        ...

    def metrics(self, batch: Trajectories) -> Metrics:
        """The method's metrics of an epoch, in addition to those reported by `update`."""
        ...

    def finish(self, batch: Trajectories) -> Metrics:
        """Do what follows the last update of an epoch, and return its metrics."""
        ...

    def state(self) -> tuple[dict[str, TensorGroup], dict[str, Any]]:
        """What to save besides the model: named groups of tensors, and plain values."""
        ...

    def load_state(self, tensors: dict[str, TensorGroup], plain: dict[str, Any]) -> None:
        """Restore what `state` returned; the dictionaries may contain more than that."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """An algorithm that a user can choose by name.

    method, settings: "module:class" of a Method and of its MethodSettings; the settings can be imported without the
    method.
    values: the algorithm's own values, which override the defaults of the settings.
    summary: one line that helps users choose.
    """

    method: str
    settings: str
    summary: str
    values: dict[str, Any] = field(default_factory=dict)


_POLICY_GRADIENT = "comfy_tdpo.methods.policy_gradient:PolicyGradient"
_SETTINGS = "comfy_tdpo.methods.settings:PolicyGradientSettings"
_DIRECT = "comfy_tdpo.methods.direct"
_GUARDED: dict[str, Any] = {
    "neurons": {"reset": "none"},
    "guard_penalty": 1.5,
    "guard_credit": True,
    "policy": {"timestep_order": "denoising", "lr_schedule": "cosine"},
}

# ddpo-g is this project's recipe, see docs/recipe.md, and tdpo-g is the same with a critic. tdpo-r to ddpo-2 are
# Table 1 of the paper, and the settings' defaults are the paper's values of TDPO-R. grpo has the groups and updates
# of DanceGRPO on Stable Diffusion 1.4 (arXiv 2505.07818), which trains all weights, and the LoRA, its learning rate
# and the clip of Flow-GRPO (arXiv 2505.05470). Both leave the last step out, 0.98 of 50 steps. dpok is DPOK (arXiv
# 2305.16381) on many prompts: its code weighs rewards by 1000 and the KL by 0.1, and with Adam only their ratio
# matters. sdpo is SDPO (arXiv 2411.11727). alignprop, draft and refl have their authors' values; the numbers of steps
# and samples that belong to them are in the presets sd14-*.
ALGORITHMS = {
    "ddpo-g": Algorithm(
        _POLICY_GRADIENT,
        _SETTINGS,
        "one update per step, without a critic; guards, rewards that must not fall, restrain it",
        {"critic": {"enabled": False}} | _GUARDED,
    ),
    "tdpo-g": Algorithm(
        _POLICY_GRADIENT,
        _SETTINGS,
        "ddpo-g with a critic that sees the predicted clean image, the prompt and the step",
        {
            "critic": {
                "reads": "clean",
                "prompt": True,
                "step": True,
                "architecture": "standardised",
                "activation": "relu",
                "history": 4,
                "lr": 1e-3,
                "weight_decay": 1e-2,
            }
        }
        | _GUARDED,
    ),
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
    "dpok": Algorithm(
        _POLICY_GRADIENT,
        _SETTINGS,
        "a value function of the noisy latent, and a KL penalty in the loss",
        {
            "policy": {"lr": 1e-5, "weight_decay": 0.0, "max_grad_norm": 0.1, "replay": 1, "replay_share": 1.0},
            "moments": {"baseline": "epoch"},
            "kl": {"coefficient": 1e-4, "form": "loss", "weighting": "noise"},
            "critic": {
                "reads": "latent",
                "prompt": True,
                "step": True,
                "architecture": "dpok",
                "activation": "relu",
                "clip_range": None,
            },
            "neurons": {"reset": "none"},
        },
    ),
    "grpo": Algorithm(
        _POLICY_GRADIENT,
        _SETTINGS,
        "no critic, images compared with others of their prompt, one update for all timesteps",
        {
            "samples_per_prompt": 16,
            "updates": "trajectory",
            "advantage_clip": 5.0,
            "policy": {"lr": 3e-4, "rank": 32, "alpha": 64.0, "train_until": 0.98},
            "moments": {"baseline": "group", "group_std": "group"},
            "critic": {"enabled": False},
            "neurons": {"reset": "none"},
        },
    ),
    "sdpo": Algorithm(
        "comfy_tdpo.methods.sdpo:SDPO",
        "comfy_tdpo.methods.sdpo_settings:SDPOSettings",
        "no critic, a reward for each step from predicted clean images, compared between two images of a prompt",
    ),
    "alignprop": Algorithm(
        f"{_DIRECT}.alignprop:AlignProp",
        f"{_DIRECT}.settings:AlignPropSettings",
        "the reward's gradient through a random number of the last steps",
        {"loss_weight": 0.01, "policy": {"lr": 1e-3}, "recompute": {"steps": True}},
    ),
    "draft": Algorithm(
        f"{_DIRECT}.draft:Draft",
        f"{_DIRECT}.settings:DraftSettings",
        "the reward's gradient through the last step, or the last few",
        {"policy": {"lr": 4e-4, "rank": 8, "weight_decay": 0.1}, "recompute": {"steps": True}},
    ),
    "refl": Algorithm(
        f"{_DIRECT}.refl:Refl",
        f"{_DIRECT}.settings:ReflSettings",
        "the reward's gradient through one of the last steps, at the image predicted there",
        {"loss_weight": 1e-3, "policy": {"lr": 1e-5, "weight_decay": 1e-2, "ema": 0.9999}},
    ),
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm `name`; raises ValueError if there is none."""
    return entry(ALGORITHMS, "algorithm", name)


def settings_class(name: str) -> type[MethodSettings]:
    """The settings class of the algorithm `name`."""
    return look_up(find_algorithm(name).settings)


def make_method(name: str, context: Context) -> Method:
    """The method of the algorithm `name` for one run."""
    return look_up(find_algorithm(name).method)(context)
