"""A replay buffer: samples of earlier epochs, on which the policy is trained again beside the new ones.

A reset of the policy's neurons forgets what they had learned, and arXiv 2402.08552 leaves replayed samples, as a
remedy, to future work. DPOK (arXiv 2305.16381) replays the samples of the rollout before.

The importance weight of a replayed pair is the ratio rho of Eq. 8, between the policy now and the policy that drew the
sample, and it is clipped like that of a new pair. For a policy that has not changed it is 1, and the gradient is that
on new samples. Otherwise, a good sample has a gradient unless it is more likely than when it was drawn, by more than
the clip range, and a bad one unless it is less likely. So replaying restores what was lost, and goes no further.

The weight is approximate. The log of rho is a mean over C * H * W elements; the exact weight of a step is rho to the
power of C * H * W, which after a few nats is almost 0 or far too large. How likely the state itself has become is left
out.

Shapes: N samples of an epoch in this process, B of all processes, R epochs kept, T denoising steps, M rows of one
gradient update, K steps of each.
"""

import torch
from torch import Tensor

from ..randomness import Coordinates, generator_at
from ..rollout import Trajectories
from ..swapping import brought
from . import TensorGroup
from .context import Context


class Replay:
    """The samples of the latest epochs, of all processes.

    A row of an update stands for one of this process's N new samples, or, from N on, for one of those kept.

    samples: latents, log_probs, temporal_rewards and, with the KL in the loss, kl_weight, and the reference's means if
        the method has measured them: (R * B, ...), oldest first; epochs, int64 (R * B,): when they were drawn.
    prompts: of the same.
    """

    def __init__(self, context: Context):
        self.context, self.config = context, context.config
        self.samples: TensorGroup = {}
        self.prompts: list[str] = []
        self.replayed = round(self.config.policy.replay_share * self.config.samples_per_update)
        processes = context.processes.count
        if self.config.policy.replay and self.replayed % processes:
            raise ValueError(
                f"got policy.replay_share {self.config.policy.replay_share:g}, {self.replayed} replayed samples in an "
                f"update, for {processes} processes; expected a multiple of {processes}: change policy.replay_share or "
                "samples_per_update"
            )

    def extend(self, rows: Tensor, steps: Tensor, epoch: int, update: int) -> tuple[Tensor, Tensor]:
        """This process's share of an update, rows (M,) and the steps of each (M, K), followed by samples drawn from the
        buffer. These take the steps of the first new ones, because the order of steps may matter.

        rows, steps: those of the update in all processes.
        """
        share = self.context.share
        own_rows, own_steps = self.context.local(share(rows), epoch), share(steps)
        available = min(self.config.policy.replay, epoch - 1) * self.config.samples_per_epoch
        if not available:
            return own_rows, own_steps
        draw = generator_at(self.config.seed, "replay", epoch, update, 0)
        kept = self.context.samples + torch.randint(available, (self.replayed,), generator=draw)
        return torch.cat([own_rows, share(kept)]), torch.cat([own_steps, share(steps[: self.replayed])])

    def pick(self, name: str, new: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
        """The values of `rows` at `steps`, (M,) each: of new samples, which come first, from `new`, (N, T, ...), and of
        the others from the buffer."""
        count = self.new(rows)
        found = new[rows[:count], steps[:count]]
        if count < len(rows):
            found = torch.cat([found, self.samples[name][rows[count:] - self.context.samples, steps[count:]]])
        return brought(found, self.context.policy.device)

    def new(self, rows: Tensor) -> int:
        """How many of the rows are new samples."""
        return int((rows < self.context.samples).sum())

    def prompt(self, batch: Trajectories, row: int) -> str:
        size = self.context.samples
        return batch.prompts[row] if row < size else self.prompts[row - size]

    def noise_of(self, row: int) -> Coordinates:
        """The coordinates of the noise with which a sample was drawn."""
        if row < self.context.samples:
            return self.context.noise_of(row)
        index = row - self.context.samples
        epoch, place = int(self.samples["epochs"][index]), index % self.config.samples_per_epoch
        return (self.config.seed, "noise", epoch, place)

    def add(self, batch: Trajectories, targets: TensorGroup) -> None:
        """Keep an epoch's samples, and drop those of the oldest epoch if there are too many."""
        epochs = self.config.policy.replay
        if not epochs:
            return
        kept = {"latents": batch.latents, "log_probs": batch.log_probs}
        kept |= {name: targets[name] for name in ("temporal_rewards", "kl_weight") if name in targets}
        if batch.reference_means is not None:
            kept["reference_means"] = batch.reference_means
        added = {name: self._gathered(tensor.contiguous()) for name, tensor in kept.items()}
        added["epochs"] = torch.full_like(added["log_probs"][:, 0], self.context.epoch + 1, dtype=torch.int64)
        old = {name: self.samples.get(name, new[:0]) for name, new in added.items()}
        begin = max(0, len(old["epochs"]) - (epochs - 1) * len(added["epochs"]))
        self.load({name: torch.cat([old[name][begin:], new]) for name, new in added.items()})

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The samples of all processes, which are exchanged between devices, where `tensor` is."""
        if self.context.processes.count == 1:
            return tensor
        return self.context.gather(brought(tensor, self.context.policy.device)).to(tensor.device)

    def load(self, samples: TensorGroup) -> None:
        self.samples, self.prompts = samples, []
        if samples:
            drawn = samples["epochs"][:: self.config.samples_per_epoch].tolist()
            self.prompts = [prompt for epoch in drawn for prompt in self.context.prompts(epoch)]
