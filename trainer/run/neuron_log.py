"""The log of the critic's neurons: one JSON line per epoch in the run's folder, beside its metrics.

Shapes: H neurons of a layer.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

NEURONS = "neurons.jsonl"


@dataclass(frozen=True)
class NeuronRecord:
    """One epoch. scores: layer -> (H,) mean activation relative to the layer's; reset: layer -> reset neurons."""

    epoch: int
    scores: dict[str, list[float]]
    reset: dict[str, list[int]]

    @property
    def reset_count(self) -> int:
        return sum(map(len, self.reset.values()))


def append_neurons(folder: Path, epoch: int, scores: dict[str, Tensor], reset: dict[str, Tensor]) -> None:
    """Append an epoch's scores, (H,) per layer, and the masks of the neurons reset in it."""
    line = {
        "epoch": epoch,
        "scores": {name: [round(score, 4) for score in layer.tolist()] for name, layer in scores.items()},
        "reset": {name: mask.nonzero().flatten().tolist() for name, mask in reset.items()},
    }
    with (folder / NEURONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_neurons(folder: Path, epochs: int) -> list[NeuronRecord]:
    """The records of the first `epochs` epochs, as far as they exist.

    An epoch repeated after a stop has two lines, of which the last counts; a line cut off mid-write is skipped.
    """
    path = folder / NEURONS
    records: dict[int, NeuronRecord] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = NeuronRecord(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        records[record.epoch] = record
    return [records[epoch] for epoch in sorted(records) if epoch <= epochs]
