"""Kill a run at random moments and resume it: `python benchmarks/kill_resume.py --kills 10`.

For each variant below, trains a small run on Shapes once without interruption. Then, for each kill, it starts the same
run again, kills it with SIGKILL at a random moment, resumes it, and compares: the LoRA must be identical bit for bit,
and so must every metric except the timings.

With `--processes 2`, or more, each run is trained by that many processes on the CPU, without a launcher that looks
after them, and what happens at the random moment happens to a random one of them: it is killed, frozen (SIGSTOP) or
asked to stop (SIGTERM). All must have ended a minute later, a frozen one once it goes on. The moment is after the first
epoch: before that they load their models and connect, which a launcher looks after.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from comfy_tdpo.trainer.run import EpochMetrics, RunFolder

TRAIN = [sys.executable, "-m", "comfy_tdpo.trainer"]
SETTINGS = ["--epochs", "4", "--samples-per-epoch", "12", "--samples-per-update", "6", "--steps", "4"]
HAPPENS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP, "stopped": signal.SIGTERM}  # to one of several
LIMIT = 60  # seconds after which all of them must have ended
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
    "full": "--algorithm ddpo-g --policy.train full --policy.gradient-checkpointing",
    "sharded": "--algorithm tdpo-r --policy.train full --policy.shard --policy.ema 0.9 --kl.coefficient 0.03 "
    "--kl.reset-every 2",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10, help="of each variant")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="that train each run together")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    different = sum(kill(name, args.kills, rng, args.processes) for name in args.variants)
    print(f"{len(args.variants) * args.kills} kills, {different} different")
    return 1 if different else 0


def kill(variant: str, kills: int, rng: random.Random, processes: int) -> int:
    """Kill runs of a variant and resume them; how many ended differently from the one that was not killed."""
    settings = SETTINGS + VARIANTS[variant].split()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        seconds = train_whole(whole, settings, processes)
        print(f"{variant}, uninterrupted: {seconds:.1f} s")
        for index in range(kills):
            moment = rng.uniform(0, seconds)
            killed = Path(folder) / f"killed-{index}"
            happens, rank = ("killed", 0) if processes == 1 else (rng.choice(list(HAPPENS)), rng.randrange(processes))
            took = kill_and_resume(killed, moment, settings, processes, happens, rank)
            differences = compare(whole, killed)
            if took > LIMIT:
                differences.append(f"ended only {took:.0f} s later")
            different += bool(differences)
            who = "" if processes == 1 else f"process {rank} "
            how = f"{who}{happens} after {moment:5.1f} s"
            print(f"{how}, ended {took:.1f} s later: {'; '.join(differences) or 'identical'}", flush=True)
    return different


def start(flags: list[str], processes: int) -> list[subprocess.Popen]:
    """One training by that many processes."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if processes == 1:
        return [subprocess.Popen([*TRAIN, *flags], **quiet)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    together |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [subprocess.Popen([*TRAIN, *flags], env=os.environ | together | place, **quiet) for place in places]


def train(flags: list[str], processes: int) -> None:
    """Train to the end; raises RuntimeError if that fails."""
    check_ended(start(flags, processes))


def check_ended(processes: list[subprocess.Popen]) -> None:
    """Wait for processes to end; raises RuntimeError if one fails."""
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError(f"{processes[0].args!r} ended with status {statuses}")


def train_whole(path: Path, settings: list[str], processes: int = 1) -> float:
    """Train without a stop; the seconds it took, or several processes from their first epoch on."""
    began = time.perf_counter()
    started = start(["--run-dir", str(path), *settings], processes)
    if processes > 1:
        wait_for_epoch(path, started)
        began = time.perf_counter()
    check_ended(started)
    return time.perf_counter() - began


def wait_for_epoch(path: Path, processes: list[subprocess.Popen]) -> None:
    """Wait until the run has finished its first epoch, or a process has ended."""
    metrics = path / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and all(process.poll() is None for process in processes):
        time.sleep(0.05)


def kill_and_resume(
    path: Path, moment: float, settings: list[str], processes: int = 1, happens: str = "killed", rank: int = 0
) -> float:
    """Train, have something happen to a process after `moment` seconds, and continue; from the start where it came
    before there was a run. Returns the seconds until all processes had ended."""
    started = start(["--run-dir", str(path), *settings], processes)
    if processes > 1:
        wait_for_epoch(path, started)
    time.sleep(moment)
    began = time.perf_counter()
    if started[rank].poll() is None:
        started[rank].send_signal(HAPPENS[happens])
    end_all(started, began, frozen=started[rank] if happens == "frozen" else None)
    took = time.perf_counter() - began
    new = not (path / "config.toml").exists()
    train(["--run-dir", str(path), *settings] if new else ["--resume", str(path)], processes)
    return took


def end_all(processes: list[subprocess.Popen], began: float, frozen: subprocess.Popen | None) -> None:
    """Wait for processes to end by themselves, a frozen one once the others have ended; kill what has not long after
    LIMIT."""
    others = [process for process in processes if process is not frozen]
    for process in [*others, *([frozen] if frozen else [])]:
        if process is frozen and process.poll() is None:
            process.send_signal(signal.SIGCONT)
        try:
            process.wait(max(0.1, began + 2 * LIMIT - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
