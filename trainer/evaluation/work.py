"""From runs to an evaluation: draw and score what is missing, and write the table and the pictures."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from comfy_tdpo import arithmetic
from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.counts import number_of
from comfy_tdpo.rewards import RewardModel, load_reward, load_rewards

from ..config import TrainConfig
from ..recommend.files import BASE, BASE_EPOCH, Cell, Draw
from ..state import Watch
from .asked import Asked, PromptSet, seed_of
from .files import BASE_RUN, Results, check_folder, image_file, locked, picture, places_of, write_table
from .numbers import Chosen, Evaluation
from .table import markdown

if TYPE_CHECKING:
    from comfy_tdpo.policy import DiffusionPolicy

    from ..recommend.drawing import Painter

MakePolicy = Callable[[TrainConfig, torch.device], "DiffusionPolicy"]

SHOWN = 8  # prompts of a set in the picture of all set-ups
PHASE = "evaluating"
CROSS, EFFICIENCY, EQUAL = "cross-reward", "efficiency", "equal-reward"


def evaluate(
    asked: Asked,
    folder: Path,
    device: torch.device,
    make_policy: MakePolicy | None = None,
    check: Callable[[], None] = lambda: None,
    watch: Watch = lambda phase, done, total: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Evaluate what is `asked`, and write everything into `folder`. What was scored there is not scored again.

    Args:
        make_policy: makes the policy of a run from a model that the caller holds; None: the run's model is loaded.
        check: called between model calls; may raise an exception to stop, and everything scored so far is kept.
        watch: sees the progress in images; tell: is told in one line what will be evaluated.

    Raises:
        ValueError: it cannot be done as asked.
        RewardError: a reward failed.
    """
    check_folder(folder)
    with locked(folder):
        results = Results(folder, asked)
        studio = _Studio(make_policy or _load_policy, device, check)
        with arithmetic.switched(deterministic=False):  # with the arithmetic of a run
            _score(asked, results, studio, watch, tell)
            evaluation = Evaluation(asked, results)
            evaluation = replace(evaluation, pictures=_draw_pictures(evaluation, studio, folder))
        write_table(folder, markdown(evaluation))
        return evaluation


def _described(asked: Asked) -> str:
    snapshots = sum(len(subject.cells) for subject in asked.subjects)
    sets = ", ".join(f"{prompts.name} ({number_of(len(prompts.prompts), 'prompt')})" for prompts in asked.sets)
    drawn = f"{number_of(snapshots, 'snapshot')} and the base model, {number_of(asked.images, 'image')} a prompt"
    return f"{drawn}; prompts: {sets}"


def _load_policy(config: TrainConfig, device: torch.device) -> "DiffusionPolicy":
    from ..assemble import load_policy

    return load_policy(config, device)


class _Studio:
    """Makes painters, one at a time: the model is loaded again only if something else was trained."""

    def __init__(self, make_policy: MakePolicy, device: torch.device, check: Callable[[], None]):
        self.device, self.check = device, check
        self._make = make_policy
        self._shape: Any = None
        self._painter: Painter | None = None

    def painter(self, config: TrainConfig) -> "Painter":
        """One whose policy trains what that of `config` does."""
        from ..recommend.drawing import Painter  # imports diffusers, which takes seconds

        shape = config.policy.train, config.policy.rank, config.policy.alpha, config.policy.targets
        if self._painter is None or shape != self._shape:
            self._painter = None
            gc.collect()  # a policy refers to itself
            self._painter, self._shape = Painter(config, self._make(config, self.device), self.check), shape
        return self._painter


# --- scores -----------------------------------------------------------------------------------------------------------


def _score(asked: Asked, results: Results, studio: _Studio, watch: Watch, tell: Callable[[str], None]) -> None:
    """Draw and score what is missing; every place is saved at once."""
    missing = {place: names for place in places_of(asked) if (names := results.missing(place))}
    judges = _load_rewards(asked, {name for names in missing.values() for name in names}, studio.device)
    for prompts in {place.prompts: None for place in missing}:
        for judge in judges.values():
            judge.check_prompts(list(prompts.prompts))
    tell(_described(asked))
    total = sum(len(asked.draws(place.prompts)) for place in missing)
    done = 0
    for place, names in missing.items():
        painter = studio.painter((place.subject or asked.subjects[0]).config)
        draws = asked.draws(place.prompts)
        scores: dict[str, list[float]] = {name: [] for name in names}
        with painter.applied(place.cell):
            while draws:
                watch(PHASE, done, total)
                texts, seeds = [draw.prompt for draw in draws], [seed_of(draw) for draw in draws]
                images, found = painter.draw(texts, seeds, [judges[name] for name in names])
                for name in names:
                    scores[name] += found[name]
                draws, done = draws[len(images) :], done + len(images)
        results.append(place, scores)
    watch(PHASE, done, total)


def _load_rewards(asked: Asked, names: set[str], device: torch.device) -> dict[str, RewardModel]:
    """The rewards of these names; a training reward may be a sum."""
    how = (device, asked.subjects[0].config.reward_precision, asked.weights)
    judges: dict[str, RewardModel] = {}
    for name in asked.rewards:
        if name in names:
            run = asked.trained_on(name)
            terms = run and load_rewards(run.config.rewards, *how, run.config.reward_scales)
            judges[name] = terms or load_reward(name, *how)
    return judges


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw_pictures(evaluation: Evaluation, studio: _Studio, folder: Path) -> tuple[str, ...]:
    """Draw all pictures; returns their names."""
    from ..plots.equal_reward import equal_reward_figure
    from ..plots.evaluation import cross_reward_figure, efficiency_figure

    pictures = {}
    for training in evaluation.trainings:
        cross = picture(folder, CROSS, training)
        if len(evaluation.asked.rewards) > 1:
            pictures[cross] = cross_reward_figure(evaluation, training)
        else:
            cross.unlink(missing_ok=True)  # of an earlier evaluation, by other rewards
        pictures[picture(folder, EFFICIENCY, training)] = efficiency_figure(evaluation, training)
        for prompts in evaluation.asked.sets:
            shown = evaluation.asked.draws(prompts)[:: evaluation.asked.images][:SHOWN]
            base = fmean(evaluation.scores(None, BASE_EPOCH, prompts, training))
            columns = [Chosen(BASE_RUN, BASE, base), *evaluation.at_equal_reward(training, prompts)]
            files = [_images(evaluation.asked, column.cell, prompts, shown, studio, folder) for column in columns]
            figure = equal_reward_figure(training, [draw.prompt for draw in shown], columns, files)
            pictures[picture(folder, EQUAL, training, prompts.name)] = figure
    for path, image in pictures.items():
        write_atomically(path, image.save)
    return tuple(path.name for path in pictures)


def _images(
    asked: Asked, cell: Cell, prompts: PromptSet, shown: list[Draw], studio: _Studio, folder: Path
) -> list[Path]:
    """The files of these images of a snapshot, of which those that are missing are drawn."""
    from ..recommend.drawing import as_picture

    files = {draw: image_file(folder, asked.drawing(prompts), cell, draw) for draw in shown}
    left = [draw for draw, file in files.items() if not file.is_file()]
    if left:
        owner = next((subject for subject in asked.subjects if cell in subject.cells), asked.subjects[0])
        painter = studio.painter(owner.config)
        with painter.applied(cell):
            while left:
                images, _ = painter.draw([draw.prompt for draw in left], [seed_of(draw) for draw in left], [])
                for draw, image in zip(left, images, strict=False):
                    write_atomically(files[draw], as_picture(image).save)
                left = left[len(images) :]
    return list(files.values())
