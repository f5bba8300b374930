"""The logs of neurons: a JSON line per epoch in the run's folder, beside its metrics.

Each neuron of the critic has its score there; of the policy, which may have a million, each layer has its counts.
Shapes: H neurons of a layer.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

NEURONS, POLICY_NEURONS = "neurons.jsonl", "policy_neurons.jsonl"


@dataclass(frozen=True)
class NeuronRecord:
    """One epoch. scores: layer -> (H,) mean activation relative to the layer's; reset: layer -> reset neurons."""

    epoch: int
    scores: dict[str, list[float]]
    reset: dict[str, list[int]]

    @property
    def reset_count(self) -> int:
        return sum(map(len, self.reset.values()))


@dataclass(frozen=True)
class LayerRecord:
    """One epoch. count, dormant, reset: layer -> how many neurons it has, are dormant, and were reset."""

    epoch: int
    count: dict[str, int]
    dormant: dict[str, int]
    reset: dict[str, int]


Record = TypeVar("Record", NeuronRecord, LayerRecord)


def append_neurons(folder: Path, epoch: int, scores: Mapping[str, Tensor], reset: Mapping[str, Tensor]) -> None:
    """Append an epoch's scores of the critic, (H,) per layer, and the masks of the neurons reset in it."""
    rounded = {name: [round(score, 4) for score in layer.tolist()] for name, layer in scores.items()}
    which = {name: mask.nonzero().flatten().tolist() for name, mask in reset.items()}
    _append(folder / NEURONS, NeuronRecord(epoch, rounded, which))


def append_policy_neurons(folder: Path, epoch: int, active: Mapping[str, Tensor], reset: Mapping[str, Tensor]) -> None:
    """Append how many of the policy's neurons are dormant and were reset, from masks, boolean (H,) per layer."""
    count = {name: len(mask) for name, mask in active.items()}
    dormant = {name: int((~mask).sum()) for name, mask in active.items()}
    was_reset = {name: int(mask.sum()) for name, mask in reset.items()}
    _append(folder / POLICY_NEURONS, LayerRecord(epoch, count, dormant, was_reset))


def read_neurons(folder: Path, epochs: int) -> list[NeuronRecord]:
    """The critic's records of the first `epochs` epochs, as far as they exist."""
    return _read(folder / NEURONS, NeuronRecord, epochs)


def read_policy_neurons(folder: Path, epochs: int) -> list[LayerRecord]:
    """The policy's records of the first `epochs` epochs, as far as they exist."""
    return _read(folder / POLICY_NEURONS, LayerRecord, epochs)


def _append(path: Path, record: NeuronRecord | LayerRecord) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def _read(path: Path, kind: type[Record], epochs: int) -> list[Record]:
    """An epoch repeated after a stop has two lines, of which the last counts; a line cut off mid-write is skipped."""
    records: dict[int, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = kind(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        records[record.epoch] = record
    return [records[epoch] for epoch in sorted(records) if epoch <= epochs]
