"""Two rewards at once on Shapes: `python benchmarks/shapes_multi_reward.py`.

Trains on shapes-aesthetic and shapes-alignment with weights 1:0, 0:1 and 1:1, each divided by its standard deviation
over the base model's images, with the preset `shapes` and three seeds. It measures both rewards in every run and writes
a table with date and machine. A reward should end higher the more weight it has. Runs that are already in the folder
are not repeated; stopped ones are resumed.
"""

import argparse
import statistics
import sys
from datetime import date
from pathlib import Path

from pairs import machine, train

from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.run import RunFolder

HERE = Path(__file__).parent
A, B = "shapes-aesthetic", "shapes-alignment"
SCALES = {A: 1.24, B: 0.115}
MIXES = {"1:0": (1.0, 0.0), "1:1": (1.0, 1.0), "0:1": (0.0, 1.0)}
WATCHED = (A, B, "shapes-gold")
LAST = 3  # epochs whose mean is the end of a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/multi-reward"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this for every mix")
    parser.add_argument("--epochs", type=int, default=None, help="fewer than the preset's, for a quick look")
    parser.add_argument("--out", type=Path, default=HERE / "shapes_multi_reward.md")
    args = parser.parse_args()
    runs = {
        (mix, seed): trained(args.runs / f"{mix.replace(':', '-')}-seed{seed}", mix, seed, args.epochs)
        for seed in range(1, args.seeds + 1)
        for mix in MIXES
    }
    text = report(runs, args.seeds, " ".join(["python benchmarks/shapes_multi_reward.py", *sys.argv[1:]]))
    args.out.write_text(text, encoding="utf-8")
    print(text)


def trained(path: Path, mix: str, seed: int, epochs: int | None) -> RunFolder:
    """One run at `path`, new or continued."""
    print(f"--- {mix}, seed {seed}", flush=True)
    rewards = {name: weight for name, weight in zip((A, B), MIXES[mix], strict=True) if weight}
    scales = SCALES if len(rewards) > 1 else {}
    watched = [name for name in WATCHED if len(rewards) > 1 or name not in rewards]
    overrides = {
        "algorithm": "tdpo-r",
        "rewards": rewards,
        "reward_scales": scales,
        "seed": seed,
        "eval_rewards": watched,
    }
    overrides |= {"epochs": epochs} if epochs else {}
    return train(path, make_config(overrides=overrides))


def change(run: RunFolder, reward: str) -> float:
    """From the first epoch to the mean of the last ones, in standard deviations of the base model's images."""
    kind = "reward" if list(run.config.rewards) == [reward] else "eval"
    means = [epoch[f"{kind}/{reward}/mean"] for epoch in run.metrics()]
    return (statistics.fmean(means[-LAST:]) - means[0]) / SCALES.get(reward, 1)


def report(runs: dict[tuple[str, int], RunFolder], seeds: int, command: str) -> str:
    epochs = next(iter(runs.values())).config.epochs
    lines = [
        "# Two rewards on Shapes",
        "",
        f"`{command}`",
        "",
        f"{date.today()}, {machine()}; one thread for each run. Preset `shapes`, TDPO-R, {epochs} epochs. Change from "
        f"the first epoch to the mean of the last {LAST}, as mean ± standard deviation over {seeds} seeds. The two "
        f"rewards are in units of the standard deviations they are divided by ({SCALES[A]} and {SCALES[B]}); "
        "shapes-gold is in its own units.",
        "",
        f"| {A} : {B} | {A} | {B} | shapes-gold |",
        "|---|---|---|---|",
    ]
    for mix in MIXES:
        cells = [spread([change(runs[mix, seed + 1], name) for seed in range(seeds)]) for name in WATCHED]
        lines.append("| " + " | ".join([mix, *cells]) + " |")
    lines += ["", f"| {A} : {B} | seed | {A} | {B} | shapes-gold |", "|---|---|---|---|---|"]
    for (mix, seed), run in sorted(runs.items()):
        lines.append(f"| {mix} | {seed} | " + " | ".join(f"{change(run, name):+.2f}" for name in WATCHED) + " |")
    order = [orders(runs, seed + 1) for seed in range(seeds)]
    lines += ["", f"In {sum(order)} of {seeds} seeds both rewards end in the order of their weights."]
    return "\n".join(lines) + "\n"


def orders(runs: dict[tuple[str, int], RunFolder], seed: int) -> bool:
    """Whether more weight on a reward left it higher, for both."""
    a, b = ([change(runs[mix, seed], name) for mix in MIXES] for name in (A, B))
    return a[0] > a[1] > a[2] and b[0] < b[1] < b[2]


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.2f}{deviation}"


if __name__ == "__main__":
    main()
