"""What an evaluation says: set-ups and their curves, with 95 % intervals.

A set-up is all runs that differ only in their seed. Its interval is Student's over these runs or, for a single run,
over its images. Changes from the base model are paired: the same prompts from the same noise.

Shapes: n images of a snapshot.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import NamedTuple

from ..config import plain_values
from ..config.changes import differences, may_change
from ..recommend.files import BASE, BASE_EPOCH, Cell
from .asked import Asked, PromptSet, Subject
from .files import Place, Results

CONFIDENCE = 0.95
NO_PART = ("seed", "overoptimisation.", "micro_batch", "decode_batch")  # settings that may differ within a set-up


class Interval(NamedTuple):
    """A mean and half the width of its interval, which is 0 where there is only one value."""

    mean: float
    half: float


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean: a percentile bootstrap of five values would cover far less than it says."""
    if len(values) < 2:
        return Interval(fmean(values), 0.0)
    from scipy.stats import t as student  # takes a second to import

    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(len(values)))


class Point(NamedTuple):
    """A point of a curve; y is between low and high, which are the same without several runs."""

    epoch: int
    x: float
    y: float
    low: float
    high: float


class Chosen(NamedTuple):
    """A set-up's snapshot to show, and its mean training reward."""

    label: str
    cell: Cell
    reward: float


@dataclass(frozen=True)
class Setup:
    """Runs that differ only in their seed, in the order in which they were given."""

    label: str
    subjects: tuple[Subject, ...]

    @property
    def training(self) -> str:
        return self.subjects[0].training

    @property
    def epochs(self) -> list[int]:
        """Of the snapshots that all runs have, ascending."""
        of_each = [{cell.epoch for cell in subject.cells} for subject in self.subjects]
        return sorted(set.intersection(*of_each))

    def queries(self, epoch: int) -> float:
        return 0 if epoch == BASE_EPOCH else fmean(subject.queries(epoch) for subject in self.subjects)


def setups_of(subjects: Sequence[Subject]) -> list[Setup]:
    """The set-ups in the order of their first runs, called by their algorithm or, if others have it, by their runs."""
    groups: list[list[Subject]] = []
    for subject in subjects:
        group = next((group for group in groups if _differ_only_in_seed(group[0], subject)), None)
        if group is None:
            groups.append([subject])
        else:
            group.append(subject)
    algorithms = [group[0].config.algorithm for group in groups]
    names = [_common([subject.name for subject in group]) for group in groups]
    labels = [
        algorithm if algorithms.count(algorithm) == 1 else name if names.count(name) == 1 else group[0].name
        for algorithm, name, group in zip(algorithms, names, groups, strict=True)
    ]
    return [Setup(label, tuple(group)) for label, group in zip(labels, groups, strict=True)]


def _common(names: list[str]) -> str:
    """What the names begin with, such as "tdpo-r" for "tdpo-r-1" and "tdpo-r-2"."""
    return os.path.commonprefix(names).rstrip("-_. ") if len(names) > 1 else names[0]


def _differ_only_in_seed(a: Subject, b: Subject) -> bool:
    """Whether a set-up covers both: other settings differ only if they decide no result, or may change within a run."""
    found = differences(plain_values(a.config), plain_values(b.config))
    return all(name.startswith(NO_PART) or may_change(name) for name in found)


@dataclass(frozen=True)
class Evaluation:
    """The results of what was asked for, of which everything has been scored; pictures: the names of their files."""

    asked: Asked
    results: Results
    pictures: tuple[str, ...] = ()

    @cached_property
    def setups(self) -> list[Setup]:
        return setups_of(self.asked.subjects)

    @property
    def trainings(self) -> list[str]:
        """The training rewards."""
        return list(dict.fromkeys(subject.training for subject in self.asked.subjects))

    def scores(self, subject: Subject | None, epoch: int, prompts: PromptSet, reward: str) -> list[float]:
        """The n scores of a run's snapshot; those of the base model for epoch 0."""
        cell = BASE if subject is None or epoch == BASE_EPOCH else subject.cell(epoch)
        return self.results.scores(Place(None if cell.is_base else subject, cell, prompts))[reward]

    def mean(self, setup: Setup | None, epoch: int, prompts: PromptSet, reward: str) -> Interval:
        """Of a snapshot, over the runs; of the base model without a set-up."""
        subjects = setup.subjects if setup else (None,)
        return interval([fmean(self.scores(subject, epoch, prompts, reward)) for subject in subjects])

    def change(self, setup: Setup, epoch: int, prompts: PromptSet, reward: str) -> Interval:
        """How far a snapshot is above the base model: over the runs or, of a single run, over its images."""
        base = self.scores(None, BASE_EPOCH, prompts, reward)
        of_each = [
            [own - of_base for own, of_base in zip(self.scores(subject, epoch, prompts, reward), base, strict=True)]
            for subject in setup.subjects
        ]
        return interval(of_each[0] if len(of_each) == 1 else [fmean(changes) for changes in of_each])

    def curve(self, setup: Setup, prompts: PromptSet, reward: str, against: str | None = None) -> list[Point]:
        """A reward from the base model on, epoch by epoch, over another reward or, without one, over reward queries."""
        points = []
        for epoch in [BASE_EPOCH, *setup.epochs]:
            y = self.mean(setup, epoch, prompts, reward)
            x = self.mean(setup, epoch, prompts, against).mean if against else setup.queries(epoch)
            points.append(Point(epoch, x, y.mean, y.mean - y.half, y.mean + y.half))
        return points

    def at_equal_reward(self, training: str, prompts: PromptSet) -> list[Chosen]:
        """The snapshot of each set-up's first run that is nearest to the highest training reward which all reach."""
        rewards = {
            setup: {
                cell.epoch: fmean(self.scores(setup.subjects[0], cell.epoch, prompts, training))
                for cell in setup.subjects[0].cells
            }
            for setup in self.setups
            if setup.training == training
        }
        level = min(max(of_epochs.values()) for of_epochs in rewards.values())
        chosen = []
        for setup, of_epochs in rewards.items():
            epoch = min(of_epochs, key=lambda epoch: abs(of_epochs[epoch] - level))
            chosen.append(Chosen(setup.label, setup.subjects[0].cell(epoch), of_epochs[epoch]))
        return chosen
