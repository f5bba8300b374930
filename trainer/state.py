"""Everything that changes while a run trains, and how it goes to disk and back without losing a bit.

Shapes: N samples of an epoch in this process, T denoising steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_tdpo.advantages import KLCoefficient, RewardMoments
from comfy_tdpo.critic import TemporalCritic
from comfy_tdpo.lora import load_lora_state, lora_state
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.rollout import Trajectories

from .checkpoint import load_latest, load_optimizer_tensors, optimizer_tensors, save_checkpoint
from .config import OptimizerConfig, TrainConfig
from .identity import check_same
from .run import EpochMetrics
from .run_paths import epoch_name

TensorGroup = dict[str, Tensor]
Watch = Callable[[str, int, int], None]  # (phase, done, total)


@dataclass
class Targets:
    """What the updates of one epoch aim at, each (N, T); residuals are None without a critic."""

    temporal_rewards: Tensor
    returns: Tensor
    residuals: Tensor | None = None


@dataclass
class Progress:
    """How far an epoch has come: its samples, then their targets, then its updates.

    sums: metrics added up over the updates done; times: seconds spent, which no checkpoint keeps.
    """

    parts: list[Trajectories] = field(default_factory=list)
    targets: Targets | None = None
    updates: int = 0
    sums: TensorGroup = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=lambda: {"sample": 0.0, "train": 0.0})

    @property
    def samples(self) -> int:
        return sum(map(len, self.parts))

    def tensors(self) -> dict[str, TensorGroup]:
        """The unfinished epoch as named groups; none where nothing was sampled yet."""
        if not self.parts:
            return {}
        batch = Trajectories.concatenate(self.parts)
        groups = {"samples": _tensors_of(batch), "eval_rewards": batch.eval_rewards, "sums": self.sums}
        if self.targets:
            groups["targets"] = _tensors_of(self.targets)
        return groups

    @classmethod
    def from_tensors(cls, groups: dict[str, TensorGroup], updates: int, prompts: list[str]) -> "Progress":
        """The inverse of `tensors`; `prompts` are those of the epoch."""
        if "samples" not in groups:
            return cls()
        samples = groups["samples"]
        part = Trajectories(prompts=prompts[: len(samples["rewards"])], eval_rewards=groups["eval_rewards"], **samples)
        targets = Targets(**groups["targets"]) if "targets" in groups else None
        return cls(parts=[part], targets=targets, updates=updates, sums=groups["sums"])


class TrainState:
    """LoRA, critic, their optimizers, reward moments, KL coefficient, metrics, and which neurons were active last.

    Args:
        identity: what makes the run this one, see `identity.identity`.
        embed_dim: width of the critic's encoder, or None for no critic.
        micro_batch: rows of every forward; processes: how many train together.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: DiffusionPolicy,
        identity: dict[str, Any],
        embed_dim: int | None,
        micro_batch: int,
        processes: int = 1,
    ):
        self.policy, self.micro_batch, self.processes = policy, micro_batch, processes
        self.identity = identity
        self.epoch, self.progress = 0, Progress()
        self.metrics: list[EpochMetrics] = []  # of the epochs so far
        self.optimizer = _adamw(policy.parameters, config.policy)
        self.critic = None
        if embed_dim is not None:
            draw = generator_at(config.seed, "critic")
            self.critic = TemporalCritic(embed_dim, config.critic.activation, draw).to(policy.device)
            self.critic_optimizer = _adamw(list(self.critic.parameters()), config.critic)
        self.moments = RewardMoments(config.moments.buffer_size, config.moments.min_count)
        self.kl = KLCoefficient(config.kl.coefficient, config.kl.target, config.kl.horizon)
        self.active: dict[str, TensorGroup] = {}  # masks of the epoch before, of the critic and of the policy

    @property
    def name(self) -> str:
        """What a checkpoint of this state is called: how far the run has come, in names that sort."""
        name, progress = epoch_name(self.epoch), self.progress
        return name + f"-samples-{progress.samples:06d}-updates-{progress.updates:06d}" if progress.parts else name

    def save(self, folder: Path, keep: int) -> None:
        """Write this state as a checkpoint in `folder`."""
        tensors = {
            "policy": lora_state(self.policy.unet),
            "policy_optimizer": optimizer_tensors(self.optimizer, self.policy.named_parameters),
        }
        if self.critic:
            tensors["critic"] = self.critic.state_dict()
            tensors["critic_optimizer"] = optimizer_tensors(self.critic_optimizer, dict(self.critic.named_parameters()))
        tensors |= {f"active_{group}": masks for group, masks in self.active.items()}
        tensors |= self.progress.tensors()
        state = {
            "epoch": self.epoch,
            "updates": self.progress.updates,
            "micro_batch": self.micro_batch,
            "kl_coefficient": self.kl.value,
            "moments": self.moments.state_dict(),
            "metrics": self.metrics,
            "identity": self.identity,
        }
        save_checkpoint(folder, self.name, tensors, state, keep)

    def restore(self, folder: Path, prompts_of_epoch: Callable[[int], list[str]]) -> bool:
        """Become the newest checkpoint in `folder`; False where there is none."""
        found = load_latest(folder)
        if found is None:
            return False
        tensors, state = found
        check_same(self.identity, state["identity"])
        if self.processes > 1 and "samples" in tensors:
            raise ValueError(
                f"got {self.processes} processes for a run that one process left in the middle of an epoch; expected "
                f"one process until that epoch ends, or delete its newest checkpoint in {str(folder)!r} to go back"
            )
        load_lora_state(self.policy.unet, tensors["policy"])
        load_optimizer_tensors(self.optimizer, self.policy.named_parameters, tensors["policy_optimizer"])
        if self.critic:
            self.critic.load_state_dict(tensors["critic"])
            named = dict(self.critic.named_parameters())
            load_optimizer_tensors(self.critic_optimizer, named, tensors["critic_optimizer"])
        on_device = {name: self._to_device(group) for name, group in tensors.items()}
        prefix = "active_"
        self.active = {name.removeprefix(prefix): masks for name, masks in on_device.items() if name.startswith(prefix)}
        self.epoch, self.micro_batch, self.metrics = state["epoch"], state["micro_batch"], state["metrics"]
        self.kl.value = state["kl_coefficient"]
        self.moments.load_state_dict(state["moments"])
        self.progress = Progress.from_tensors(on_device, state["updates"], prompts_of_epoch(self.epoch + 1))
        return True

    def _to_device(self, group: TensorGroup) -> TensorGroup:
        return {name: tensor.to(self.policy.device) for name, tensor in group.items()}


def _tensors_of(record: Any) -> TensorGroup:
    return {f.name: value for f in fields(record) if isinstance(value := getattr(record, f.name), Tensor)}


def _adamw(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
