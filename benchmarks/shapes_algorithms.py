"""The paper's four algorithms on Shapes after equal reward queries: `python benchmarks/shapes_algorithms.py`.

Trains each of them on every seed with the preset `shapes`, one run after the other, and writes a table with date and
machine; `--algorithms` names others. Runs that are already in the folder are not repeated; stopped ones are resumed.
"""

import argparse
import statistics
import sys
from datetime import date
from pathlib import Path

from pairs import machine, train

from comfy_tdpo.methods import ALGORITHMS as EVERY
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.run import EpochMetrics, RunFolder

ALGORITHMS = ("tdpo-r", "tdpo", "ddpo-100", "ddpo-2")
REWARD = "reward/shapes-aesthetic"
WATCHED = ("eval/shapes-judge/mean", "eval/shapes-gold/mean")
LAST = 3  # epochs whose mean is the end of a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this for every algorithm")
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=list(EVERY))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/shapes_algorithms.md"))
    args = parser.parse_args()
    for seed in range(1, args.seeds + 1):
        for algorithm in args.algorithms:
            print(f"--- {algorithm}, seed {seed}", flush=True)
            train(args.runs / f"{algorithm}-seed{seed}", make_config(overrides={"algorithm": algorithm, "seed": seed}))
    command = " ".join(["python benchmarks/shapes_algorithms.py", *sys.argv[1:]])
    results = {
        name: [measure(args.runs / f"{name}-seed{s + 1}") for s in range(args.seeds)] for name in args.algorithms
    }
    text = report(results, command)
    args.out.write_text(text, encoding="utf-8")
    print(text)


def measure(path: Path) -> dict[str, float]:
    """First epoch against the mean of the last ones."""
    metrics = RunFolder.open(path).metrics()
    first, last = metrics[0], metrics[-LAST:]
    result = {"queries": last[-1]["reward_queries"]}
    for name in (f"{REWARD}/mean", *WATCHED):
        result[f"first {name}"], result[name] = first[name], mean_of(last, name)
    result["gain"] = (result[f"{REWARD}/mean"] - first[f"{REWARD}/mean"]) / first[f"{REWARD}/std"]
    return result


def mean_of(metrics: list[EpochMetrics], name: str) -> float:
    return statistics.fmean(m[name] for m in metrics)


def report(results: dict[str, list[dict[str, float]]], command: str) -> str:
    """The page: a table over seeds, and every seed's figures below it."""
    seeds = len(next(iter(results.values())))
    names = (f"{REWARD}/mean", *WATCHED)
    lines = [
        "# Algorithms on Shapes",
        "",
        f"`{command}`",
        "",
        f"{date.today()}, {machine()}; one thread for each run. Mean ± standard deviation over {seeds} seeds: first "
        f"epoch → mean of the last {LAST} epochs. The gain is in standard deviations of the first epoch's rewards.",
        "",
        "| algorithm | reward queries | shapes-aesthetic (trained on) | gain | shapes-judge | shapes-gold |",
        "|---|---|---|---|---|---|",
    ]
    for algorithm, runs in results.items():
        cells = [f"{spread(runs, f'first {name}')} → {spread(runs, name)}" for name in names]
        row = [algorithm, f"{runs[0]['queries']:.0f}", cells[0], spread(runs, "gain"), *cells[1:]]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| algorithm | seed | gain | shapes-judge | shapes-gold |", "|---|---|---|---|---|"]
    for algorithm, runs in results.items():
        for seed, run in enumerate(runs, start=1):
            lines.append(
                f"| {algorithm} | {seed} | {run['gain']:+.2f} | {run[WATCHED[0]]:.3f} | {run[WATCHED[1]]:.3f} |"
            )
    return "\n".join(lines) + "\n"


def spread(runs: list[dict[str, float]], name: str) -> str:
    values = [run[name] for run in runs]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
