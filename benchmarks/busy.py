"""How much slower an epoch is beside other work: `python benchmarks/busy.py`, on a machine with nothing else to do.

Trains the default run, a process of its own each time, on a quiet machine and beside processes that take a core each,
with how long OpenMP's threads spin by the command line's own choice, not at all, and as GNU's library has it. Prints
the median seconds of an epoch, and how many times as long it takes beside the others; for the command line's own
choice, that is to be at most LIMIT with one core taken.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from pairs import machine

from comfy_tdpo.trainer.run import RunFolder

LIMIT = 2.2
TAKES_A_CORE = [sys.executable, "-c", "while True: pass"]
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPINNING = {
    "the command line's choice": {},
    "never": {"OMP_WAIT_POLICY": "PASSIVE"},
    "as GNU has it": {"GOMP_SPINCOUNT": "300000"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="of each run; the first is not counted if there are more")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, which take turns")
    parser.add_argument("--taken", type=int, default=1, help="cores that other processes take")
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="further options of the run, last")
    args = parser.parse_args()
    print(f"{date.today()}, {machine()}", flush=True)
    found: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in SPINNING for busy in (False, True)}
    for _ in range(args.rounds):
        for name, busy in found:
            with cores_taken(args.taken if busy else 0):
                found[name, busy] += seconds(SPINNING[name], args.epochs, args.settings)
            print(f"{name}, {'busy' if busy else 'quiet'}: {found[name, busy][-1]:.1f} s", flush=True)
    print(f"\n| threads spin | quiet | {args.taken} taken | times as long |\n|---|---|---|---|")
    times = {}
    for name in SPINNING:
        quiet, beside = (statistics.median(found[name, busy]) for busy in (False, True))
        times[name] = beside / quiet
        print(f"| {name} | {quiet:.1f} s | {beside:.1f} s | {times[name]:.2f} |")
    return 1 if args.taken == 1 and times["the command line's choice"] > LIMIT else 0


@contextmanager
def cores_taken(count: int) -> Iterator[None]:
    """Inside the block, `count` processes compute without a pause."""
    others = [subprocess.Popen(TAKES_A_CORE) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds(spinning: dict[str, str], epochs: int, settings: list[str]) -> list[float]:
    """Those of each epoch of a run, without the first if there are more."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP} | spinning
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "comfy_tdpo.trainer", "--run-dir", str(run), "--epochs", str(epochs)]
        # the recommendation at the end is no epoch
        command += ["--seed", "3", "--output.recommend", "false", *settings]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        took = [metrics["time/epoch_s"] for metrics in RunFolder.open(run).metrics()]
    return took[1:] or took


if __name__ == "__main__":
    sys.exit(main())
