"""The figures of the TDPO paper (arXiv 2402.08552), regenerated on Shapes: `python benchmarks/paper.py --all`.

Trains what the chosen figures need over paired seeds, each run once; draws the snapshots on unseen prompts with the
trainer's `evaluate`; and sets each statement of the paper beside what was found. paper.toml lists the figures. Writes
paper.jsonl (a line for each run and each of its evaluations), paper.md and paper-*.png beside this file.

It goes on where it was stopped, so the work can be spread over days: `--figure`, `--seeds` and `--jobs` choose what is
done now. Before it starts, and with `--plan` instead, it says how much that is; `--page` only writes the page. With a
preset sd14-*, the same figures are made with Stable Diffusion v1.4 on a GPU; runs on hpsv2 need its prompts, which do
not ship: `--prompts hpsv2=FILE`. On one machine, `--figure 7 --seeds 1`, with another `--runs` and `--out`, repeats the
numbers of that figure and seed exactly.
"""

import argparse
import re
import shlex
import statistics
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import frontier
import pairs
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pairs import Line, Series, gains, row, smooth
from PIL import Image

from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.trainer.config import TrainConfig, make_config
from comfy_tdpo.trainer.config.layers import merge
from comfy_tdpo.trainer.evaluation.asked import Options, PromptSet, Subject, ask
from comfy_tdpo.trainer.evaluation.files import Results, picture
from comfy_tdpo.trainer.evaluation.numbers import CONFIDENCE, Evaluation, Point, interval
from comfy_tdpo.trainer.evaluation.work import EQUAL
from comfy_tdpo.trainer.plots.evaluation import draw_setups
from comfy_tdpo.trainer.recommend.files import BASE_EPOCH
from comfy_tdpo.trainer.run import RunFolder

HERE = Path(__file__).parent
DATA = tomllib.loads((HERE / "paper.toml").read_text(encoding="utf-8"))
SEEDS, IMAGES = 5, 4  # seeds of each variant, and images of each prompt in an evaluation
RESETS = 10  # of a run, about: the paper's F is 10 of 100 epochs
SNAPSHOT_LEVELS = (*pairs.LEVELS, 1.5, 1.75)  # snapshots gain more, in standard deviations of their own images
PER_ROW = 5  # entries in a row of a legend
MOST_BANDS = 6  # curves of a panel that are drawn with their intervals
WIDE, DPI = 1000, 75  # pixels of copied pictures, and resolution of those drawn here
TRAINED = ""  # instead of a prompt set: the training itself, epoch by epoch
MEASURES = {  # the first three at equal training reward
    "queries": "reward queries saved",
    "gold": "how much more of the gold measure is left",
    "others": "how much more of the held-out rewards is left: their mean, in standard deviations",
    "gain": "training reward gained by the end, in standard deviations",
    "explained": "explained variance of the critic, after the first two epochs",
    "dormant": "dormant neurons of the critic, in percent, after the first two epochs",
    "policy dormant": "dormant neurons of the LoRA, in percent, after the first two epochs",
    "overlap": "excess over chance of the overlap between the critic's dormant neurons and those of the epoch before, "
    "as a percentage of the largest possible excess",
    "policy overlap": "the same of the LoRA's",
}
WHOLE = "full-neurons.png"  # of full.py
AXES = {
    "queries": "reward queries",
    "gain": "training reward gained (std)",
    "explained": "explained variance of the critic",
    "dormant": "dormant neurons of the critic (%)",
    "policy dormant": "dormant neurons of the LoRA (%)",
    "overlap": "overlap, critic (%, chance included)",
    "policy overlap": "overlap, LoRA (%, chance included)",
}
EPOCHS = {  # our names of series -> keys of metrics
    "queries": "reward_queries",
    "explained": "critic/explained_variance",
    "seconds": "time/epoch_s",
    "dormant": "neurons/dormant_percent",
    "policy dormant": "policy_neurons/dormant_percent",
}
OVERLAPS = {"overlap": "neurons/overlap_percent", "policy overlap": "policy_neurons/overlap_percent"}


# --- the variants, the figures, and where they are trained


@dataclass(frozen=True)
class World:
    """An entry of paper.toml, which says what its fields mean.

    changed: settings for all runs; prompts: by training reward, where the prompts are not the preset's.
    """

    name: str
    preset: str
    rewards: list[str]
    judges: list[str]
    truth: list[str]
    sets: list[str]
    gpu: bool
    mib: float
    notes: list[str]
    changed: dict[str, Any]
    prompts: dict[str, str]

    def held_out(self, key: str) -> list[str]:
        """The rewards that judge a variant, apart from the gold measure."""
        return [name for name in (*self.rewards, *self.judges) if name != self.reward(key)]

    def reward(self, key: str) -> str:
        return self.rewards[index_of(key)]

    def label(self, key: str) -> str:
        return f"{name_of(key)} on {self.reward(key)}" if index_of(key) else key

    def config(self, key: str, seed: int) -> TrainConfig:
        values = {"rewards": {self.reward(key): 1.0}, "eval_rewards": [*self.held_out(key), *self.truth], "seed": seed}
        values |= {"overoptimisation": {"reward": "none"}, "output": {"keep_checkpoints": 1}}
        values = merge(merge(values, VARIANTS[name_of(key)]), self.changed)
        if values.get("critic", {}).get("encoder") == "other":
            values = merge(values, {"critic": {"encoder": self.rewards[0 if index_of(key) else -1]}})
        if self.reward(key) in self.prompts:
            values = merge(values, {"prompts": self.prompts[self.reward(key)]})
        preset = self.preset.format(self.reward(key))
        config = make_config(preset, overrides=values)
        neurons = getattr(config, "neurons", None)
        if neurons and {neurons.reset, neurons.policy_reset} != {"none"}:
            every = max(1, round(config.epochs / RESETS))
            config = make_config(preset, overrides=merge(values, {"neurons": {"every": every}}))
        return config


def name_of(key: str) -> str:
    return key.partition("/")[0]


def index_of(key: str) -> int:
    """Which reward a variant is trained on."""
    return int(key.partition("/")[2] or 0)


def world_of(preset: str, changed: dict[str, Any], prompts: dict[str, str] | None = None) -> World:
    """The world of a preset, whose reward comes first."""
    entry = DATA["worlds"][preset.partition("-")[0]]
    rewards = sorted(entry["rewards"], key=lambda name: entry["preset"].format(name) != preset)
    return World(**entry | {"rewards": rewards, "changed": changed, "prompts": prompts or {}})


@dataclass(frozen=True)
class Claim:
    """That `ours` has more of a measure than `theirs`, or more than none if there is no `theirs`."""

    ours: str
    theirs: str
    measure: str
    text: str


@dataclass(frozen=True)
class PaperFigure:
    """An entry of paper.toml, with what stands for several spelled out."""

    subject: str
    shows: list[str]
    claims: list[Claim]
    x: str = "gain"
    ys: Sequence[str] = ("others", "gold")
    prompts: int | None = None
    numbered: bool = False

    @staticmethod
    def of(entry: dict[str, Any]) -> "PaperFigure":
        shows = [key for each in entry["shows"] for (key,) in spelled_out(each)]
        claims = [
            Claim(ours, theirs, measure, text)
            for *keys, measures, text in entry.get("claims", [])
            for ours, theirs in spelled_out(*keys)
            for measure in (("others", "gold") if measures == "left" else (measures,))
        ]
        return PaperFigure(**entry | {"shows": shows, "claims": claims})

    def where(self, world: World) -> str:
        return TRAINED if self.prompts is None else world.sets[self.prompts]

    def needed(self, world: World) -> Iterator[tuple[str, list[str]]]:
        """Variants, and series that they need."""
        for key in self.shows:
            yield key, [name for what in (self.x, *self.ys) for name in series_for(what, world, key)]
        for claim in self.claims:
            for key in filter(None, (claim.ours, claim.theirs)):
                yield key, series_for(claim.measure, world, key)


def spelled_out(*keys: str) -> list[tuple[str, ...]]:
    """The variants themselves or, with "/*", on each of three rewards."""
    on = range(3) if any("*" in key for key in keys) else [0]
    return [tuple(key.replace("*", str(index)).replace("/0", "") for key in keys) for index in on]


def series_for(what: str, world: World, key: str) -> list[str]:
    """The series from which a measure, or an axis of a panel, is computed."""
    of_gain, held_out = ["reward", "std"], world.held_out(key)
    several: dict[str, list[str]] = {
        "epoch": [],
        "gain": of_gain,
        "queries": ["queries", *of_gain],
        "gold": [*of_gain, *world.truth],
        "others": [*of_gain, *held_out, *(f"{name} std" for name in held_out)],
    }
    return several.get(what, [what])


VARIANTS = {
    name: frontier.VARIANTS[values["from_frontier"]].settings if "from_frontier" in values else values
    for name, values in DATA["variants"].items()
}
FIGURES = {name: PaperFigure.of(entry) for name, entry in DATA["figures"].items()}


# --- what is needed, what there is, and the rest of the work

Place = tuple[str, str]  # a variant, and a prompt set or TRAINED
Held = dict[Place, dict[int, Series]]  # the results of each seed


@dataclass(frozen=True)
class Work:
    """All runs and evaluations of a world. runs: their folders; out: the results; seconds: of an epoch, if known."""

    world: World
    seeds: int
    jobs: int
    runs: Path
    out: Path
    seconds: float = 0.0
    command: str = "paper.py --all"

    def lines(self) -> list[Line]:
        """The results so far; those of frontier.py stand in for runs of the same settings."""
        return (pairs.results(HERE / "frontier.jsonl") if not self.world.gpu else []) + pairs.results(self.out)

    def used(self) -> list[Line]:
        """Those of the runs that figures need."""
        marks = {*self.marks.values()}
        return [line for line in self.lines() if line["settings"] in marks]

    @cached_property
    def marks(self) -> dict[tuple[str, int], str]:
        keys = {key for figure in FIGURES.values() for key, _ in figure.needed(self.world)}
        seeds = range(1, self.seeds + 1)
        return {(key, seed): pairs.fingerprint(self.world.config(key, seed)) for key in keys for seed in seeds}

    def held(self) -> Held:
        """What there is; later lines replace earlier ones."""
        of = {(line["settings"], line.get("prompts", TRAINED)): line["epochs"] for line in self.used()}
        found: Held = {}
        for (key, seed), mark in self.marks.items():
            for prompts in (TRAINED, *self.world.sets):
                if (mark, prompts) in of:
                    found.setdefault((key, prompts), {})[seed] = of[mark, prompts]
        return found

    def missing(self, needed: dict[Place, set[str]], there: Held) -> list[tuple[str, str, int]]:
        """The variants, prompt sets and seeds to run: seed by seed, so that what there is can be paired."""
        return [
            (key, prompts, seed)
            for seed in range(1, self.seeds + 1)
            for (key, prompts), names in needed.items()
            if not names <= there.get((key, prompts), {}).get(seed, {}).keys()
        ]

    def path(self, key: str, seed: int) -> Path:
        name = re.sub(r"[^\w.]+", "-", self.world.label(key))
        return self.runs / f"{name}-seed{seed}-{self.marks[key, seed][:8]}"

    def add(self, key: str, seed: int, epochs: Series, **more: str) -> None:
        line = {"variant": self.world.label(key), "seed": seed, "settings": self.marks[key, seed]}
        pairs.add(self.out, line | more, epochs)

    def do(self, needed: dict[Place, set[str]]) -> None:
        """Train and evaluate what is missing."""
        todo = self.missing(needed, self.held())
        runs = [(key, seed) for key, prompts, seed in todo if prompts == TRAINED]
        drawn: dict[tuple[int, int], list[tuple[str, str]]] = {}
        for key, prompts, seed in todo:
            if prompts != TRAINED:
                drawn.setdefault((index_of(key), seed), []).append((key, prompts))
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda run: self.train(run[0], run[1], needed[run[0], TRAINED]), runs))
            list(pool.map(lambda group: self.evaluate(group[1], drawn[group]), sorted(drawn)))

    def train(self, key: str, seed: int, names: set[str]) -> None:
        """Train a run and add its line, unless there is the same one: its folder may only have been deleted."""
        print(f"--- {self.world.label(key)}, seed {seed}", flush=True)
        run = pairs.train(self.path(key, seed), self.world.config(key, seed))
        epochs = trained_series(self.world, run, key)
        assert names <= epochs.keys(), f"{key} has no {names - epochs.keys()}"
        known = self.held().get((key, TRAINED), {}).get(seed, {})
        if known | {"seconds": []} != epochs | {"seconds": []}:
            self.add(key, seed, epochs)

    def evaluate(self, seed: int, wanted: list[tuple[str, str]]) -> None:
        """Draw the snapshots of runs with one seed on one reward, on all prompt sets.

        wanted: variants, and the prompt sets on which they lack a line. The pictures show those drawn earlier, too.
        """
        keys, world = list(dict.fromkeys(key for key, _ in wanted)), self.world
        for key in keys:
            if not self.finished(key, seed):
                self.train(key, seed, set())
        shown = {key for figure in FIGURES.values() if figure.prompts is not None for key in figure.shows}
        same = [key for key in sorted(shown) if index_of(key) == index_of(keys[0]) and self.finished(key, seed)]
        keys += [key for key in same if key not in keys]
        runs = [RunFolder.open(self.path(key, seed)) for key in keys]
        folder, judging = self.evaluations(world.reward(keys[0]), seed), [*world.held_out(keys[0]), *world.truth]
        print(f"--- evaluating {len(runs)} runs on {world.reward(keys[0])}, seed {seed}", flush=True)
        flags = {"rewards": ",".join(judging), "prompts": ",".join(world.sets), "images": str(IMAGES), "out": folder}
        options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        pairs.run_trainer("evaluate", *(str(run.path) for run in runs), *options)
        asked = ask(runs, Options(tuple(judging), tuple(PromptSet.load(name) for name in world.sets), IMAGES))
        found = Evaluation(asked, Results(folder, asked))
        for key, subject in zip(keys, asked.subjects, strict=True):
            for prompts in asked.sets:
                if (key, prompts.name) in wanted:
                    self.add(key, seed, evaluated_series(found, subject, prompts, judging), prompts=prompts.name)

    def finished(self, key: str, seed: int) -> bool:
        """Whether the run's folder is there, with all epochs."""
        return len(RunFolder(self.path(key, seed)).metrics()) >= self.world.config(key, seed).epochs

    def evaluations(self, reward: str, seed: int) -> Path:
        return self.runs / f"evaluation-{reward}-seed{seed}"

    def plan(self, needed: dict[Place, set[str]]) -> str:
        """How much there is to do."""
        todo, text, unknown = self.missing(needed, self.held()), [], []
        sizes = [sum(file.stat().st_size for file in self.path(*run).rglob("*")) for run in self.marks]
        size, times = max([self.world.mib * 2**20, *sizes]), self.times()
        runs = queries = images = 0
        seconds = disk = 0.0
        for key in dict.fromkeys(key for key, *_ in todo):
            config = self.world.config(key, 1)
            unfinished = sum(not self.finished(key, seed) for seed in {seed for other, _, seed in todo if other == key})
            snapshots = len({*range(0, config.epochs, config.output.samples_every), config.epochs})
            drawn = [prompts for other, prompts, _ in todo if other == key and prompts != TRAINED]
            shown = snapshots * IMAGES * sum(len(PromptSet.load(prompts).prompts) for prompts in drawn)
            each = config.epochs * config.samples_per_epoch * config.queries_per_sample
            own = times.get(self.world.label(key), times.get(name_of(key)))
            per_epoch = self.seconds or own or (statistics.median(times.values()) if times else 0)
            if not per_epoch:
                unknown.append(key)
            minutes = f"{config.epochs * per_epoch / 60:.1f}" if per_epoch else "?"
            text.append(f"{self.world.label(key)}: {unfinished} x {each} reward queries, {minutes} minutes")
            runs, queries, images = runs + unfinished, queries + unfinished * each, images + shown
            latents = config.samples_per_epoch * (config.steps + 1) * config.resolution**2 / 16 * 4  # bytes
            disk += unfinished * (size + getattr(config.policy, "replay", 0) * latents)
            seconds += per_epoch * (unfinished * config.epochs + shown / config.samples_per_epoch)
        hours = f"{seconds / 3600 / self.jobs:.1f} hours with {self.jobs} at a time"
        if unknown:
            hours = f"hours unknown for {len(unknown)} variants: measure the seconds of an epoch, such as those in the "
            hours += "metrics of a first run with --seeds 1, and give --epoch-seconds"
        what = f"{runs} runs, {queries} reward queries, {images} images of evaluations (each counts as a sample)"
        return "\n".join([*text, f"in all {what}: {hours}; {disk / 2**30:.1f} GiB of disk space"])

    def times(self) -> dict[str, float]:
        """The median seconds of an epoch, by variant."""
        seconds: dict[str, list[float]] = {}
        for line in self.lines():
            seconds.setdefault(line["variant"], []).extend(line["epochs"].get("seconds", []))
        return {name: statistics.median(values) for name, values in seconds.items() if values}


def needs(world: World, figures: Iterable[PaperFigure]) -> dict[Place, set[str]]:
    """The series that the figures need."""
    found: dict[Place, set[str]] = {}
    for figure in figures:
        for key, names in figure.needed(world):
            found.setdefault((key, figure.where(world)), set()).update(names)
            if figure.prompts is not None:  # a run whose snapshots are there: those of frontier.py have not all series
                found.setdefault((key, TRAINED), set()).update(series_for("others", world, key))
    return found


def trained_series(world: World, run: RunFolder, key: str) -> Series:
    """What the figures need of each epoch; an epoch without an overlap has None."""
    names = EPOCHS | {"reward": f"reward/{world.reward(key)}/mean", "std": f"reward/{world.reward(key)}/std"}
    for name in (*world.held_out(key), *world.truth):
        names |= {name: f"eval/{name}/mean", f"{name} std": f"eval/{name}/std"}
    metrics = run.metrics()
    epochs = pairs.series(metrics, names)
    for name, metric in OVERLAPS.items():
        if name.replace("overlap", "dormant") in epochs:
            epochs[name] = [line.get(metric) for line in metrics]
    return epochs


def evaluated_series(found: Evaluation, subject: Subject, prompts: PromptSet, judging: list[str]) -> Series:
    """The same of snapshots, first of all the base model."""
    snapshots = [BASE_EPOCH, *(cell.epoch for cell in subject.cells)]
    epochs: Series = {"queries": [0, *(subject.queries(epoch) for epoch in snapshots[1:])]}
    for name in (subject.training, *judging):
        scores = [found.scores(subject, epoch, prompts, name) for epoch in snapshots]
        mean, std = ("reward", "std") if name == subject.training else (name, f"{name} std")
        epochs[mean] = [round(statistics.fmean(values), 5) for values in scores]
        epochs[std] = [round(statistics.pstdev(values), 5) for values in scores]
    return epochs


# --- the rule, and what it decides

VERDICTS = ("confirmed", "not seen", "contradicted", "undecided")


def verdict(values: list[float]) -> str:
    """Decides a claim by the differences, one for each seed, of which it says that they are positive."""
    if len(values) < pairs.ENOUGH:
        return "undecided"
    middle, half = interval(values)
    return "not seen" if abs(middle) <= half else "confirmed" if middle > 0 else "contradicted"


def differences(world: World, there: Held, claim: Claim, prompts: str) -> list[float]:
    """By common seed, how much more of the measure `ours` has, where that can be told."""
    ours = there.get((claim.ours, prompts), {})
    theirs = there.get((claim.theirs, prompts), {}) if claim.theirs else dict.fromkeys(ours)
    names = {*series_for(claim.measure, world, claim.ours)}
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        both = [run for run in (ours[seed], theirs[seed]) if run is not None]
        if all(names <= run.keys() for run in both):
            found.append(difference(world, claim, both, prompts))
    return [value for value in found if value is not None]


def over_in(prompts: str) -> int:
    """The epochs that a value is the mean of: snapshots share their noise, and need no smoothing."""
    return pairs.SMOOTHING if prompts == TRAINED else 1


def difference(world: World, claim: Claim, both: list[Series], prompts: str) -> float | None:
    """The measure of one run less that of another, or of one run alone; None where it cannot be told."""
    over = over_in(prompts)
    if claim.measure == "queries":
        more = at_equal_gain(both, [run["queries"] for run in both], prompts)
        return None if more is None else -more
    if claim.measure in ("gold", "others"):
        held_out = world.held_out(claim.ours) if claim.measure == "others" else []
        parts = []
        for name in held_out or world.truth:
            more = at_equal_gain(both, [smooth(run[name], over) for run in both], prompts)
            spread = both[0][f"{name} std"][0] if held_out else 1.0
            if more is None or not spread:
                return None
            parts.append(more / spread)
        return statistics.fmean(parts)
    values = [of_run(claim.measure, run, over) for run in both]
    known = [value for value in values if value is not None]
    return known[0] - sum(known[1:]) if len(known) == len(values) else None


def at_equal_gain(both: list[Series], curves: list[list[float]], prompts: str) -> float | None:
    """How much higher the first curve is: the mean over the levels of training reward that both runs reach.

    Of snapshots, only levels beyond the first of each run count: a straight line from the base model to it would take
    from the faster run what it may have lost only later.
    """
    of_both = [gains(run, over_in(prompts)) for run in both]
    levels: Iterable[float] = pairs.LEVELS
    if prompts != TRAINED:
        levels = [level for level in SNAPSHOT_LEVELS if level > max(gain[1] for gain in of_both)]
    reached = []
    for level in levels:
        ours, theirs = (pairs.at(level, gain, curve) for gain, curve in zip(of_both, curves, strict=True))
        if ours is not None and theirs is not None:
            reached.append(ours - theirs)
    return statistics.fmean(reached) if reached else None


def of_run(measure: str, run: Series, over: int) -> float | None:
    """The measure of one run; None if no epoch has an overlap that could be above chance."""
    if measure == "gain":
        return gains(run, over)[-1]
    if measure in OVERLAPS:  # two sets drawn at random overlap by the share of the larger one
        dormant = run[measure.replace("overlap", "dormant")]
        found = zip(run[measure], dormant, dormant[:1] + dormant, strict=False)
        at_random = [(overlap, max(now, before)) for overlap, now, before in found if overlap is not None]
        above = [100 * (overlap - chance) / (100 - chance) for overlap, chance in at_random if chance < 100]
        return statistics.fmean(above) if above else None
    return statistics.fmean(run[measure][2:] or run[measure])  # the first two epochs are too early


# --- the page


def write_page(work: Work) -> None:
    there, shown = work.held(), {}
    for name, figure in FIGURES.items():
        path = work.out.with_name(f"{work.out.stem}-{name}.png")
        drawn = draw(work.world, figure, there, path) if figure.ys else copy(work, path) or path.exists()
        if drawn:
            shown[name] = path.name
    work.out.with_suffix(".md").write_text(page(work, there, shown), encoding="utf-8")


def page(work: Work, there: Held, shown: dict[str, str]) -> str:
    world, used = work.world, work.used()
    resetting: Any = world.config("tdpo-r", 1)
    when = pairs.when_and_where(used) if used else "Not run yet"
    found = {
        name: [
            (claim, differences(world, there, claim, figure.where(world)))
            for claim in figure.claims
            if claim.measure != "gold" or world.truth
        ]
        for name, figure in FIGURES.items()
    }
    decided = sum(len(values) >= pairs.ENOUGH for claims in found.values() for _, values in claims)
    numbered = [name for name, figure in FIGURES.items() if figure.numbered]
    lines = [
        f"# The figures of the TDPO paper on {world.name}",
        "",
        f"`python benchmarks/{work.command}`",
        "",
        f"{when}. Trained on {', '.join(world.rewards)}, and judged by the others and "
        f"{', '.join((*world.judges, *world.truth))}. Unseen prompts are those of {world.sets[0]}, complex ones those "
        f"of {world.sets[1]}, {IMAGES} images each. Neurons are reset after every {resetting.neurons.every} of "
        f"{resetting.epochs} epochs, about as often as in the paper, where it is every 10 of 100. Curves over training "
        f"are means of the last {pairs.SMOOTHING} epochs, but for those of neurons; curves of snapshots are not "
        f"smoothed. A square marks the first point; panels of more than {MOST_BANDS} curves have no intervals. Gains "
        "are in standard deviations of the first epoch's rewards, and those of snapshots in standard deviations of the "
        f"base model's images of the same prompts. Intervals are {CONFIDENCE:.0%} "
        "intervals (Student's t over seeds).",
        "",
        "The subjects and statements are those of the paper (arXiv 2402.08552), in our words, but for those marked as "
        f"our reading or our question, which may not be in it. Only figures {', '.join(numbered)} are known to have "
        "these numbers there, as the paper's text was not at hand when the others were numbered. What has no number "
        "is not in the paper.",
        "",
        "**The rule.** A statement says that one variant has more of something than another. It is judged by one or "
        "more comparisons, and each of them takes the difference seed by seed. At equal training reward, that is the "
        f"mean over those gains of {listed(pairs.LEVELS)} that both runs reach; of snapshots, which are some epochs "
        f"apart, over those of {listed(SNAPSHOT_LEVELS)} that are higher than the gains of both runs' first snapshots. "
        "A run is read where it first reaches a gain, on the line between two epochs: what it loses later at the same "
        "gain does not count. A seed without such a gain does not count, nor one on which the measure is undefined. "
        "What is compared is *confirmed* if the interval of the differences is above 0, *contradicted* if it is below, "
        f"*not seen* if it holds 0, and *undecided* with fewer than {pairs.ENOUGH} seeds that count. Of {decided} "
        f"comparisons that are decided, {decided * (1 - CONFIDENCE):.1f} would come out as confirmed or contradicted "
        "by chance if no variants differed. What is compared, the first three at equal training reward:",
        "",
        *(f"- *{name}*: {what}" for name, what in MEASURES.items() if name != "gold" or world.truth),
        "",
        *(line for note in world.notes for line in (note, "")),
        "The verdicts, by figure, as numbers of comparisons:",
        "",
        *row("figure", "subject", *VERDICTS, "runs and evaluations to be done", head=True),
    ]
    for name, figure in FIGURES.items():
        verdicts = [verdict(values) for _, values in found[name]]
        left = len(work.missing(needs(world, [figure]), there))
        lines += row(name, figure.subject, *(str(verdicts.count(each) or "") for each in VERDICTS), str(left or ""))
    lines += ["", *rivals(world, there), *gained(world, there)]
    for name, figure in FIGURES.items():
        title = f"Figure {name}" if name.isdigit() else name.capitalize()
        lines += [f"## {title}: {figure.subject}", ""]
        if figure.claims:
            lines += row("statement", "compared", "by", "difference", "seeds that count", "found", head=True)
        for claim, values in found[name]:
            compared = " and ".join(world.label(key) for key in (claim.ours, claim.theirs) if key)
            difference = pairs.with_interval(values)
            lines += row(claim.text, compared, claim.measure, difference, str(len(values)), verdict(values))
        lines += ["", f"![{title}]({shown[name]})" if name in shown else "Not drawn yet.", ""]
    if not world.gpu and work.out.with_name(WHOLE).exists():
        lines += [
            "## All weights: the neurons of a policy that is trained as a whole",
            "",
            "The paper trains a LoRA, and leaves all weights to future work. [full.py](full.md) trains them: the "
            "dormant neurons of each feed-forward layer, and those that a reset of the policy affects.",
            "",
            f"![All weights]({WHOLE})",
            "",
        ]
    return "\n".join(lines).rstrip().replace("\n\n\n", "\n\n") + "\n"


def listed(levels: Iterable[float]) -> str:
    return ", ".join(f"{level:g}" for level in levels)


def rivals(world: World, there: Held) -> list[str]:
    """What each algorithm reaches, and which of their aims."""
    lost = [f"{name} lost at the end" for name in world.truth]
    head = ["aim", "seeds that reach it", "reward queries until then", "slowest, minutes", "prompts in an epoch"]
    head += ["reward queries in all", "reward at the end", "gain at the end", *lost]
    lines = [
        f"What each algorithm reaches on {world.rewards[0]}. The aims are smoothed gains, to be reached on every seed"
        f"{'' if world.gpu else ' in at most five minutes'}; seeds that fall short count neither for the reward "
        "queries nor for the minutes. Other work ran beside these runs. The [log](../docs/LOG.md) has what was tried "
        "where an aim is missed. With few prompts in an epoch, the gain depends more on which prompts the first epoch "
        "happened to draw:",
        "",
    ]
    lines += row("algorithm", *head, head=True)
    for key in FIGURES["rivals"].shows:
        runs, aim = list(there.get((key, TRAINED), {}).values()), DATA["aims"].get(key)
        if not runs:
            lines += row(key, *["not run yet"] * len(head))
            continue
        config, cells = world.config(key, 1), [key, "-", "-", "-", "-"]
        if aim:
            reached = [run for run in runs if max(gains(run)) >= aim]
            cells[1:3] = f"{aim:+.1f}", f"{len(reached)} of {len(runs)}"
            if reached:
                queries = [pairs.at(aim, gains(run), run["queries"]) for run in reached]
                seconds = [pairs.at(aim, gains(run), [*accumulate(run["seconds"])]) for run in reached]
                cells[3:5] = f"{statistics.fmean(queries):.0f}", f"{max(seconds) / 60:.1f}"
        cells += [str(config.samples_per_epoch // config.samples_per_prompt), str(runs[0]["queries"][-1])]
        cells.append(pairs.with_interval([smooth(run["reward"])[-1] for run in runs]).lstrip("+"))
        cells.append(pairs.with_interval([gains(run)[-1] for run in runs]))
        cells += [pairs.with_interval([pairs.lost(run, name)[-1] for run in runs]) for name in world.truth]
        lines += row(*cells)
    return [*lines, ""]


def gained(world: World, there: Held) -> list[str]:
    """What the runs of each variant gain by their end, for each training reward."""
    lines = [
        "What each variant gains of its training reward by the end, and over how many seeds. Variants that gain less "
        f"than {min(pairs.LEVELS):g} cannot be compared at equal training reward; the [log](../docs/LOG.md) has what "
        "was tried to gain more:",
        "",
        *row("variant", *world.rewards, head=True),
    ]
    ends: dict[str, dict[str, str]] = {}
    for key, prompts in needs(world, FIGURES.values()):
        if prompts == TRAINED and (runs := there.get((key, TRAINED))):
            value = f"{pairs.with_interval([gains(run)[-1] for run in runs.values()])} ({len(runs)})"
            ends.setdefault(name_of(key), {})[world.reward(key)] = value
    for name, of_reward in ends.items():
        lines += row(name, *(of_reward.get(reward, "") for reward in world.rewards))
    return [*lines, ""] if ends else []


def draw(world: World, figure: PaperFigure, there: Held, path: Path) -> bool:
    """A panel for each training reward and each series, over the epochs or the snapshots; False if there are none."""
    several = {"gold": lambda key: world.truth, "others": world.held_out}
    panels: dict[tuple[str, str], dict[int, list[Point]]] = {}
    numbers, place = numbers_of(figure), figure.where(world)
    for key in figure.shows:
        for y in [name for what in figure.ys for name in several.get(what, lambda key, what=what: [what])(key)]:
            runs = [run for run in there.get((key, place), {}).values() if y in {*run, "gain"}]
            if points := curve(runs, figure.x, y, over_in(place)):
                panels.setdefault((world.reward(key), y), {})[numbers[name_of(key)]] = points
    if not panels:
        return False
    rows = -(-len(panels) // 2)
    canvas = Figure(figsize=(11, 3.4 * rows), dpi=DPI, layout="constrained", facecolor="white")
    places = list(canvas.subplots(rows, 2, squeeze=False).flat)
    lines: dict[int, Line2D] = {}
    for axes, ((reward, y), curves) in zip(places, panels.items(), strict=False):
        lines |= draw_setups(axes, curves, several=curves if len(curves) <= MOST_BANDS else ())
        if figure.x == "queries":
            axes.set_xlim(0, 1.02 * min(points[-1].x for points in curves.values()))  # where all have a value
        axes.set(xlabel=AXES.get(figure.x, figure.x), ylabel=AXES.get(y, y))
        axes.set_title(f"trained on {reward}", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    labels = [name for name, number in numbers.items() if number in lines]
    drawn = [lines[numbers[name]] for name in labels]
    looks = [Line2D([], [], color=line.get_color(), linestyle=line.get_linestyle(), linewidth=1.8) for line in drawn]
    look: dict[str, Any] = {"loc": "outside lower center", "ncols": PER_ROW, "handlelength": 4, "frameon": False}
    canvas.legend(looks, labels, fontsize=9, **look)
    canvas.savefig(path)
    return True


def numbers_of(figure: PaperFigure) -> dict[str, int]:
    """The number that decides how a variant is drawn: the same in all figures for those of the first."""
    main, shown = (dict.fromkeys(map(name_of, each.shows)) for each in (next(iter(FIGURES.values())), figure))
    return {name: number for number, name in enumerate(main | shown) if name in shown}


def curve(runs: list[Series], x: str, y: str, over: int) -> list[Point]:
    """A point for each epoch or snapshot that all runs have: the mean over runs, and its interval.

    over: the epochs that a value is the mean of.
    """
    neurons = {*OVERLAPS, "dormant", "policy dormant"}
    ys = [gains(run, over) if y == "gain" else run[y] if y in neurons else smooth(run[y], over) for run in runs]
    of_x: dict[str, Callable[[Series], list[float]]] = {
        "gain": lambda run: gains(run, over),
        "queries": lambda run: run["queries"],
    }
    xs = [of_x[x](run) if x in of_x else range(1, len(run["reward"]) + 1) for run in runs]
    points = []
    for epoch, (at_x, at_y) in enumerate(zip(zip(*xs, strict=False), zip(*ys, strict=False), strict=False)):
        if None not in at_y:
            middle, half = interval(at_y)
            points.append(Point(epoch, statistics.fmean(at_x), middle, middle - half, middle + half))
    return points


def copy(work: Work, path: Path) -> bool:
    """Copy the picture that `evaluate` drew of the first reward's first seed, smaller; False if there is none."""
    source = picture(work.evaluations(work.world.rewards[0], 1), EQUAL, work.world.rewards[0], work.world.sets[0])
    if not source.exists():
        return False
    with Image.open(source) as image:
        small = image.convert("RGB").resize((WIDE, round(image.height * WIDE / image.width)), Image.Resampling.LANCZOS)
    small.quantize(128).save(path, optimize=True)
    return True


# --- the command line


def main() -> None:
    presets = [entry["preset"].format(name) for entry in DATA["worlds"].values() for name in entry["rewards"]]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--figure", nargs="+", choices=list(FIGURES), default=[], help="figures to work on")
    parser.add_argument("--all", action="store_true", help="work on all figures")
    parser.add_argument("--seeds", type=count, default=SEEDS, help="seeds 1 to this for every variant")
    parser.add_argument("--jobs", type=count, help="runs at a time, one thread each (default: 2, or 1 on a GPU)")
    parser.add_argument("--preset", choices=list(dict.fromkeys(presets)), default="shapes", help="what to train")
    parser.add_argument("--model", help="another model than the preset's: a folder, a hub id or a checkpoint")
    parser.add_argument("--plan", action="store_true", help="only say how much there is to do")
    parser.add_argument("--page", action="store_true", help="only write the page from what there is")
    parser.add_argument("--epoch-seconds", type=positive, default=0.0, help="seconds of an epoch, for the plan")
    named: dict[str, Any] = {"nargs": "+", "type": pair, "default": []}
    parser.add_argument("--prompts", metavar="REWARD=FILE", help="training prompts of a reward", **named)
    parser.add_argument("--set", metavar="NAME=VALUE", help="settings of all runs, for trials", **named)
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/paper, or runs/paper-PRESET)")
    parser.add_argument("--out", type=Path, help="the results (default: paper.jsonl, or paper-PRESET.jsonl)")
    args = parser.parse_args()
    stem = "paper" if args.preset == "shapes" else f"paper-{args.preset}"
    changed: dict[str, Any] = {"model": args.model} if args.model else {}
    for name, value in args.set:
        for part in reversed(name.split(".")):
            value = {part: value}
        changed = merge(changed, value)
    if changed and not (args.out or args.plan):
        parser.error("got --model or --set without --out; expected a file for the results, beside which the page goes")
    runs, out = args.runs or Path("runs") / stem, args.out or HERE / f"{stem}.jsonl"
    if out.suffix != ".jsonl" or not out.parent.is_dir():
        parser.error(f"got --out {out}; expected a .jsonl in a folder that is there")
    world = world_of(args.preset, changed, dict(args.prompts))
    if unknown := world.prompts.keys() - {*world.rewards}:
        parser.error(f"got prompts for {', '.join(sorted(unknown))}; expected one of {', '.join(world.rewards)}")
    jobs = args.jobs or (1 if world.gpu else 2)
    work = Work(world, args.seeds, jobs, runs, out, args.epoch_seconds, command_of(args))
    try:
        work.lines()
    except ValueError as error:
        parser.error(str(error))
    needed = needs(work.world, FIGURES.values() if args.all else [FIGURES[name] for name in args.figure])
    if not needed and not args.page:
        parser.error("got no figure; expected --figure N or --all, or --page for a page of what there is")
    if needed:
        check_settings(world, needed, parser)
        print(work.plan(needed), flush=True)
    if not args.plan:
        if not args.page:
            check_device(work.world, parser)
            work.do(needed)
        write_page(work)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number above 0")
    return value


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a name, = and a value")
    return name, value


def command_of(args: argparse.Namespace) -> str:
    """The command that makes all figures of the page."""
    words = ["paper.py", "--all"]
    words += ["--preset", args.preset] if args.preset != "shapes" else []
    words += ["--model", args.model] if args.model else []
    for flag, pairs_given in (("--prompts", args.prompts), ("--set", args.set)):
        words += [flag, *("=".join(each) for each in pairs_given)] if pairs_given else []
    return shlex.join([*words, "--seeds", str(args.seeds)])


def check_settings(world: World, needed: Iterable[Place], parser: argparse.ArgumentParser) -> None:
    """Refuse settings that a run would refuse, and prompts that are not there."""
    for key in dict.fromkeys(key for key, _ in needed):
        try:
            source = world.config(key, 1).prompts
        except ValueError as error:
            parser.error(f"{world.label(key)}: {error}")
        try:
            load_prompts(source)
        except ValueError as error:
            parser.error(f"{world.label(key)}: {error} (--prompts {world.reward(key)}=FILE)")


def check_device(world: World, parser: argparse.ArgumentParser) -> None:
    import torch

    if world.gpu and not torch.cuda.is_available():
        parser.error(f"got {world.name} without a GPU; expected one, or --plan")


if __name__ == "__main__":
    main()
