"""The files of a recommendation, in the run's folder.

recommendation/table.jsonl     every image's scores, one line an image, appended and flushed: nothing is drawn twice
recommendation/choice.json     the rewards, the mean scores of every snapshot and strength, and which was chosen
recommendation/images/         the images of the picture
recommendation/images.png      rows: strengths, columns: epochs
recommendation/frontier.png    the held-out reward against the training reward
lora/recommended.safetensors   what was chosen, with its strength baked in
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_tdpo.atomic_files import write_atomically

from ..run import RunFolder
from ..run.json_lines import append_lines, read_lines
from ..run.loras import epoch_of, snapshots
from ..run.paths import RunPaths, epoch_name

TABLE, CHOICE = "table.jsonl", "choice.json"
IMAGES, PICTURE, FRONTIER = "images", "images.png", "frontier.png"
BASE_EPOCH = 0
LATEST = "latest"  # label of a LoRA that was saved in the middle of an epoch

Scores = dict[str, float]  # by the reward's name


@dataclass(frozen=True)
class Cell:
    """A LoRA at a strength.

    file: of the LoRA, None for the base model; digest: what identifies its content; label: what it is called.
    """

    epoch: int
    strength: float
    file: Path | None = None
    digest: str = ""
    label: str = "base"

    @property
    def is_base(self) -> bool:
        return self.file is None


# Lines with an empty digest are not used: after a reset of the KL's reference, they scored a tuned policy.
BASE = Cell(BASE_EPOCH, 0.0, digest="base")


def cells_of(run: RunPaths, strengths: Iterable[float]) -> list[Cell]:
    """The base model, then every snapshot of `run` and its newest state at every strength.

    Raises:
        ValueError: the run has no LoRA yet.
    """
    files = [(epoch, path, f"epoch {epoch}") for epoch, path in sorted(snapshots(run).items())]
    if not files:
        raise ValueError(
            f"got run {run.path.name!r}, which has no LoRA yet; expected one that has finished an epoch: resume it"
        )
    newest = run.latest_lora
    if newest.is_file() and _digest(newest) not in {_digest(path) for _, path, _ in files}:
        files.append((epoch_of(newest), newest, LATEST))
    ascending = sorted(strengths)
    return [BASE] + [
        Cell(epoch, strength, path, _digest(path), label) for epoch, path, label in files for strength in ascending
    ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """One image of a cell: its prompt, and the number of its noise among those of the same prompt."""

    prompt: str
    noise: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.noise} {self.prompt}".encode()).hexdigest()[:8]


class Table:
    """The scores of the images drawn so far, in memory and in `folder`/table.jsonl.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, folder: Path):
        self.path = folder / TABLE
        self._scores: dict[tuple[str, float, Draw], Scores] = {}
        for line in read_lines(self.path, _check, "delete it, and its images are drawn again"):
            cell = (line["lora"], line["strength"], Draw(line["prompt"], line["noise"]))
            self._scores[cell] = self._scores.get(cell, {}) | line["scores"]

    def scores(self, cell: Cell, draw: Draw) -> Scores:
        """By reward; empty if the image has not been drawn yet."""
        return self._scores.get((cell.digest, cell.strength, draw), {})

    def append(self, cell: Cell, drawn: dict[Draw, Scores]) -> None:
        for draw, scores in drawn.items():
            self._scores[cell.digest, cell.strength, draw] = self.scores(cell, draw) | scores
        append_lines(self.path, [_line(cell, draw, scores) for draw, scores in drawn.items()])


def _line(cell: Cell, draw: Draw, scores: Scores) -> dict[str, Any]:
    where = {"epoch": cell.epoch, "strength": cell.strength, "lora": cell.digest}
    return where | {"prompt": draw.prompt, "noise": draw.noise, "scores": scores}


def _check(line: dict[str, Any]) -> None:
    """Raise an error unless `line` is one that `_line` makes."""
    kinds: dict[str, Any] = {"strength": (int, float), "lora": str, "prompt": str, "noise": int, "scores": dict}
    for key, kind in kinds.items():
        if not isinstance(line[key], kind):
            raise ValueError(f"a line's {key} is {line[key]!r}")
    if not all(isinstance(score, int | float) for score in line["scores"].values()):
        raise ValueError("a score is not a number")


def image_file(folder: Path, cell: Cell, draw: Draw) -> Path:
    """Where an image of the picture is kept."""
    name = epoch_name(cell.epoch) if cell.label != LATEST else LATEST
    return folder / IMAGES / f"{name}-strength-{cell.strength:g}-{draw.digest}.png"


def write_choice(folder: Path, choice: dict[str, Any]) -> None:
    text = json.dumps(choice, indent=2) + "\n"
    write_atomically(folder / CHOICE, lambda file: file.write_text(text, encoding="utf-8"))


def read_choice(folder: Path) -> dict[str, Any] | None:
    """What `write_choice` wrote; None if there is nothing, or nothing that can be read."""
    try:
        choice = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return choice if isinstance(choice, dict) else None


def is_current(run: RunFolder) -> bool:
    """Whether the run's newest epoch has been considered in a recommendation."""
    choice = read_choice(run.recommendation)
    newest = choice.get("newest_epoch") if choice else None
    return isinstance(newest, int) and newest >= len(run.metrics())
