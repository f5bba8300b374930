"""The networks of rewards, and where they are: in main memory while a training does without them, otherwise on their
device.

A training and a node of the graph may share an encoder (see `shared_while_used`), each on a thread of its own. So those
who need a network are counted. It leaves when a training does without it and nobody needs it; whoever needs it next
brings it back.

The weights are frozen, so the copy in main memory is made once and kept, and only the way back is a copy. It is not
pinned: a run comes back once an epoch, and pinning would save less than a second of it and take RAM for good.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from threading import Lock
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from . import RewardModel, WeightedSum

STAYING = ("cpu", "mps")  # devices that networks do not leave: Apple's GPUs have no memory of their own


def networks_of(reward: RewardModel) -> list[nn.Module]:
    """The networks of a reward, of the reward that it reads through, or of the parts of a sum."""
    if isinstance(reward, WeightedSum):
        return [network for model, _, _ in reward.parts for network in networks_of(model)]
    found: list[nn.Module] = []
    for value in vars(reward).values():
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, RewardModel):
            found += networks_of(value)
    return found


@contextmanager
def needed(rewards: Iterable[RewardModel]) -> Iterator[None]:
    """Inside the block, the networks of `rewards` are on their device, also for a backward pass through them."""
    with ExitStack() as stack:
        for network, place in _places_of(rewards):
            stack.enter_context(place.needed(network))
        yield


@contextmanager
def unneeded(rewards: Iterable[RewardModel]) -> Iterator[None]:
    """Inside the block, the networks of `rewards` are in main memory, except while somebody needs them.

    Afterwards they are still there; whoever needs them next brings them back.
    """
    with ExitStack() as stack:
        for network, place in _places_of(rewards):
            stack.enter_context(place.unneeded(network))
        yield


class _Place:
    """Where a network is, and how many need it or do without it; changed under the lock alone.

    device: its own; copies: its weights in main memory, in the order in which `nn.Module._apply` comes to them.
    """

    def __init__(self, device: torch.device):
        self.device, self.copies = device, list[Tensor]()
        self.here, self.needs, self.without = True, 0, 0

    @contextmanager
    def needed(self, network: nn.Module) -> Iterator[None]:
        with _lock:
            if not self.here:
                self._bring(network)
            self.needs += 1
        try:
            yield
        finally:
            with _lock:
                self.needs -= 1
                self._settle(network)

    @contextmanager
    def unneeded(self, network: nn.Module) -> Iterator[None]:
        with _lock:
            self.without += 1
        try:
            with _lock:
                self._settle(network)
            yield
        finally:
            with _lock:
                self.without -= 1

    def _settle(self, network: nn.Module) -> None:
        if self.here and self.without and not self.needs and (self.copies or _has_room(network)):
            self._take_away(network)

    @torch.inference_mode(False)  # which ComfyUI's nodes may be in, and a training could not use what is made in it
    def _take_away(self, network: nn.Module) -> None:
        if not self.copies:
            copies: list[Tensor] = []

            def copied(weight: Tensor) -> Tensor:
                copies.append(weight.to("cpu"))
                return weight

            network._apply(copied)
            self.copies = copies
        kept = iter(self.copies)
        network._apply(lambda weight: next(kept))
        self.here = False

    @torch.inference_mode(False)
    def _bring(self, network: nn.Module) -> None:
        try:
            network.to(self.device)
        except BaseException:  # such as running out of memory halfway
            self._take_away(network)
            raise
        self.here = True


def _has_room(network: nn.Module) -> bool:
    """Whether main memory has room for a copy, and for as much again."""
    size = sum(weight.nbytes for weight in chain(network.parameters(), network.buffers()))
    return 2 * size < psutil.virtual_memory().available


_lock = Lock()
_places: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()


def _places_of(rewards: Iterable[RewardModel]) -> list[tuple[nn.Module, _Place]]:
    """The networks that have a place to leave."""
    with _lock:
        found = ((network, _place_of(network)) for reward in rewards for network in networks_of(reward))
        return [(network, place) for network, place in found if place is not None]


def _place_of(network: nn.Module) -> _Place | None:
    if network not in _places:
        weight = next(chain(network.parameters(), network.buffers()), None)
        if weight is None or weight.device.type in STAYING:
            return None
        _places[network] = _Place(weight.device)
    return _places[network]
