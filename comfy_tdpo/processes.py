"""The processes that train one model together: what they send one another, and how they end together.

Before anything is sent, all say whether they go on. A process that stops or fails says so in place of whatever the
others are waiting for, so that none waits for ever, and all of them stop at the same point of the training.

Shapes: P processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

GOES_ON, STOPS, LACKS, FAILS, LOST = range(5)  # what a process says, from good to bad; that one is LOST, others know
SAVED = (STOPS, LACKS)  # the state of all is whole, and is saved

BUCKET = 2**24  # numbers that are sent at once

_WORDS = {
    STOPS: "another process was stopped",
    LACKS: "a reward of another process failed, and it has said why",
    FAILS: "another process failed, and has said why",
    LOST: "the connection to another process is lost: it was killed, or its machine or the network failed",
}


class Parted(Exception):
    """The processes go on no longer together; why: STOPS, LACKS (a reward), FAILS or LOST; error: what torch raised,
    which is told too, because an earlier error of this GPU may look like a lost connection."""

    def __init__(self, why: int, error: Exception | None = None):
        said = (str(error).splitlines() or [type(error).__name__])[:1] if error else []
        super().__init__(": ".join([_WORDS[why], *said]))
        self.why = why


class Processes:
    """This process and the others. With a single one, nothing is sent.

    parted: whether they have ended their work together; from then on, none says anything any more.
    signs: how many signs of progress this one has given; waiting: whether it waits for the others.
    """

    def __init__(self, accelerator: Accelerator):
        self.device, self.parted = accelerator.device, False
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.signs, self.waiting = 0, False

    def sign(self) -> None:
        """Give a sign of progress; cheap. One that gives none is not waited for much longer, see trainer/lookout.py."""
        self.signs += 1

    def meet(self) -> None:
        """Wait for the others; raises Parted if one of them stops, fails or is lost."""
        self._say(GOES_ON)

    def part(self, why: int) -> None:
        """Tell the others that this process STOPS, LACKS or FAILS; raises Parted if another one's news is worse."""
        self._say(why)

    def _say(self, what: int) -> None:
        if self.count == 1 or self.parted:
            return
        said = torch.tensor([what], dtype=torch.int32, device=self.device)
        with self._connected():
            dist.all_reduce(said, dist.ReduceOp.MAX)
            worst = int(said)
        self.parted = worst != GOES_ON
        if worst > what:
            raise Parted(worst)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        self.sign()
        self.waiting = True
        try:
            yield
        except RuntimeError as error:  # torch and its backends raise no narrower one
            self.parted = True
            raise Parted(LOST, error) from error
        finally:
            self.waiting = False
            self.sign()

    def wait(self) -> None:
        """Wait for the others, even after they have parted."""
        if self.count > 1:
            with self._connected():
                dist.barrier()

    def least(self, value: int) -> int:
        """The smallest `value` of all processes, even after they have parted."""
        if self.count == 1:
            return value
        values = torch.tensor([value], device=self.device)
        with self._connected():
            dist.all_reduce(values, dist.ReduceOp.MIN)
            return int(values)

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, (P N, ...), in the order of their ranks; (N, ...) of each, of the same shape."""
        if self.count == 1:
            return tensor
        self.meet()
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.count)]
        with self._connected():
            dist.all_gather(found, tensor.contiguous())
        return torch.cat(found)

    def own_rows(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor that is shared out, as torch.chunk cuts it; the last may have none."""
        chunks = tensor.chunk(self.count)
        return chunks[self.rank] if self.rank < len(chunks) else tensor[:0]

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count == 1:
            return tensor
        self.meet()
        total = tensor.clone()
        with self._connected():
            dist.all_reduce(total)
        return total

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors of one type by their means over all processes. They are sent together, BUCKET numbers or a
        whole tensor at once."""
        if self.count == 1:
            return
        self.meet()
        bucket: list[Tensor] = []
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            if i + 1 == len(tensors) or sum(map(torch.numel, bucket)) + tensors[i + 1].numel() > BUCKET:
                self._average_at_once(bucket)
                bucket = []

    def _average_at_once(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._connected():
            dist.all_reduce(flat)
        flat /= self.count
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def collect(self, tensor: Tensor) -> Tensor:
        """The rows of all processes on the CPU of the first, in the order of their ranks, even after they have parted;
        (N, ...) of each, with an N of its own. In the other processes it is their own rows."""
        if self.count == 1:
            return tensor
        with self._connected():
            sizes = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([len(tensor)], device=self.device))
        rows = max(1, BUCKET // max(1, prod(tensor.shape[1:])))  # at once
        if self.rank:
            for begin in range(0, len(tensor), rows):
                with self._connected():
                    dist.send(tensor[begin : begin + rows].to(self.device).contiguous(), 0)  # only devices may send
            return tensor
        parts = [tensor.cpu()]
        for rank in range(1, self.count):
            for begin in range(0, int(sizes[rank]), rows):
                size = min(rows, int(sizes[rank]) - begin)
                part = tensor.new_empty(size, *tensor.shape[1:], device=self.device)
                with self._connected():
                    dist.recv(part, rank)
                parts.append(part.cpu())
        return torch.cat(parts)
