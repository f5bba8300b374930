"""Everything that changes while a run trains, and how it is saved and restored exactly."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from comfy_tdpo.methods import Method, TensorGroup
from comfy_tdpo.methods.context import Context, Progress
from comfy_tdpo.optimizers import load_optimizer_tensors, optimizer_tensors
from comfy_tdpo.rollout import Trajectories

from .overoptimisation import Overoptimisation
from .run import EpochMetrics
from .run.checkpoint import load_latest, save_checkpoint
from .run.identity import check_same
from .run.paths import epoch_name

Watch = Callable[[str, float, int], None]  # (phase, done, total); within a micro-batch, `done` has a fraction


class TrainState:
    """What a checkpoint holds: the trained weights and their optimizer, the method's state, the run's progress.

    Args:
        context, method, overoptimisation: the training's; identity: what identifies the run, see `identity.identity`.
    """

    def __init__(self, context: Context, method: Method, overoptimisation: Overoptimisation, identity: dict[str, Any]):
        self.context, self.method, self.identity = context, method, identity
        self.overoptimisation = overoptimisation
        self.metrics: list[EpochMetrics] = []  # of the epochs so far

    @property
    def name(self) -> str:
        """The name of a checkpoint of this state: the run's progress, as a name that sorts."""
        name, progress = epoch_name(self.context.epoch), self.context.progress
        return name + f"-samples-{progress.samples:06d}-updates-{progress.updates:06d}" if progress.parts else name

    def save(self, folder: Path, keep: int) -> None:
        """Write this state as a checkpoint in `folder`."""
        context, trainable = self.context, self.context.policy.trainable
        of_method, plain = self.method.state()
        tensors = {
            "policy": trainable.state(),
            "policy_optimizer": optimizer_tensors(context.optimizer, trainable.parameters),
        }
        if average := context.policy.average:
            tensors["policy_average"] = average.state()
        state = {
            "epoch": context.epoch,
            "updates": context.progress.updates,
            "micro_batch": context.micro_batch,
            "metrics": self.metrics,
            "identity": self.identity,
        }
        groups = tensors | of_method | _tensors_of_progress(context.progress)
        if watched := self.overoptimisation.tensors():
            groups["overoptimisation"], state["overoptimisation"] = watched, self.overoptimisation.plain()
        save_checkpoint(folder, self.name, groups, state | plain, keep)

    def restore(self, folder: Path) -> bool:
        """Restore the newest checkpoint in `folder`; False if there is none."""
        found = load_latest(folder)
        if found is None:
            return False
        tensors, state = found
        context, trainable = self.context, self.context.policy.trainable
        check_same(self.identity, state["identity"], context.policy)
        processes = context.accelerator.num_processes
        if processes > 1 and "samples" in tensors:
            raise ValueError(
                f"got {processes} processes for a run that one process stopped in the middle of an epoch; expected one "
                f"process until that epoch ends, or delete its newest checkpoint in {str(folder)!r} to go back"
            )
        trainable.load(tensors.pop("policy"))
        load_optimizer_tensors(context.optimizer, trainable.parameters, tensors.pop("policy_optimizer"))
        if average := context.policy.average:
            average.load(tensors.pop("policy_average"))
        watched = tensors.pop("overoptimisation", None)  # stays on the CPU: it is float64, which not every device has
        on_device = {name: _to(context.policy.device, group) for name, group in tensors.items()}
        self.method.load_state(on_device, state)
        context.epoch, context.micro_batch, self.metrics = state["epoch"], state["micro_batch"], state["metrics"]
        if _watched(state["identity"]) != _watched(self.identity):  # the other reward is watched from here on
            self.metrics = [_without_alarm(line) for line in self.metrics]
        elif watched:
            self.overoptimisation.load(watched, state["overoptimisation"])
        context.progress = _progress_from(on_device, state["updates"], context.own_prompts(context.epoch + 1))
        return True


def _watched(identity: dict[str, Any]) -> Any:
    """The reward that a run with this identity watches, as in its configuration; None for older versions."""
    return identity["settings"].get("overoptimisation", {}).get("reward")


def _without_alarm(metrics: EpochMetrics) -> EpochMetrics:
    return {key: value for key, value in metrics.items() if not key.startswith("overoptimisation/")}


def _tensors_of_progress(progress: Progress) -> dict[str, TensorGroup]:
    """The unfinished epoch as named groups; empty if nothing has been sampled yet."""
    if not progress.parts:
        return {}
    batch = Trajectories.concatenate(progress.parts)
    samples = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    groups = {"samples": samples, "eval_rewards": batch.eval_rewards, "guard_rewards": batch.guard_rewards}
    groups["part_rewards"] = batch.part_rewards
    groups |= {"sums": progress.sums, "maxima": progress.maxima}
    return groups if progress.targets is None else groups | {"targets": progress.targets}


def _progress_from(groups: dict[str, TensorGroup], updates: int, prompts: list[str]) -> Progress:
    """The inverse of `_tensors_of_progress`; `prompts` are those of the epoch."""
    if "samples" not in groups:
        return Progress()
    samples = groups["samples"]
    part = Trajectories(
        prompts=prompts[: len(samples["rewards"])],
        eval_rewards=groups["eval_rewards"],
        guard_rewards=groups.get("guard_rewards", {}),  # older versions have none, nor parts
        part_rewards=groups.get("part_rewards", {}),
        **samples,
    )
    return Progress([part], groups.get("targets"), updates, groups["sums"], groups["maxima"])


def _to(device: Any, group: TensorGroup) -> TensorGroup:
    return {name: tensor.to(device) for name, tensor in group.items()}
