"""What a graph asks of an evaluation, and what it is given of it."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from comfy_tdpo.prompts import prompt_sets

from ...trainer.evaluation.asked import LAST, Options, PromptSet, usual_folder
from ...trainer.evaluation.files import TABLE
from ...trainer.evaluation.numbers import Evaluation
from ...trainer.evaluation.table import tables_in
from ...trainer.evaluation.work import CROSS, EFFICIENCY, EQUAL
from ...trainer.run import RunFolder
from .combos import AUTO, check_choice
from .outputs import as_tensor
from .prompts import read_prompts
from .reward_choice import RewardChoice

Fields = dict[str, Any]


def options(rewards: RewardChoice | None, prompt_set: str, text: str, images: int, epochs: str) -> Options:
    """What the node's inputs ask for.

    Raises:
        ValueError: one of them is not understood.
    """
    check_choice("prompt_set", prompt_set, [AUTO, *prompt_sets()])
    prompts = read_prompts(text, "prompts")
    sets: tuple[PromptSet, ...] = ()
    if prompts.words:
        sets = (PromptSet("prompts", tuple(dict.fromkeys(prompts.words)), tuple(prompts.written.items())),)
    elif prompt_set != AUTO:
        sets = (PromptSet.load(prompt_set),)
    names, files = (None, {}) if rewards is None else (tuple(rewards.weights), rewards.files)
    return Options(names, sets, images, _epochs(epochs), files)


def _epochs(text: str) -> tuple[int | str, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part == LAST or (part.isascii() and part.isdecimal() and len(part) < 10) for part in parts):
        raise ValueError(
            f"got epochs {text[:100]!r}; expected numbers of epochs with commas between them, such as 5, 10, or "
            f"{LAST!r}: leave it empty for all snapshots"
        )
    return tuple(part if part == LAST else int(part) for part in parts)


def pictures(run: RunFolder, found: Evaluation) -> list[Tensor]:
    """Rewards over the training reward, rewards over the reward queries, and images."""
    names = [plot_in(found.pictures), *(_first(found.pictures, kind) for kind in (EFFICIENCY, EQUAL))]
    return [as_tensor(Image.open(usual_folder([run]) / name)) for name in names]


def plot_in(pictures: tuple[str, ...]) -> str:
    """The one over the training reward or, if no other reward was asked, the one over reward queries."""
    return _first(pictures, CROSS) or _first(pictures, EFFICIENCY)


def _first(pictures: tuple[str, ...], kind: str) -> str:
    return next((name for name in pictures if name.startswith(kind)), "")


# --- for the browser --------------------------------------------------------------------------------------------------


def kept_tables(run: RunFolder) -> Fields:
    """The tables of the run's last evaluation; FileNotFoundError if there is none."""
    return {"tables": tables_in((_folder(run) / TABLE).read_text(encoding="utf-8"))}


def kept_plot(run: RunFolder) -> bytes:
    """The plot of the run's last evaluation as PNG; FileNotFoundError if there is none."""
    folder = _folder(run)
    name = plot_in(tuple(path.name for path in sorted(folder.glob("*.png"))))
    return (folder / (name or f"{CROSS}.png")).read_bytes()


def _folder(run: RunFolder) -> Path:
    return usual_folder([run])
