"""All weights or a LoRA, at equal reward queries: `python benchmarks/full.py`.

Trains both on Shapes, by the recipe and by TDPO-R, over paired seeds (the same prompts and noise), and compares what
is gained and lost after the same number of queries, the policy's dormant neurons, and what it takes. With all weights,
TDPO-R also resets the policy's neurons, the dormant or the active ones. Writes full.jsonl (one line per run: the series
of each epoch), full.md, full.png and full-neurons.png beside this file.

A run that full.jsonl holds already is not repeated, and a stopped one is resumed.
"""

import argparse
import statistics
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from pairs import (
    Line,
    Runs,
    Series,
    at,
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
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.neuron_log import read_policy_neurons

HERE = Path(__file__).parent
REWARD, GOLD, JUDGE = "shapes-aesthetic", "shapes-gold", "shapes-judge"
SEEDS = 3
LEVEL = 0.75  # of the training reward gained, for the queries that it takes
LORA, FULL = "LoRA", "all weights"
ALGORITHMS = ("ddpo-g", "tdpo-r")
KINDS = {LORA: "lora", FULL: "full"}
RESETS, EVERY = ("dormant", "active"), 3  # which of the policy's neurons, and the epochs between two resets
VARIANTS = {f"{algorithm}, {kind}": (algorithm, kind, "none") for algorithm in ALGORITHMS for kind in KINDS}
WHOLE = f"tdpo-r, {FULL}"
VARIANTS |= {f"{WHOLE}, {reset} reset": ("tdpo-r", FULL, reset) for reset in RESETS}
LAYERS = ("dormant", "reset")  # what is shown of each layer
NAMES = {
    "queries": "reward_queries",
    "reward": f"reward/{REWARD}/mean",
    "std": f"reward/{REWARD}/std",
    GOLD: f"eval/{GOLD}/mean",
    JUDGE: f"eval/{JUDGE}/mean",
    "dormant": "policy_neurons/dormant_percent",
    "seconds": "time/epoch_s",
    "bytes": "memory/peak_bytes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/full"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 1 to this for every variant")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), metavar="NAME", help="what to train now")
    parser.add_argument("--epochs", type=int, help="of each run; the preset's if not given")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "full.jsonl", help="the results; .md and .png beside it")
    args = parser.parse_args()
    if unknown := sorted(set(args.variants) - VARIANTS.keys()):
        parser.error(f"got variant {unknown[0]!r}; expected some of {'; '.join(VARIANTS)}")
    wanted = [(name, seed) for seed in range(1, args.seeds + 1) for name in args.variants]
    configure = partial(config_of, epochs=args.epochs)
    train_missing(wanted, configure, series_of, args.runs, args.out, args.jobs)
    found = results(args.out)
    if not found:
        parser.error(f"got no results in {args.out} and no variants to train; expected either")
    runs = by_variant(found, VARIANTS, configure)
    draw(runs, args.out.with_suffix(".png"))
    draw_neurons(runs, args.out.with_name(f"{args.out.stem}-neurons.png"))
    args.out.with_suffix(".md").write_text(page(runs, found), encoding="utf-8")


@cache
def config_of(name: str, seed: int, epochs: int | None = None) -> TrainConfig:
    algorithm, kind, reset = VARIANTS[name]
    changes: dict[str, Any] = {"algorithm": algorithm, "policy": {"train": KINDS[kind]}, "seed": seed}
    neurons = {"policy_measure": True} | ({"policy_reset": reset, "every": EVERY} if reset != "none" else {})
    changes |= {"eval_rewards": [JUDGE, GOLD], "neurons": neurons}
    return make_config("shapes", overrides=changes | ({"epochs": epochs} if epochs else {}))


def series_of(run: RunFolder) -> Series:
    """What the page needs of each epoch; of all weights, also the percentage of each layer's neurons."""
    epochs = series(run.metrics(), NAMES)
    if run.config.policy.train == "full":
        for share in LAYERS:
            epochs[f"{share} by layer"] = [
                {name: round(100 * number / record.count[name], 2) for name, number in getattr(record, share).items()}
                for record in read_policy_neurons(run.path, run.config.epochs)
            ]
    return epochs


# --- the page


def page(runs: Runs, found: list[Line]) -> str:
    lines = [
        "# All weights or a LoRA",
        "",
        "`python benchmarks/full.py`",
        "",
        f"{when_and_where(found)}. Preset `shapes`, training reward {REWARD}. Runs of one seed "
        "share prompts and noise, and have had the same number of reward queries at the end. Gains are in standard "
        "deviations of the first epoch's rewards; what is lost is below the first epoch's mean. Intervals hold "
        f"{CONFIDENCE:.0%} (Student's t over seeds).",
        "",
        "![Gained and lost over queries](full.png)",
        "",
        *row("at the end", "seeds", "learning rate", "gain", "gold lost", "judge lost", head=True),
    ]
    for name, seeds in runs.items():
        ends = [[curve(epochs)[-1] for epochs in seeds.values()] for curve in (gains, _gold_lost, _judge_lost)]
        rate = f"{config_of(name, 1).policy.lr:g}"
        lines += row(name, str(len(seeds)), rate, *(with_interval(values) for values in ends))
    lines += ["", f"{FULL} minus {LORA}, seed by seed:", ""]
    lines += row("algorithm", "seeds", "gain", "gold lost", "judge lost", head=True)
    for algorithm in ALGORITHMS:
        ours, theirs = (runs.get(f"{algorithm}, {kind}", {}) for kind in (FULL, LORA))
        both = sorted(ours.keys() & theirs.keys())
        cells = [
            with_interval([curve(ours[seed])[-1] - curve(theirs[seed])[-1] for seed in both])
            for curve in (gains, _gold_lost, _judge_lost)
        ]
        lines += row(algorithm, str(len(both)), *cells) if both else []
    lines += [
        "",
        "Dormant neurons of the policy in percent: of a LoRA, those of its rank; of all weights, the hidden ones of "
        "the feed-forward layers. And what a run takes:",
        "",
        *row(
            "variant",
            "dormant, first",
            "last",
            f"queries to {LEVEL:+.2f}",
            "seconds",
            "GiB",
            head=True,
        ),
    ]
    for name, seeds in runs.items():
        dormant = [(epochs["dormant"][0], epochs["dormant"][-1]) for epochs in seeds.values() if "dormant" in epochs]
        reached = [at(LEVEL, gains(epochs), epochs["queries"]) for epochs in seeds.values()]
        lines += row(
            name,
            *(_mean([pair[i] for pair in dormant], ".1f") for i in range(2)),
            f"{_mean([q for q in reached if q is not None], '.0f')} ({sum(q is not None for q in reached)})",
            _mean([sum(epochs["seconds"]) for epochs in seeds.values()], ".0f"),
            _mean([max(epochs["bytes"]) / 2**30 for epochs in seeds.values()], ".2f"),
        )
    lines += [
        "",
        "Layer by layer, from the first to the last, without resets of the policy's neurons, and with resets after "
        f"every {EVERY} epochs, then of the critic's active neurons too; means over seeds:",
        "",
        "![Dormant and reset neurons of each layer over the epochs](full-neurons.png)",
    ]
    return "\n".join(lines) + "\n"


def _gold_lost(epochs: Series) -> list[float]:
    return lost(epochs, GOLD)


def _judge_lost(epochs: Series) -> list[float]:
    return lost(epochs, JUDGE)


def _mean(values: list[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}}" if values else "-"


def draw(runs: Runs, path: Path) -> None:
    """What is gained, and what is lost of gold, over the queries; means over seeds."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    titles = {f"{REWARD} gained, in standard deviations": gains, f"{GOLD} lost": _gold_lost}
    for axes, (title, curve) in zip(panels, titles.items(), strict=True):
        for index, (name, seeds) in enumerate(runs.items()):
            curves = [curve(epochs) for epochs in seeds.values()]
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(next(iter(seeds.values()))["queries"], means, "o-", markersize=3, label=name, color=f"C{index}")
        axes.set_title(title)
        axes.set_xlabel("reward queries")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_neurons(runs: Runs, path: Path) -> None:
    """The dormant neurons of each layer, and below them those that were reset, in percent."""
    whole = {name: seeds for name, seeds in runs.items() if name.startswith(WHOLE)}
    if not whole:
        return
    size = (4.2 * len(whole), 5.6)
    figure, panels = pyplot.subplots(2, len(whole), figsize=size, squeeze=False, layout="constrained")
    for column, (name, seeds) in zip(panels.T, whole.items(), strict=True):
        for axes, share in zip(column, LAYERS, strict=True):
            by_epoch = list(zip(*(epochs[f"{share} by layer"] for epochs in seeds.values()), strict=True))
            for layer in sorted({layer for epoch in by_epoch for layer in epoch[0]}, key=_depth):
                means = [statistics.fmean(cells.get(layer, 0.0) for cells in epoch) for epoch in by_epoch]
                axes.plot(range(1, len(means) + 1), means, "o-", markersize=3, label=layer.partition(".transformer")[0])
            axes.set_title(f"{name}: {share}", fontsize="medium")
            axes.set_xlabel("epoch")
            axes.set_ylabel("percent of the layer's neurons")
            axes.set_visible(bool(axes.lines))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower left", fontsize="small")  # where it is empty
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _depth(layer: str) -> tuple[int, str]:
    """Where a layer of a U-Net comes: on the way down, in the middle, on the way up."""
    return ("down", "mid", "up").index(layer.partition("_")[0]), layer


if __name__ == "__main__":
    main()
