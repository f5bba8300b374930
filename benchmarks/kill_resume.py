"""Kill a run at random moments and resume it: `python benchmarks/kill_resume.py --kills 10`.

Trains a small run on Shapes once without interruption. Then, for each kill, it starts the same run again, kills it with
SIGKILL at a random moment, resumes it, and compares: the LoRA must be identical bit for bit, and so must every metric
except the timings.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from comfy_tdpo.trainer.run import EpochMetrics, RunFolder

TRAIN = [sys.executable, "-m", "comfy_tdpo.trainer"]
SETTINGS = ["--epochs", "4", "--samples-per-epoch", "12", "--samples-per-update", "6", "--steps", "4"]
SETTINGS += ["--neurons.every", "2", "--output.samples-every", "2", "--output.grid-images", "4"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        seconds = train_whole(whole)
        print(f"uninterrupted: {seconds:.1f} s")
        different = 0
        for index in range(args.kills):
            moment = rng.uniform(0, seconds)
            killed = Path(folder) / f"killed-{index}"
            kill_and_resume(killed, moment)
            differences = compare(whole, killed)
            different += bool(differences)
            print(f"killed after {moment:5.1f} s: {'; '.join(differences) or 'identical'}", flush=True)
    print(f"{args.kills} kills, {different} different")
    return 1 if different else 0


def train_whole(path: Path) -> float:
    """Train without a stop; the seconds it took."""
    start = time.perf_counter()
    subprocess.run([*TRAIN, "--run-dir", str(path), *SETTINGS], check=True, capture_output=True)
    return time.perf_counter() - start


def kill_and_resume(path: Path, moment: float) -> None:
    """Train, kill after `moment` seconds, and continue; from the start where the kill came before there was a run."""
    process = subprocess.Popen(
        [*TRAIN, "--run-dir", str(path), *SETTINGS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    flags = ["--resume", str(path)] if (path / "config.toml").exists() else ["--run-dir", str(path), *SETTINGS]
    subprocess.run([*TRAIN, *flags], check=True, capture_output=True)


def compare(whole: Path, killed: Path) -> list[str]:
    """What is different between two runs that should be the same."""
    a, b = RunFolder.open(whole), RunFolder.open(killed)
    lora_a, lora_b = load_file(a.latest_lora), load_file(b.latest_lora)
    differences = [f"LoRA {key}" for key in lora_a if key not in lora_b or not lora_a[key].equal(lora_b[key])]
    if lora_a.keys() != lora_b.keys():
        differences.append("LoRA keys")
    if [timeless(line) for line in a.metrics()] != [timeless(line) for line in b.metrics()]:
        differences.append("metrics")
    return differences


def timeless(metrics: EpochMetrics) -> EpochMetrics:
    """The metrics but for what depends on the machine's mood."""
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}


if __name__ == "__main__":
    sys.exit(main())
