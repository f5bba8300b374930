"""MemoryBudget: how many rows fit where.

The peak of each phase is measured with one row and with two, from below, and is taken to grow along that line. What
autograd would keep of one row is counted before any of it is kept, so that the first backward pass does not run out of
memory either.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from ..counts import number_of
from ..policy import DiffusionPolicy
from .gauges import Gauge
from .running_out import (
    largest_divisor,
    out_of_memory,
    smaller_decode_batch,
    smaller_micro_batch,
    within_memory,
)

CPU_MICRO_BATCH = 16  # default on a CPU: larger is no faster, and running out of RAM raises no error to catch
MARGIN = 0.1  # of the free memory: for gaps between the allocator's blocks, and kernels' work space, which has jumps
SHARE = 0.1  # of the free memory: trajectories that would take more are kept in main memory
GIB = 2**30


def first_micro_batch(configured: int | None, samples_per_update: int, device: torch.device, together: int = 1) -> int:
    """The largest micro-batch allowed: as configured, otherwise CPU_MICRO_BATCH on a CPU or the whole update."""
    limit = configured or (CPU_MICRO_BATCH if device.type == "cpu" else samples_per_update)
    return largest_divisor(samples_per_update, limit, together)


def bytes_of_trajectories(config: Any, policy: DiffusionPolicy, samples: int) -> int:
    """The bytes of the latents of an epoch's samples in this process and of those that are replayed, and of the
    reference's means beside them, see `KLPenalty.measure`. What is joined last of an epoch's samples is copied."""
    steps, replayed = len(policy.process), getattr(config.policy, "replay", 0) * config.samples_per_epoch
    kl = getattr(config, "kl", None)
    means = steps if kl is not None and kl.measures_afterwards(policy.kl_reference) else 0
    kept = steps + 1 + means
    return (samples * (kept + (means or steps + 1)) + replayed * kept) * policy.latent_size * 4


def better_in_main_memory(trajectories: int, free: int) -> bool:
    """Whether `trajectories` of so many bytes would take too much of the `free` ones on a GPU."""
    return trajectories > SHARE * free


class Rehearsal(Protocol):
    """The phases of an epoch, each with a given number of rows and without a result.

    checkpointing: whether gradient checkpointing is on.
    """

    @property
    def checkpointing(self) -> bool: ...

    def with_rewards(self) -> AbstractContextManager[None]:
        """Inside the block, all that scores images is on the device."""
        ...

    def updating(self) -> AbstractContextManager[None]:
        """Inside the block, what updates do without is not on the device."""
        ...

    def sample(self, rows: int) -> None: ...

    def train(self, rows: int) -> None: ...

    def score(self, rows: int) -> None: ...

    def decode(self, rows: int) -> None: ...

    def kept(self) -> int:
        """The bytes that autograd would keep of one row in training."""
        ...

    def turn_on_checkpointing(self) -> None: ...


class Need(NamedTuple):
    """The peak of a phase beyond what is held before it, in bytes: of the first row, and what each further row adds."""

    first: int
    more: int

    def rows(self, room: int) -> int:
        """How many rows fit into `room` bytes."""
        return 0 if self.first > room else 1 + (room - self.first) // max(self.more, 1)

    def less(self, freed: int) -> "Need":
        """What it takes of a room in which `freed` bytes are not counted that are free for it too."""
        return self if self == NO_ROOM else self._replace(first=self.first - int(freed * (1 - MARGIN)))

    def told(self) -> str:
        if self == NO_ROOM:
            return "more than there is"
        return _size(self.first) + (f" and each further one {_size(self.more)}" if self.more != self.first else "")


NO_ROOM = Need(sys.maxsize, sys.maxsize)  # memory ran out with one row


class Choice(NamedTuple):
    """micro_batch: rows of each forward pass in sampling and training; decode_batch: images decoded at once."""

    micro_batch: int
    decode_batch: int
    checkpointing: bool


class MemoryBudget:
    """Chooses how many rows go through at once.

    Sampling and training get equally many, as the ratio of a fresh sample is 1 to the last bit only then.

    Args:
        gauge: of the device; samples_per_update: of which the micro-batch is a divisor.
        micro_batch, decode_batch: the largest allowed.
        reserve: bytes that the epoch will hold besides: the optimizer's moments, the trajectories.
        in_main_memory: bytes of trajectories that are kept there instead.
        together: of which micro-batches are multiples, as sdpo's are of pairs.
    """

    def __init__(
        self,
        gauge: Gauge,
        samples_per_update: int,
        micro_batch: int,
        decode_batch: int,
        reserve: int = 0,
        in_main_memory: int = 0,
        together: int = 1,
    ):
        self.gauge, self.samples_per_update, self.reserve = gauge, samples_per_update, reserve
        self.in_main_memory, self.together = in_main_memory, together
        self.micro_batch, self.decode_batch = micro_batch, decode_batch

    def settle(self, rehearsal: Rehearsal, training: bool = True) -> tuple[Choice, str]:
        """What was chosen, and one line that says why; the line is empty where nothing can be measured.

        Gradient checkpointing is turned on if one row does not fit without it. `training`: whether anything is trained.

        Raises:
            ValueError: there is no room for one row.
        """
        if not self.gauge.exact:
            return self._tried(rehearsal, training), ""
        with rehearsal.with_rewards():
            free = self.gauge.free()
        room = self.room(free)
        sampling, scoring = self.need(rehearsal.sample, room), self.need(rehearsal.score, room)
        decoding = self.need(rehearsal.decode, room)
        needs, largest, why = [sampling, scoring], scoring, ""
        if training and NO_ROOM not in needs:
            largest, freed, why = self._updating(rehearsal, sampling, free)
            needs.append(largest.less(freed))
        if NO_ROOM in needs or any(need.rows(room) < self.together for need in needs if self.together > 1):
            smaller_micro_batch(self.together, self.samples_per_update, self.together)  # raises
        if decoding == NO_ROOM:
            smaller_decode_batch(1)  # raises
        choice = self.choose(room, needs, decoding, rehearsal.checkpointing)
        if self.in_main_memory:
            why += f"; the trajectories, {_size(self.in_main_memory)}, are kept in main memory"
        held = "optimizer" if self.in_main_memory else "optimizer and trajectories"
        told = (
            f"memory: {_size(free)} are free, {_size(self.reserve)} of them for {held}; "
            f"{choice.micro_batch} of {number_of(self.samples_per_update, 'sample')} at once, of which one takes "
            f"{largest.told()}, and {number_of(choice.decode_batch, 'image')} decoded at once, of which one takes "
            f"{decoding.told()}{why}"
        )
        return choice, told

    def _updating(self, rehearsal: Rehearsal, sampling: Need, free: int) -> tuple[Need, int, str]:
        """What training takes of a device with `free` bytes, how many more leave it meanwhile, and what to say of both.

        Turns gradient checkpointing on if need be.
        """
        held, why = self.gauge.held(), ""
        with rehearsal.updating():
            freed = held - self.gauge.held()
            room = self.room(free + freed)
            kept = 0 if rehearsal.checkpointing else sampling.first + rehearsal.kept()
            found = self.need(rehearsal.train, room) if kept <= room else Need(kept, kept)
            if found.rows(room) < self.together and not rehearsal.checkpointing:
                why = f", with gradient checkpointing, without which one sample takes {found.told()}"
                rehearsal.turn_on_checkpointing()
                found = self.need(rehearsal.train, room)
        if freed:
            why += f"; the rewards, {_size(freed)}, are in main memory during updates"
        return found, freed, why

    def room(self, free: int) -> int:
        """How many of the `free` bytes a phase may take."""
        return int(free * (1 - MARGIN)) - self.reserve

    def choose(self, room: int, needs: list[Need], decoding: Need, checkpointing: bool) -> Choice:
        """As many rows as fit into `room` in each phase, at least `together`.

        needs: of the phases that take micro-batches.
        """
        rows = min(self.micro_batch, *(need.rows(room) for need in needs))
        images = min(self.decode_batch, decoding.rows(room))
        rows = largest_divisor(self.samples_per_update, rows, self.together)
        return Choice(rows, max(images, 1), checkpointing)

    def need(self, work: Callable[[int], None], room: int = sys.maxsize) -> Need:
        """Measure `work`, with two rows only if these fit into `room`."""
        try:
            work(1)  # what a device loads and chooses the first time is not counted
            return need_of(self.gauge, work, room)
        except Exception as error:
            if not out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        return NO_ROOM

    def _tried(self, rehearsal: Rehearsal, training: bool) -> Choice:
        """Where memory cannot be measured: the largest that does not run out of it in training."""

        def shrink() -> None:
            self.micro_batch = smaller_micro_batch(self.micro_batch, self.samples_per_update, self.together)

        if training:
            with rehearsal.updating():
                within_memory(lambda: rehearsal.train(self.micro_batch), shrink)
        return Choice(self.micro_batch, self.decode_batch, rehearsal.checkpointing)


def need_of(gauge: Gauge, work: Callable[[int], None], room: int = sys.maxsize) -> Need:
    """Measure `work` with one row, and with two if these fit into `room`."""
    first = peak_of(gauge, work, 1)
    return Need(first, max(peak_of(gauge, work, 2) - first, 1) if 2 * first <= room else first)


def peak_of(gauge: Gauge, work: Callable[[int], None], rows: int) -> int:
    """The peak of `work` with that many rows, beyond what is held before it."""
    before = gauge.held()
    gauge.reset()
    work(rows)
    return gauge.peak() - before


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
