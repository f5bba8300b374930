"""What the default method gains on the flow model of Shapes, seed by seed: `python benchmarks/shapes_flow.py`.

Trains the preset `shapes-flow` on every seed; `--preset shapes` trains the U-Net, for comparison. Writes
shapes_flow.jsonl (one line per run: the series of each epoch) and shapes_flow.md beside this file. A run that the
.jsonl holds already is not repeated, and a stopped one is resumed.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from pairs import Series, add, at, fingerprint, gains, lost, results, row, series, train, with_interval

from comfy_tdpo.shapes import MODELS
from comfy_tdpo.trainer.config import TrainConfig, make_config

HERE = Path(__file__).parent
REWARD, GOLD, JUDGE = "shapes-aesthetic", "shapes-gold", "shapes-judge"
SEEDS = 5
WANTED = 1.0  # gain, in standard deviations of the first epoch's rewards
NAMES = {
    "queries": "reward_queries",
    "reward": f"reward/{REWARD}/mean",
    "std": f"reward/{REWARD}/std",
    GOLD: f"eval/{GOLD}/mean",
    JUDGE: f"eval/{JUDGE}/mean",
    "seconds": "time/epoch_s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes-flow"), help="folder of the runs")
    parser.add_argument("--preset", choices=list(MODELS), default="shapes-flow", help="what to train now")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(1, SEEDS + 1)), help="of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "shapes_flow.jsonl", help="the results; .md beside it")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: run(args.preset, seed, args.runs, args.out), args.seeds))
    args.out.with_suffix(".md").write_text(page(args.out), encoding="utf-8")


@cache
def config_of(preset: str, seed: int) -> TrainConfig:
    return make_config(preset, overrides={"eval_rewards": [JUDGE, GOLD], "seed": seed})


def run(preset: str, seed: int, runs: Path, out: Path) -> None:
    """Train a preset with one seed, unless `out` holds it, and add its series to `out`."""
    config = config_of(preset, seed)
    mark = fingerprint(config)
    if any(result["settings"] == mark for result in results(out)):
        return
    print(f"--- {preset}, seed {seed}", flush=True)
    finished = train(runs / f"{preset}-seed{seed}-{mark[:8]}", config)
    add(out, {"preset": preset, "seed": seed, "settings": mark}, series(finished.metrics(), NAMES))


def page(out: Path) -> str:
    """The runs with today's settings, and their means."""
    found = [line for line in results(out) if line["settings"] == fingerprint(config_of(line["preset"], line["seed"]))]
    days, machines = ({line[name] for line in found} for name in ("date", "machine"))
    lines = [
        "# The flow model of Shapes, trained by its preset",
        "",
        "`python benchmarks/shapes_flow.py`, and the same with `--preset shapes`",
        "",
        f"{' to '.join(sorted({min(days), max(days)}))}, {'; '.join(sorted(machines))}; one thread for each run. Gains "
        f"of {REWARD} are in standard deviations of the first epoch's rewards; the end is the mean of the last three "
        "epochs. The seconds are those of all epochs.",
        "",
        *row("preset", "seed", "gain", f"{GOLD}, first", "lost", f"{JUDGE}, first", "lost", "seconds", head=True),
    ]
    for preset in MODELS:
        runs = {line["seed"]: line["epochs"] for line in found if line["preset"] == preset}
        for seed, epochs in sorted(runs.items()):
            cells = (f"{value:.2f}" for value in ends(epochs))
            lines += row(preset, str(seed), *cells, f"{sum(epochs['seconds']):.0f}")
    for preset in MODELS:
        runs = {line["seed"]: line["epochs"] for line in found if line["preset"] == preset}
        if runs:
            reached = [at(WANTED, gains(epochs), epochs["queries"]) for epochs in runs.values()]
            lines += [
                "",
                f"{preset}: gain {with_interval([gains(epochs)[-1] for epochs in runs.values()])}; "
                f"{sum(queries is not None for queries in reached)} of {len(runs)} seeds reach {WANTED:+.1f}.",
            ]
    return "\n".join(lines) + "\n"


def ends(epochs: Series) -> tuple[float, ...]:
    """The gain, and the first value of each held-out reward and what is lost of it."""
    return gains(epochs)[-1], *(value for name in (GOLD, JUDGE) for value in (epochs[name][0], lost(epochs, name)[-1]))


if __name__ == "__main__":
    main()
