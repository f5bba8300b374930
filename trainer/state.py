"""Everything that changes while a run trains, and how it is saved and restored exactly."""

import logging
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_tdpo.memory.running_out import largest_divisor
from comfy_tdpo.methods import Method, TensorGroup
from comfy_tdpo.methods.context import Context, Progress
from comfy_tdpo.optimizers import load_optimizer_tensors, optimizer_tensors
from comfy_tdpo.rollout import LARGEST, Trajectories

from .overoptimisation import Overoptimisation
from .run import EpochMetrics
from .run.checkpoint import Tensors, load_latest, save_checkpoint
from .run.identity import check_same
from .run.paths import epoch_name

logger = logging.getLogger(__name__)

Watch = Callable[[str, float, int], None]  # (phase, done, total); within a micro-batch, `done` has a fraction


OF_MODEL = ("policy", "policy_optimizer", "policy_average", "kl_reference")  # groups of a checkpoint


class TrainState:
    """What a checkpoint holds: the trained weights and their optimizer, the method's state, the run's progress.

    Args:
        context, method, overoptimisation: the training's; identity: what identifies the run, see `identity.identity`.
    """

    def __init__(self, context: Context, method: Method, overoptimisation: Overoptimisation, identity: dict[str, Any]):
        self.context, self.method, self.identity = context, method, identity
        self.overoptimisation = overoptimisation
        self.metrics: list[EpochMetrics] = []  # of the epochs so far

    def unfinished(self) -> Tensors:
        """What there is of an epoch that was stopped, as named groups of all processes, which call this together.

        Empty if there is nothing yet in one of them. Only the first process gets what the others have.
        """
        context, processes = self.context, self.context.processes
        if not processes.least(len(context.progress.parts)):
            return {}
        groups = _tensors_of_progress(context.progress)
        if processes.count > 1:
            groups["samples"]["rows"] = context.rows(context.epoch + 1)[: context.progress.samples]
            for kind in ("sums", "maxima"):  # of a process each
                groups[kind] = {name: value[None] for name, value in groups[kind].items()}
        return {
            group: {name: processes.collect(tensor) for name, tensor in content.items()}
            for group, content in groups.items()
        }

    def _name(self, unfinished: Tensors) -> str:
        """The name of a checkpoint of this state: the run's progress, as a name that sorts."""
        name = epoch_name(self.context.epoch)
        if not unfinished:
            return name
        samples = len(unfinished["samples"]["rewards"])
        return f"{name}-samples-{samples:06d}-updates-{self.context.progress.updates:06d}"

    def save(self, folder: Path, keep: int, unfinished: Tensors) -> None:
        """Write this state as a checkpoint in `folder`, with what there is of an `unfinished` epoch.

        All processes that have a part of the model call this together; the first one writes.
        """
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
            "processes": context.processes.count,
            "micro_batch": context.micro_batch,
            "decode_batch": context.decoder.batch,
            "gradient_checkpointing": context.policy.checkpointing,
            "compile": context.config.compile,
            "scaler": context.scaler.state_dict(),
            "metrics": self.metrics,
            "identity": self.identity,
        }
        groups = self._whole(tensors | of_method) | unfinished
        if watched := self.overoptimisation.tensors():
            groups["overoptimisation"], state["overoptimisation"] = watched, self.overoptimisation.plain()
        if not context.processes.rank:
            save_checkpoint(folder, self._name(unfinished), groups, state | plain, keep)

    def _whole(self, groups: Tensors) -> Tensors:
        """Of a sharded model, the first process gets all rows of the tensors of OF_MODEL."""
        processes = self.context.processes
        if not self.context.policy.trainable.sharded:
            return groups
        processes.meet()
        return groups | _map(groups, processes.collect)

    def _own(self, groups: Tensors) -> Tensors:
        """The inverse of `_whole`."""
        if not self.context.policy.trainable.sharded:
            return groups
        return groups | _map(groups, lambda tensor: self.context.processes.own_rows(tensor).clone())

    def restore(self, folder: Path) -> bool:
        """Restore the newest checkpoint in `folder`; False if there is none."""
        found = load_latest(folder)
        if found is None:
            return False
        tensors, state = found
        context, trainable = self.context, self.context.policy.trainable
        check_same(self.identity, state["identity"], context.policy)
        tensors = self._own(tensors)
        trainable.load(tensors.pop("policy"))
        load_optimizer_tensors(context.optimizer, trainable.parameters, tensors.pop("policy_optimizer"))
        if average := context.policy.average:
            average.load(tensors.pop("policy_average"))
        watched = tensors.pop("overoptimisation", None)  # stays on the CPU: it is float64, which not every device has
        kept = LARGEST if context.in_main_memory else ()
        on_device = {name: _to(context.policy.device, group, kept) for name, group in tensors.items()}
        self.method.load_state(on_device, state)
        context.epoch, self.metrics, together = state["epoch"], state["metrics"], context.config.rows_together
        # older versions have trained pairs with odd numbers
        context.micro_batch = largest_divisor(context.samples_per_update, state["micro_batch"], together)
        context.decoder.batch = state.get("decode_batch", context.decoder.batch)  # older versions have neither
        if state.get("gradient_checkpointing") and not context.policy.checkpointing:
            context.policy.turn_on_checkpointing()
        if context.scaler.is_enabled():
            context.scaler.load_state_dict(state["scaler"])
        if _watched(state["identity"]) != _watched(self.identity):  # the other reward is watched from here on
            self.metrics = [_without_alarm(line) for line in self.metrics]
        elif watched:
            self.overoptimisation.load(watched, state["overoptimisation"])
        if "samples" in on_device:
            context.progress = self._progress_from(on_device, state)
        return True

    def _progress_from(self, groups: Tensors, state: dict[str, Any]) -> Progress:
        """The inverse of `unfinished`; `state`: of the checkpoint.

        Raises:
            ValueError: samples that were drawn by compiled blocks are to be trained on by others, or the reverse.
        """
        context, epoch, samples = self.context, self.context.epoch + 1, dict(groups["samples"])
        count, rank, updates = context.processes.count, context.processes.rank, state["updates"]
        before, compiled = state.get("processes", 1), state.get("compile", False)  # older versions have neither
        rows = samples.pop("rows", torch.arange(len(samples["rewards"]))).cpu()
        if compiled != context.config.compile and "targets" in groups:
            now, then = (str(value).lower() for value in (context.config.compile, compiled))
            raise ValueError(
                f"got compile {now} for a run that was stopped in the updates of epoch {epoch} with compile {then}, "
                f"whose arithmetic its samples have; expected the same until it has ended: set compile to {then}"
            )
        changed = {"processes": (before, count), "compile": (compiled, context.config.compile)}
        changes = [f"{name} {old}, and resumes with {new}" for name, (old, new) in changed.items() if old != new]
        if changes and "targets" not in groups and not updates:
            if not rank:
                told = " and ".join(changes).lower()
                logger.warning("the run was stopped while sampling with %s: epoch %d starts over", told, epoch)
            return Progress()
        places = rows.argsort()  # in the order of samples
        own = places[torch.isin(rows[places], context.rows(epoch))]
        if context.policy.trainable.sharded:  # all processes must call the network equally often
            own = own[: context.processes.least(len(own))]

        def share(group: str) -> TensorGroup:
            return {name: tensor[own] for name, tensor in groups.get(group, {}).items()}  # older versions lack some

        def reduced(group: str, mean: Callable[[Tensor], Tensor]) -> TensorGroup:
            if before == 1:
                return groups[group]
            return {name: values[rank] if count == before else mean(values) for name, values in groups[group].items()}

        part = Trajectories(
            prompts=context.own_prompts(epoch)[: len(own)],
            eval_rewards=share("eval_rewards"),
            guard_rewards=share("guard_rewards"),
            part_rewards=share("part_rewards"),
            **{name: tensor[own] for name, tensor in samples.items()},
        )
        sums, maxima = reduced("sums", lambda values: values.mean(0)), reduced("maxima", lambda values: values.amax(0))
        return Progress([part], share("targets") if "targets" in groups else None, updates, sums, maxima)


def _map(groups: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    """Those of OF_MODEL, changed but for counts."""
    return {
        group: {name: change(tensor) if tensor.ndim else tensor for name, tensor in groups[group].items()}
        for group in OF_MODEL
        if group in groups
    }


def _watched(identity: dict[str, Any]) -> Any:
    """The reward that a run with this identity watches, as in its configuration; None for older versions."""
    return identity["settings"].get("overoptimisation", {}).get("reward")


def _without_alarm(metrics: EpochMetrics) -> EpochMetrics:
    return {key: value for key, value in metrics.items() if not key.startswith("overoptimisation/")}


def _tensors_of_progress(progress: Progress) -> dict[str, TensorGroup]:
    """The unfinished epoch as named groups, once something has been sampled."""
    batch = Trajectories.concatenate(progress.parts)
    samples = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    groups = {"samples": samples, "eval_rewards": batch.eval_rewards, "guard_rewards": batch.guard_rewards}
    groups["part_rewards"] = batch.part_rewards
    groups |= {"sums": progress.sums, "maxima": progress.maxima}
    return groups if progress.targets is None else groups | {"targets": progress.targets}


def _to(device: Any, group: TensorGroup, kept: Collection[str]) -> TensorGroup:
    """The tensors on `device`, but those of names that are `kept` on the CPU."""
    return {name: tensor if name in kept else tensor.to(device) for name, tensor in group.items()}
