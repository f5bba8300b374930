"""What the trainer gives its method: the model, the rewards, the progress of the epoch, and helpers for updates.

Shapes: N samples of an epoch in this process, B of all P processes, M rows of one gradient update.

With several processes, each draws the samples that it is to train on: an equal share of every update, whose samples are
those of a single process. So any number of processes makes the same updates, and no sample is sent to another process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..memory.running_out import smaller_micro_batch, within_memory
from ..policy import DiffusionPolicy
from ..processes import Processes
from ..randomness import Coordinates
from ..rewards import RewardModel
from ..rollout import Decoder, Trajectories
from . import TensorGroup

Result = TypeVar("Result")

UNSCALED = torch.amp.GradScaler("cpu", enabled=False)  # leaves everything as it is


@dataclass
class Progress:
    """The progress of an epoch: its samples, then their targets, then its updates.

    updates: how many are done; sums: metrics summed over them; maxima: metrics of which the maximum is kept;
    times: seconds spent.
    """

    parts: list[Trajectories] = field(default_factory=list)
    targets: TensorGroup | None = None
    updates: int = 0
    sums: TensorGroup = field(default_factory=dict)
    maxima: TensorGroup = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=lambda: {"sample": 0.0, "train": 0.0})

    @property
    def samples(self) -> int:
        return sum(map(len, self.parts))

    def batch(self) -> Trajectories:
        """All samples so far as one object."""
        if len(self.parts) > 1:
            self.parts = [Trajectories.concatenate(self.parts)]
        return self.parts[0]


@dataclass
class Context:
    """A run, as its method sees it.

    config: all settings, including the method's own.
    policy: the model in training; optimizer: that of its parameters.
    decoder: decodes latents to images, a few at a time.
    processes: this one and the others.
    reward, eval_rewards, guards: the training reward, the held-out rewards and the guards; further_rewards: others,
        added by a method that reads through their encoders.
    samples, samples_per_update: N and M, in this process.
    micro_batch: rows in each forward pass, reduced when memory runs out.
    prompts: for a given epoch, one prompt per sample of all processes; all_prompts: those it draws from.
    order: for a given epoch, the order in which the updates take the samples of all processes, int64 (B,); set by a
        method that does not take them as they come.
    check: called between forward passes; if it raises, everything is left as after the last complete update.
    watch: sees the progress, called with (phase, done, total); see `begin`.
    record: stores an epoch's record of the critic's neurons, called with (epoch, scores, masks of the reset neurons).
    record_policy: the same of the policy's, called with (epoch, masks of the active neurons, masks of the reset ones).
    epoch: number of finished epochs.
    in_main_memory: whether the latents of an epoch are kept in main memory, and not on the device.
    scaler: of the policy's loss, whose gradients would be lost in fp16 without; the critic's arithmetic is fp32.
    """

    config: Any
    policy: DiffusionPolicy
    optimizer: torch.optim.Optimizer
    decoder: Decoder
    reward: RewardModel
    eval_rewards: dict[str, RewardModel]
    processes: Processes
    samples: int
    samples_per_update: int
    micro_batch: int
    prompts: Callable[[int], list[str]]
    check: Callable[[], None]
    record: Callable[[int, TensorGroup, TensorGroup], None]
    record_policy: Callable[[int, TensorGroup, TensorGroup], None]
    order: Callable[[int], Tensor] | None = None
    epoch: int = 0
    in_main_memory: bool = False
    progress: Progress = field(default_factory=Progress)
    guards: dict[str, RewardModel] = field(default_factory=dict)
    further_rewards: list[RewardModel] = field(default_factory=list)
    all_prompts: list[str] = field(default_factory=list)
    watch: Callable[[str, float, int], None] = lambda phase, done, total: None
    scaler: torch.amp.GradScaler = UNSCALED
    _piece: tuple[str, int, int, int] = ("", 0, 0, 0)
    _shared_out: tuple[int, Tensor] | None = None

    @property
    def rewards(self) -> list[RewardModel]:
        """All of them."""
        return [self.reward, *self.eval_rewards.values(), *self.guards.values(), *self.further_rewards]

    # --- progress

    def begin(self, phase: str, done: int, size: int, total: int) -> None:
        """Begin `size` of the `total` samples or updates of a phase, of which `done` are done."""
        self._piece = phase, done, size, total
        self.watch(phase, done, total)

    def tell(self, share: float) -> None:
        """Tell which share of what was begun is done, from 0 to 1; cheap enough to be called for every forward pass."""
        phase, done, size, total = self._piece
        self.watch(phase, done + share * size, total)

    def wait(self, text: str) -> None:
        """Tell what is waited for, in place of the phase, until what was begun goes on."""
        _, done, _, total = self._piece
        self.watch(text, done, total)

    # --- samples

    def draws(self, rows: range) -> tuple[list[str], list[Coordinates]]:
        """Prompts and noise coordinates for the given rows, out of this process's N, in the current epoch."""
        prompts = self.own_prompts(self.epoch + 1)
        return [prompts[row] for row in rows], [self.noise_of(row) for row in rows]

    def own_prompts(self, epoch: int) -> list[str]:
        """The prompts of this process's N samples."""
        prompts = self.prompts(epoch)
        return [prompts[row] for row in self.rows(epoch).tolist()]

    def noise_of(self, row: int) -> Coordinates:
        """The coordinates of the noise of one row."""
        return (self.config.seed, "noise", self.epoch + 1, int(self.rows(self.epoch + 1)[row]))

    # --- several processes

    def rows(self, epoch: int) -> Tensor:
        """Which of an epoch's B samples are this process's, ascending, int64 (N,)."""
        return self._rows_of_all(epoch)[self.processes.rank]

    def _rows_of_all(self, epoch: int) -> Tensor:
        """The same of every process, (P, N)."""
        if self._shared_out is None or self._shared_out[0] != epoch:
            processes = self.processes.count
            order = self.order(epoch) if self.order else torch.arange(processes * self.samples)
            shares = order.view(-1, processes, self.samples_per_update).transpose(0, 1)
            self._shared_out = epoch, shares.reshape(processes, -1).sort(dim=1).values
        return self._shared_out[1]

    def share(self, rows: Tensor) -> Tensor:
        """This process's share of what belongs to an update, (P m, ...) -> (m, ...)."""
        return rows.chunk(self.processes.count)[self.processes.rank]

    def local(self, rows: Tensor, epoch: int) -> Tensor:
        """The places of samples, int64 and all of this process, among its own."""
        return torch.searchsorted(self.rows(epoch), rows)

    def gather(self, tensor: Tensor) -> Tensor:
        """The samples of all processes, (B, ...), in the order in which one process draws them, from its own N."""
        if self.processes.count == 1:
            return tensor
        return self.processes.gather(tensor)[self._rows_of_all(self.epoch + 1).flatten().argsort()]

    def own(self, tensor: Tensor) -> Tensor:
        """This process's N samples out of those of all processes."""
        return tensor[self.rows(self.epoch + 1)]

    # --- metrics of updates

    def add(self, name: str, value: Tensor) -> None:
        """Add `value` to a metric that is averaged over the epoch's updates."""
        self.progress.sums[name] = self.progress.sums.get(name, 0) + value.detach()

    def raise_to(self, name: str, value: Tensor) -> None:
        """Raise a metric to `value` if that is larger; the epoch reports the maximum."""
        value = value.detach()
        self.progress.maxima[name] = torch.maximum(self.progress.maxima.get(name, value), value)

    # --- updates

    def update_policy(self, rows: int, accumulate: Callable[[slice], Result]) -> list[Result]:
        """One gradient update of the policy on `rows` rows, one micro-batch at a time.

        `accumulate` backpropagates the contribution of a slice of the rows to the loss, and adds its metrics. If memory
        runs out, the update starts over with a smaller micro-batch. Returns what `accumulate` returned for each
        micro-batch, without those of attempts that ran out of memory.
        """
        progress = self.progress
        before = dict(progress.sums), dict(progress.maxima)

        def attempt() -> list[Result]:
            self.optimizer.zero_grad()
            results: list[Result] = []
            try:
                size = self.micro_batch
                for begin in range(0, rows, size):
                    self.check()
                    if begin:
                        self.tell(begin / rows)
                    results.append(accumulate(slice(begin, min(begin + size, rows))))
                self.processes.meet()  # where another one was stopped, this one has not done the update either
                return results
            except BaseException:  # after a stop, too, the metrics must not hold half an update
                progress.sums, progress.maxima = dict(before[0]), dict(before[1])
                raise

        results = within_memory(attempt, self.shrink)
        skipped = self.step(self.optimizer, self.config.policy.max_grad_norm, self.scaler)
        if self.scaler.is_enabled():
            self.add("policy/skipped_fraction", torch.tensor(float(skipped), device=self.policy.device))
        if self.policy.average and not skipped:
            self.policy.average.update()
        return results

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the policy's loss; inside `accumulate`."""
        self.scaler.scale(loss).backward()

    def shrink(self) -> None:
        """Lower the micro-batch; raises ValueError as `fewer` does."""
        self.micro_batch = self.fewer(self.micro_batch)

    def fewer(self, rows: int) -> int:
        """How many rows to try after `rows` ran out of memory.

        Raises:
            ValueError: it was the fewest that there can be, or all processes would have to take fewer.
        """
        if self.policy.trainable.sharded:
            raise ValueError(
                f"got out of memory with micro_batch {rows} and policy.shard; expected room on every GPU: set "
                "micro_batch to less, policy.gradient_checkpointing to true, or use more processes"
            )
        return smaller_micro_batch(rows, self.samples_per_update, self.config.rows_together)

    def step(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float, scaler: torch.amp.GradScaler = UNSCALED
    ) -> bool:
        """Apply the gradients, averaged over processes and clipped to the given norm.

        Returns whether they were left out instead, since they were infinite at the scale of `scaler`.
        """
        parameters, scale = optimizer.param_groups[0]["params"], scaler.get_scale()
        if self.policy.trainable.sharded and optimizer is self.optimizer:
            self._clip_sharded(parameters, max_grad_norm)
        else:
            self.processes.average([parameter.grad for parameter in parameters])
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale() < scale

    def _clip_sharded(self, parameters: list[nn.Parameter], max_grad_norm: float) -> None:
        """Clip gradients, averaged already, of which each process has its own rows."""
        own = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = self.processes.add_up(own**2).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
