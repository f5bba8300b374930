"""Shared by the benchmarks that compare variants over paired seeds: their runs, their results, how curves are read.

Runs of one seed have the same prompts and noise, so that seed by seed only what a variant changes makes a difference. A
finished run is a line of a .jsonl: its settings' fingerprint and the series of its epochs.
"""

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

from comfy_tdpo.trainer.config import TrainConfig
from comfy_tdpo.trainer.evaluation.numbers import interval
from comfy_tdpo.trainer.run import EpochMetrics, RunFolder
from comfy_tdpo.trainer.run.json_lines import append_lines, read_lines
from comfy_tdpo.user_files import read_text

SMOOTHING = 3  # epochs that a point of a curve is the mean of
LEVELS = (0.5, 0.75, 1.0, 1.25)  # training reward gained, in standard deviations of the first epoch's
ENOUGH = 4  # fewest seeds on which a difference is judged
NO_PART = {"eval_rewards", "output", "overoptimisation", "micro_batch", "decode_batch"}  # decide no result
REMEDY = "remove the lines that are not JSON"
THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # with one thread, results repeat exactly

Series = dict[str, list[Any]]  # by name, a value for each epoch
Line = dict[str, Any]
Runs = dict[str, dict[int, Series]]  # variant -> seed -> series
ConfigOf = Callable[[str, int], TrainConfig]  # of a variant and a seed

_writing = Lock()


# --- runs and results


def fingerprint(config: TrainConfig) -> str:
    """A digest of the settings that decide a run's results and differ from their defaults.

    If a default changes, remove the old results.
    """
    values = config.model_dump(mode="json", exclude_defaults=True, exclude=NO_PART)
    neurons = values.get("neurons", {})
    if neurons.pop("policy_measure", False) and not neurons:  # measuring decides nothing either
        del values["neurons"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"


def when_and_where(found: Sequence[Line]) -> str:
    """The days on which results were found, and the machines, for the head of a page."""
    days, machines = sorted({line["date"] for line in found}), sorted({line["machine"] for line in found})
    return f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, {'; '.join(machines)}"


def run_trainer(*arguments: str) -> None:
    """Run the trainer's command line with one thread."""
    command = [sys.executable, "-m", "comfy_tdpo.trainer", *arguments]
    subprocess.run(command, check=True, env=os.environ | THREAD, stdout=subprocess.DEVNULL)


def train(path: Path, config: TrainConfig) -> RunFolder:
    """The finished run at `path`, which is begun or resumed; one that is there with other settings or held-out rewards
    is refused."""
    if not (path / "config.toml").exists():
        RunFolder(path).create(config)
    there = RunFolder.open(path).config
    if (fingerprint(there), there.eval_rewards) != (fingerprint(config), config.eval_rewards):
        raise SystemExit(f"{path} was made with other settings; delete it, or give --runs another folder")
    run_trainer("--resume", str(path))
    return RunFolder.open(path)


def train_missing(
    wanted: Iterable[tuple[str, int]],
    config_of: ConfigOf,
    series_of: Callable[[RunFolder], Series],
    runs: Path,
    out: Path,
    jobs: int,
) -> None:
    """Train the `wanted` variants and seeds that `out` does not hold, in the folder `runs`, and add their series to it.

    config_of: what a variant trains with a seed; jobs: how many run at a time.
    """

    def run(name: str, seed: int) -> None:
        config = config_of(name, seed)
        mark = fingerprint(config)
        if any(result["settings"] == mark for result in results(out)):
            return
        print(f"--- {name}, seed {seed}", flush=True)
        finished = train(runs / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}-{mark[:8]}", config)
        add(out, {"variant": name, "seed": seed, "settings": mark}, series_of(finished))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: run(*job), wanted))


def by_variant(found: list[Line], variants: Iterable[str], config_of: ConfigOf) -> Runs:
    """The series of each variant and seed; a line of other settings than today's variant of its name is left out."""
    runs: Runs = {name: {} for name in variants}
    for result in found:
        name, seed = result["variant"], result["seed"]
        if name in runs and result["settings"] == fingerprint(config_of(name, seed)):
            runs[name][seed] = result["epochs"]
    return {name: seeds for name, seeds in runs.items() if seeds}


def add(out: Path, line: Line, epochs: Series) -> None:
    """Append a result to `out`."""
    with _writing:
        read_lines(out, lambda line: None, REMEDY)  # removes a line that was cut off
        append_lines(out, [line | {"date": str(date.today()), "machine": machine(), "epochs": epochs}])


def results(out: Path) -> list[Line]:
    """The lines of `out`; none if there is no such file. ValueError if one is no result; the last may be cut off."""
    text = read_text(out) if out.exists() else ""
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{out} is damaged (line {number}: {error.msg}); {REMEDY}") from error
        if not isinstance(lines[-1], dict):
            raise ValueError(f"{out} is damaged (line {number}: got {line[:40]}; expected an object); remove it")
    return lines


def series(metrics: list[EpochMetrics], names: dict[str, str]) -> Series:
    """What all epochs have of the metrics in `names`: our name -> key."""
    return {
        ours: [round(line[key], 5) for line in metrics]
        for ours, key in names.items()
        if all(key in line for line in metrics)
    }


# --- curves and their comparison


def smooth(values: Sequence[float], over: int | None = None) -> list[float]:
    """Each epoch's value as the mean of the `over` latest, SMOOTHING if not given; the first stays as it is."""
    over = over or SMOOTHING
    return [statistics.fmean(values[max(0, i - over + 1) : i + 1]) for i in range(len(values))]


def gains(epochs: Series, over: int | None = None) -> list[float]:
    """The training reward gained, in standard deviations of the first epoch's rewards."""
    reward = smooth(epochs["reward"], over)
    return [(value - reward[0]) / epochs["std"][0] for value in reward]


def lost(epochs: Series, name: str, over: int | None = None) -> list[float]:
    """How far a held-out reward is below the first epoch's."""
    values = smooth(epochs[name], over)
    return [values[0] - value for value in values]


def at(level: float, over: Sequence[float], values: Sequence[float]) -> float | None:
    """`values` where `over` first reaches `level`, on the line between the two epochs; None if it never does."""
    for i, reached in enumerate(over):
        if reached >= level:
            if i == 0:
                return values[0]
            share = (level - over[i - 1]) / (reached - over[i - 1])
            return values[i - 1] + share * (values[i] - values[i - 1])
    return None


# --- the pages


def row(*cells: str, head: bool = False) -> list[str]:
    """The lines of a Markdown table's row; of its head, with the line below it."""
    return [f"| {' | '.join(cells)} |", *(["|" + "---|" * len(cells)] if head else [])]


def with_interval(values: list[float]) -> str:
    """The mean with its interval; a single value has none."""
    if len(values) < 2:
        return f"{values[0]:+.3f}" if values else "-"
    middle, half = interval(values)
    return f"{middle:+.3f} ± {half:.3f}"
