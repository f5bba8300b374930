"""What an evaluation is asked for, and whether it can be done: all checks that load neither rewards nor models."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from comfy_tdpo.counts import number_of
from comfy_tdpo.prompts import load_prompts, prompt_sets
from comfy_tdpo.rewards import check_reward, name_of_sum
from comfy_tdpo.tastes.names import is_taste
from comfy_tdpo.user_files import user_path

from ..config import TrainConfig
from ..config.loadable import check_loadable
from ..config.parsing import check_used
from ..recommend.files import LATEST, Cell, Draw, cells_of
from ..recommend.options import SHAPES, counterpart, is_of_shapes
from ..run import RunFolder

IMAGES, MOST = 4, 256  # images per prompt
SEED = 42  # of the noise, for all runs
LAST = "last"  # instead of an epoch's number
COMPLEX = {"shapes-unseen": "shapes-complex", "unseen-animals": "complex"}  # sets that go together


@dataclass(frozen=True)
class PromptSet:
    """Prompts under a name; written: (prompt, line) for those that a graph's CLIP reads otherwise."""

    name: str
    prompts: tuple[str, ...]
    written: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def load(source: str) -> "PromptSet":
        """A shipped set, or a file of prompts; a prompt that occurs twice counts once."""
        name = source if source in prompt_sets() else user_path(source).name
        return PromptSet(name, tuple(dict.fromkeys(load_prompts(source))))


@dataclass(frozen=True)
class Options:
    """What to evaluate.

    rewards: names, or None for those that the runs have measured; the training rewards are always among them.
    sets: prompts, or none for those of `usual_sets`; images: per prompt.
    epochs: numbers of epochs, or LAST; none for all snapshots.
    weights: files or folders of rewards by name, instead of those that the runs name.

    Raises:
        ValueError: a value is out of range.
    """

    rewards: tuple[str, ...] | None = None
    sets: tuple[PromptSet, ...] = ()
    images: int = IMAGES
    epochs: tuple[int | str, ...] = ()
    weights: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.images <= MOST:
            raise ValueError(f"got {self.images} images; expected 1 to {MOST} per prompt")
        for what, names in (("rewards", self.rewards or ()), ("prompts", [prompts.name for prompts in self.sets])):
            if twice := _repeated(names):
                raise ValueError(f"got {twice!r} twice in --{what}; expected each once: remove one")
        for name in self.rewards or ():
            check_reward(name)


@dataclass(frozen=True, eq=False)
class Subject:
    """A run and those of its snapshots that are evaluated, by ascending epoch."""

    run: RunFolder
    config: TrainConfig
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def training(self) -> str:
        """The name of the training reward."""
        return name_of_sum(self.config.rewards, self.config.reward_scales)

    def cell(self, epoch: int) -> Cell:
        return next(cell for cell in self.cells if cell.epoch == epoch)

    def queries(self, epoch: int) -> int:
        """Reward queries up to a snapshot."""
        return int(self._queries.get(epoch, epoch * self.config.samples_per_epoch))

    @cached_property
    def _queries(self) -> dict[int, float]:
        return {int(line["epoch"]): line["reward_queries"] for line in self.run.metrics()}


@dataclass(frozen=True)
class Asked:
    """An evaluation that can be done, as far as is known without loading anything.

    rewards: the names of all rewards; weights: files or folders of rewards, by name.
    """

    subjects: tuple[Subject, ...]
    sets: tuple[PromptSet, ...]
    rewards: tuple[str, ...]
    images: int
    weights: dict[str, str]

    def draws(self, prompts: PromptSet) -> list[Draw]:
        """The images of a snapshot."""
        return [Draw(prompt, noise) for prompt in prompts.prompts for noise in range(self.images)]

    def told(self, prompts: PromptSet) -> str:
        """How many images of `prompts` are drawn, and how."""
        how = self.subjects[0].config.drawn_with_told
        return f"{number_of(len(prompts.prompts), 'prompt')}, {number_of(self.images, 'image')} each ({how})"

    def drawing(self, prompts: PromptSet) -> str:
        """A digest of how the images of `prompts` are drawn, apart from the snapshot."""
        how = [*_sampling(self.subjects[0].config).values(), SEED, self.images, prompts.prompts, prompts.written]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]

    def trained_on(self, name: str) -> Subject | None:
        """A run whose training reward has this name."""
        return next((subject for subject in self.subjects if subject.training == name), None)


def seed_of(draw: Draw) -> tuple[int | str, ...]:
    """The coordinates of an image's noise."""
    return SEED, "evaluate", draw.prompt, draw.noise


def ask(runs: Sequence[RunFolder], options: Options, in_graph: bool = False) -> Asked:
    """What is to be evaluated.

    in_graph: whether the model comes from a ComfyUI graph.

    Raises:
        ValueError: it cannot be done; the message says what to do.
    """
    configs = [run.config for run in runs]
    _check_names(runs)
    _check_alike(runs, configs)
    if not in_graph:
        check_loadable(configs[0], "use the node TDPO Evaluate")
    subjects = tuple(
        Subject(run, config, _cells(run, options.epochs)) for run, config in zip(runs, configs, strict=True)
    )
    judging = options.rewards
    if judging is None:
        judging = tuple(name for config in configs for name in (*config.measured, *config.guards))
    _check_world(configs, judging)
    sets = options.sets or usual_sets(configs[0], runs[0].prompts(configs[0]))
    rewards = tuple(dict.fromkeys([*(subject.training for subject in subjects), *judging]))
    trained_on = [name for config in configs for name in config.trained_on]
    check_used(options.weights, tuple(dict.fromkeys([*trained_on, *judging])))
    weights = _weights(subjects, options.weights)
    for name in judging:
        if is_taste(name) and name not in weights:
            raise ValueError(
                f"got reward {name!r} without its folder; expected where its votes are: --reward-weights {name}=FOLDER"
            )
    return Asked(subjects, sets, rewards, options.images, weights)


def usual_folder(runs: Sequence[RunFolder]) -> Path:
    """Where the evaluation is kept: in the folder of the run, or of several runs, in the folder that holds them."""
    paths = [run.path.resolve() for run in runs]
    holding = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.parent for path in paths]))
    return holding / "evaluation"


def usual_sets(config: TrainConfig, trained: list[str]) -> tuple[PromptSet, ...]:
    """The shipped sets of unseen and of complex prompts that go with those `trained` on."""
    unseen = counterpart(config, trained)
    if unseen is None:
        raise ValueError(
            "got runs on prompts of which no unseen counterpart is known; expected prompts to evaluate on: name sets "
            "or files with --prompts SET,SET"
        )
    return PromptSet.load(unseen), PromptSet.load(COMPLEX[unseen])


# --- the runs ---------------------------------------------------------------------------------------------------------


def _check_names(runs: Sequence[RunFolder]) -> None:
    """Raise ValueError if two runs have the same name, which tells them apart in the files."""
    seen: dict[str, Path] = {}
    for path in (run.path.resolve() for run in runs):
        if seen.setdefault(path.name, path) != path:
            raise ValueError(
                f"got two runs called {path.name!r}, '{seen[path.name]}' and '{path}'; expected different names: "
                "rename one of the folders"
            )
    if twice := _repeated([str(run.path.resolve()) for run in runs]):
        raise ValueError(f"got run '{twice}' twice; expected each run once: remove one")


def _sampling(config: TrainConfig) -> dict[str, object]:
    """What an image depends on apart from the LoRA, its prompt and its noise."""
    drawn = config.drawn_with
    return {  # in this order, which the digests of earlier versions have
        "model": config.model,
        "prediction_type": config.prediction_type,
        "precision": config.precision,
        "steps of evaluation": drawn["steps"],
        "embedded_guidance": config.embedded_guidance,
        "resolution of evaluation": drawn["resolution"],
        "process": config.process,
        "guidance of evaluation": drawn["guidance"],
    }


def _check_alike(runs: Sequence[RunFolder], configs: Sequence[TrainConfig]) -> None:
    """Raise ValueError unless the same noise gives images of the same kind, scored in the same way, in all runs."""
    first, *others = [_sampling(config) | {"reward_precision": config.reward_precision} for config in configs]
    for run, other in zip(runs[1:], others, strict=True):
        for name, value in other.items():
            if value != first[name]:
                what = "of different base models" if name == "model" else "that draw or score their images differently"
                raise ValueError(
                    f"got runs {what}: {name} is {first[name]!r} in {runs[0].path.name!r} and {value!r} in "
                    f"{run.path.name!r}; expected the same in all: evaluate them one by one"
                )


def _cells(run: RunFolder, epochs: tuple[int | str, ...]) -> tuple[Cell, ...]:
    """The run's snapshots of these epochs, or all; one that was saved in the middle of an epoch is left out."""
    cells = {cell.epoch: cell for cell in cells_of(run, [1.0]) if not cell.is_base and cell.label != LATEST}
    wanted = {max(cells) if epoch == LAST else epoch for epoch in epochs} or set(cells)
    if missing := sorted(wanted - set(cells), key=str):
        raise ValueError(
            f"run {run.path.name!r} has no snapshot of epoch {missing[0]}; expected some of those it has "
            f"({', '.join(map(str, cells))}) in --epochs, or {LAST!r}"
        )
    return tuple(cell for epoch, cell in cells.items() if epoch in wanted)


# --- the rewards ------------------------------------------------------------------------------------------------------


def _check_world(configs: Sequence[TrainConfig], rewards: Iterable[str]) -> None:
    """Raise ValueError for rewards that know only Shapes, if the runs are of another world."""
    if is_of_shapes(configs[0]):
        return
    if foreign := [name for name in rewards if name.startswith(SHAPES)]:
        raise ValueError(
            f"got reward {foreign[0]!r}, which knows only the world of Shapes, for runs of {configs[0].model!r}; "
            "expected rewards for that model's images: take it out of --rewards"
        )


def _weights(subjects: Iterable[Subject], given: dict[str, str]) -> dict[str, str]:
    """The files or folders of rewards, as the runs name them or, first of all, as they are `given`."""
    from ..run.tastes import weights_of  # imports torch

    found: dict[str, tuple[Subject, str]] = {}
    for subject in subjects:
        for name, path in weights_of(subject.run, subject.config).items():
            before, known = found.setdefault(name, (subject, path))
            if name not in given and known != path and not _same_taste(name, known, path):
                raise ValueError(
                    f"got runs with different weights for reward {name!r}: '{known}' in {before.name!r} and '{path}' "
                    f"in {subject.name!r}; expected one of them: choose it with --reward-weights {name}=PATH"
                )
    return {name: path for name, (_, path) in found.items()} | given


def _same_taste(name: str, *paths: str) -> bool:
    """Whether these are copies of one taste, fitted to the same votes."""
    from comfy_tdpo.tastes.fitted import read_fitted

    if not is_taste(name) or not all(Path(path).is_file() for path in paths):
        return False
    return len({read_fitted(Path(path)).fingerprint for path in paths}) == 1


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)
