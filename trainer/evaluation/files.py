"""The files of an evaluation, in a folder.

evaluation.jsonl                one line per run, snapshot and prompt set, appended as soon as it is scored
evaluation.md                   the tables, and the pictures below
cross-reward-REWARD.png         each other reward against the training reward REWARD
efficiency-REWARD.png           all rewards against the reward queries
equal-reward-REWARD-SET.png     images of all set-ups at equal training reward
images/                         the images of that picture

A line has the scores of every image, prompt by prompt, and the base model has lines of its own. Rewards that are added
later have lines of their own, too: all lines of a snapshot count together.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from comfy_tdpo.atomic_files import write_atomically

from ..recommend.files import BASE, Cell, Draw
from ..run.json_lines import Line, append_lines, read_lines
from .asked import Asked, PromptSet, Subject

RESULTS, TABLE, IMAGES, LOCK = "evaluation.jsonl", "evaluation.md", "images", ".lock"
BASE_RUN = "base"

Scores = dict[str, list[float]]  # of each image, by the reward's name


@dataclass(frozen=True)
class Place:
    """What a line is about: the snapshot `cell` of a run, or the base model without one, on a prompt set."""

    subject: Subject | None
    cell: Cell
    prompts: PromptSet


def places_of(asked: Asked) -> list[Place]:
    """All places: first the base model, then run by run and snapshot by snapshot."""
    snapshots = [(None, BASE), *((subject, cell) for subject in asked.subjects for cell in subject.cells)]
    return [Place(subject, cell, prompts) for subject, cell in snapshots for prompts in asked.sets]


class Results:
    """The scores so far, in memory and in `folder`/evaluation.jsonl.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, folder: Path, asked: Asked):
        self.path, self._asked = folder / RESULTS, asked
        self._scores: dict[tuple[str, str, str], Scores] = {}
        for line in read_lines(self.path, _check, "delete it, and its images are drawn again"):
            self._add((line["run"], line["lora"], line["drawing"]), line["scores"])

    def _add(self, key: tuple[str, str, str], scores: Scores) -> None:
        self._scores[key] = self._scores.get(key, {}) | scores

    def scores(self, place: Place) -> Scores:
        """Of the images, prompt by prompt; empty if nothing has been scored yet."""
        return self._scores.get(self._key(place), {})

    def missing(self, place: Place) -> list[str]:
        """The rewards that have not scored it yet."""
        return [name for name in self._asked.rewards if name not in self.scores(place)]

    def append(self, place: Place, scores: Scores) -> None:
        self._add(self._key(place), scores)
        append_lines(self.path, [self._line(place, scores)])

    def _key(self, place: Place) -> tuple[str, str, str]:
        return _run_of(place.subject), place.cell.digest, self._asked.drawing(place.prompts)

    def _line(self, place: Place, scores: Scores) -> Line:
        run, lora, drawing = self._key(place)
        subject, epoch = place.subject, place.cell.epoch
        what: Line = {"run": run, "epoch": epoch}
        if subject is not None:
            what |= {"algorithm": subject.config.algorithm, "seed": subject.config.seed}
            what |= {"reward_queries": subject.queries(epoch)}
        drawn = {"prompts": place.prompts.name, "images": self._asked.images, "lora": lora, "drawing": drawing}
        return what | drawn | {"scores": scores}


def _run_of(subject: Subject | None) -> str:
    return BASE_RUN if subject is None else subject.name


def _check(line: Line) -> None:
    """Raise an error unless `line` is one that `Results` writes."""
    for key, kind in {"run": str, "lora": str, "drawing": str, "scores": dict}.items():
        if not isinstance(line[key], kind):
            raise ValueError(f"a line's {key} is {line[key]!r}")
    for scores in line["scores"].values():
        if not isinstance(scores, list) or not all(isinstance(score, int | float) for score in scores):
            raise ValueError("a reward's scores are not numbers")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other evaluations from writing to it meanwhile.

    Raises:
        ValueError: it cannot be made, or is in use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"folder '{folder}' is in use by another evaluation; wait for it, or choose another with --out DIR"
        ) from error


def check_folder(folder: Path) -> None:
    """Raise ValueError if an evaluation cannot be kept there."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    reason = ""
    if not above.is_dir():
        reason = f"'{above}' is a file"
    elif not os.access(above, os.W_OK | os.X_OK):
        reason = f"you have no permission to write to '{above}'"
    if reason:
        raise ValueError(f"got folder '{folder}' for the evaluation, but {reason}; choose another with --out DIR")


def image_file(folder: Path, drawing: str, cell: Cell, draw: Draw) -> Path:
    """Where an image of a picture is kept."""
    return folder / IMAGES / f"{drawing}-{cell.digest or BASE_RUN}-{draw.digest}.png"


def picture(folder: Path, kind: str, *names: str) -> Path:
    """The file of a picture, such as cross-reward-shapes-aesthetic.png."""
    return folder / ("-".join([kind, *(re.sub(r"[^\w.]+", "-", name).strip("-.") for name in names)]) + ".png")


def write_table(folder: Path, text: str) -> None:
    write_atomically(folder / TABLE, lambda file: file.write_text(text, encoding="utf-8"))
