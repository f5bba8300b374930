"""What the critic's cheaper ways of reading keep: `python benchmarks/critic_reading.py`.

Trains on Shapes over paired seeds (the same prompts and noise) with a critic that reads full images, small ones, those
of the tiny decoder, or some steps only: TDPO-R, whose critic reads noisy images, and TDPO-G, whose critic reads the
clean images that are predicted of them. The page compares the variance of the returns that the critic explains, the
training reward, what is left of shapes-gold, and the seconds. Writes critic_reading.jsonl (one line per run: the
series of each epoch) and critic_reading.md beside this file.

A run that the .jsonl holds already is not repeated, and a stopped one is resumed. Seconds compare only runs on a quiet
machine, with as many jobs as cores or fewer.
"""

import argparse
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from pairs import (
    Line,
    Runs,
    Series,
    by_variant,
    gains,
    lost,
    results,
    row,
    series,
    train_missing,
    when_and_where,
    with_interval,
)

from comfy_tdpo.trainer.config import TrainConfig, make_config
from comfy_tdpo.trainer.evaluation.numbers import CONFIDENCE

HERE = Path(__file__).parent
REWARD, GOLD = "shapes-aesthetic", "shapes-gold"
SEEDS = 5
FROM = 2  # epochs of which the critic has learned too little to be compared
FULL: dict[str, Any] = {"image_size": "none"}
READINGS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "48 px": {"image_size": 48},
    "32 px": {"image_size": 32},
    "16 px": {"image_size": 16},
    "tiny": FULL | {"decoder": "tiny"},
    "every 5th": FULL | {"read_every": 5},
    "every 5th, interpolated": FULL | {"read_every": 5, "between": "interpolated"},
    "tiny, every 5th": FULL | {"decoder": "tiny", "read_every": 5},
    "tiny, 32 px, every 5th": {"image_size": 32, "decoder": "tiny", "read_every": 5},
}
BASELINE = "full"
ALGORITHMS = {"tdpo-r": "whose critic reads noisy images", "tdpo-g": "whose critic reads predicted clean images"}
VARIANTS = {  # (algorithm, reading)
    reading if algorithm == "tdpo-r" else f"{algorithm}, {reading}": (algorithm, reading)
    for algorithm in ALGORITHMS
    for reading in READINGS
}
COLUMNS = ("explained variance", "first third", "last third", "gain", "gold lost", "seconds", "sampling")
QUICK = {"epochs": 2, "samples_per_epoch": 6, "samples_per_update": 6, "output": {"grid_images": 1}}
NAMES = {
    "reward": f"reward/{REWARD}/mean",
    "std": f"reward/{REWARD}/std",
    GOLD: f"eval/{GOLD}/mean",
    "explained": "critic/explained_variance",
    "explained_first": "critic/explained_variance_first",
    "explained_last": "critic/explained_variance_last",
    "sampling": "time/sample_s",
    "seconds": "time/epoch_s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/critic-reading"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 1 to this for every variant")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), metavar="NAME", help="what to train now")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "critic_reading.jsonl", help="the results; .md beside it")
    parser.add_argument("--quick", action="store_true", help="train next to nothing, to try this; give another --out")
    args = parser.parse_args()
    if unknown := sorted(set(args.variants) - VARIANTS.keys()):
        parser.error(f"got variant {unknown[0]!r}; expected some of {', '.join(VARIANTS)}")

    def config(name: str, seed: int) -> TrainConfig:
        return config_of(name, seed, args.quick)

    wanted = [(name, seed) for seed in range(1, args.seeds + 1) for name in args.variants]
    train_missing(wanted, config, lambda run: series(run.metrics(), NAMES), args.runs, args.out, args.jobs)
    found = results(args.out)
    args.out.with_suffix(".md").write_text(page(by_variant(found, VARIANTS, config), found), encoding="utf-8")


@cache
def config_of(name: str, seed: int, quick: bool = False) -> TrainConfig:
    algorithm, reading = VARIANTS[name]
    values: dict[str, Any] = {"algorithm": algorithm, "seed": seed, "critic": READINGS[reading], "eval_rewards": [GOLD]}
    return make_config("shapes", overrides=values | (QUICK if quick else {}))


def page(runs: Runs, found: list[Line]) -> str:
    lines = [
        "# What the critic's cheaper ways of reading keep",
        "",
        "`python benchmarks/critic_reading.py`",
        "",
        f"{when_and_where(found)}; one thread for each run. Preset `shapes`; runs of one seed share prompts and "
        f"noise. Explained variance is the mean of epochs {FROM + 1} to the last. The gain of {REWARD}, in standard "
        "deviations of the first epoch's rewards, and the gold lost are those of the end. The seconds are those of an "
        "epoch, and of its sampling, in which the critic reads. Differences are taken seed by seed; their intervals "
        f"hold {CONFIDENCE:.0%} (Student's t over seeds). Rows with other numbers of seeds compare by these alone.",
        "",
        "Where the critic reads every 5th step, the others have the embedding of the last one read. Interpolated, they "
        "know some of the noise of the steps that follow; variance explained by that is no merit.",
        "",
    ]
    for algorithm, told in ALGORITHMS.items():
        of_algorithm = {
            reading: runs[name] for name, (its, reading) in VARIANTS.items() if its == algorithm and name in runs
        }
        if of_algorithm:
            lines += [f"## {algorithm}, {told}", "", *tables(of_algorithm)]
    return "\n".join(lines)


def tables(runs: Runs) -> list[str]:
    """The figures of each way of reading, and its differences from the full one."""
    lines = row("critic reads", "seeds", *COLUMNS, head=True)
    for name, seeds in runs.items():
        cells = [f"{statistics.fmean(values.values()):{form}}" for values, form in figures(seeds)]
        lines += row(name, str(len(seeds)), *cells)
    lines += ["", f"Differences from `{BASELINE}`:", "", *row("critic reads", "pairs", *COLUMNS, head=True)]
    for name, seeds in runs.items():
        if name != BASELINE and BASELINE in runs:
            pairs = zip(figures(seeds), figures(runs[BASELINE]), strict=True)
            count = len(seeds.keys() & runs[BASELINE].keys())
            lines += row(
                name, str(count), *(with_interval(differences(ours, theirs)) for (ours, _), (theirs, _) in pairs)
            )
    return [*lines, ""]


def figures(seeds: dict[int, Series]) -> list[tuple[dict[int, float], str]]:
    """The columns of the table: by seed, and how they are printed."""

    def late(name: str) -> dict[int, float]:
        return {seed: statistics.fmean(epochs[name][FROM:] or epochs[name]) for seed, epochs in seeds.items()}

    explained = [(late(name), ".3f") for name in ("explained", "explained_first", "explained_last")]
    gain = {seed: gains(epochs)[-1] for seed, epochs in seeds.items()}
    gold = {seed: lost(epochs, GOLD)[-1] for seed, epochs in seeds.items()}
    return [*explained, (gain, "+.2f"), (gold, ".3f"), (late("seconds"), ".1f"), (late("sampling"), ".1f")]


def differences(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


if __name__ == "__main__":
    main()
