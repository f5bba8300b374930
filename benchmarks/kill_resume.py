"""Kill a run at random moments and resume it: `python benchmarks/kill_resume.py --kills 10`.

For each variant below, trains a small run on Shapes once without interruption. Then, for each kill, it starts the same
run again, kills it with SIGKILL at a random moment, resumes it, and compares: the LoRA must be identical bit for bit,
and so must every metric except the timings.
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
SETTINGS += ["--output.samples-every", "2", "--output.grid-images", "4"]

# Together these have on everything that a checkpoint must keep.
VARIANTS = {
    "ddpo-g": "--algorithm ddpo-g",
    "tdpo-g": "--algorithm tdpo-g",
    "tdpo-r": "--algorithm tdpo-r --neurons.every 2",
    "normalised": "--algorithm tdpo-g --policy.objective step-normalised --kl.coefficient 0.03 "
    "--kl.target 20 --kl.controller proportional-integral --policy.ema 0.9 --policy.lr-schedule cosine "
    "--policy.warmup-updates 3 --policy.train-until 0.8 --policy.train-share 0.7 --critic.gae-lambda 0.9 "
    "--guard-adaptation 0.5 --guard-images 2 --prompts shapes-complex",
    "alignprop": "--algorithm alignprop",
    "draft-lv": "--algorithm draft --renoised 2 --policy.ema 0.9",
    "refl": "--algorithm refl",
    "dpok": "--algorithm dpok",
    "grpo": "--algorithm grpo --samples-per-prompt 6",
    "sdpo": "--algorithm sdpo",
    "replay": "--algorithm tdpo-r --policy.replay 1 --neurons.every 2 --neurons.policy-reset active",
    "gardo": "--algorithm tdpo-g --policy.objective trust-region --kl.coefficient 0.03 --kl.gate --kl.gate-window 2 "
    "--kl.reset-every 2 --samples-per-prompt 2 --moments.baseline group --favour-diversity",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10, help="of each variant")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    different = sum(kill(name, args.kills, rng) for name in args.variants)
    print(f"{len(args.variants) * args.kills} kills, {different} different")
    return 1 if different else 0


def kill(variant: str, kills: int, rng: random.Random) -> int:
    """Kill runs of a variant and resume them; how many ended differently from the one that was not killed."""
    settings = SETTINGS + VARIANTS[variant].split()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        seconds = train_whole(whole, settings)
        print(f"{variant}, uninterrupted: {seconds:.1f} s")
        for index in range(kills):
            moment = rng.uniform(0, seconds)
            killed = Path(folder) / f"killed-{index}"
            kill_and_resume(killed, moment, settings)
            differences = compare(whole, killed)
            different += bool(differences)
            print(f"killed after {moment:5.1f} s: {'; '.join(differences) or 'identical'}", flush=True)
    return different


def train_whole(path: Path, settings: list[str]) -> float:
    """Train without a stop; the seconds it took."""
    start = time.perf_counter()
    subprocess.run([*TRAIN, "--run-dir", str(path), *settings], check=True, capture_output=True)
    return time.perf_counter() - start


def kill_and_resume(path: Path, moment: float, settings: list[str]) -> None:
    """Train, kill after `moment` seconds, and continue; from the start where the kill came before there was a run."""
    process = subprocess.Popen(
        [*TRAIN, "--run-dir", str(path), *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    flags = ["--resume", str(path)] if (path / "config.toml").exists() else ["--run-dir", str(path), *settings]
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
