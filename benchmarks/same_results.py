"""Shows that a change leaves results as they were: same seed, same metrics, same LoRA, to the last bit.

    .venv/bin/python benchmarks/same_results.py COMMIT

trains each algorithm for three epochs on Shapes, once with the code of COMMIT (checked out into a temporary worktree)
and once with the code in this working tree. Then it compares every metric except times and memory, and every tensor of
the LoRA. Runs of a commit are kept in `--work` and not repeated. Exits with 1 if anything differs. If COMMIT lacks an
algorithm, name those to compare with `--algorithms`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from pairs import THREAD
from safetensors.torch import load_file

from comfy_tdpo.methods import ALGORITHMS

ROOT = Path(__file__).parent.parent
UNLIKE = ("time/", "memory/")  # metrics in which runs of the same code may differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="COMMIT", help="what to compare with")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), metavar="NAME", help="default: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/same-results"), help="folder of the runs")
    parser.add_argument("--settings", nargs="*", default=[], metavar="FLAG", help="further settings, without the --")
    args = parser.parse_args()
    before = _git("rev-parse", "--short=12", f"{args.before}^{{commit}}")
    differences = 0
    for algorithm in args.algorithms:
        found = compare(args, before, algorithm)
        print(f"{algorithm}: {found[0] if found else 'identical'}", flush=True)
        differences += bool(found)
    return 1 if differences else 0


def compare(args: argparse.Namespace, before: str, algorithm: str) -> list[str]:
    """How the two runs of `algorithm` differ; empty if they do not."""
    label = "-".join([algorithm, str(args.epochs), *args.settings]).replace("/", "_")
    old, new = args.work / before / label, args.work / "here" / label
    if not (old / "lora" / "latest.safetensors").exists():
        with Checkout(before, args.work / "checkout") as code:
            train(code, old, algorithm, args)
    train(ROOT, new, algorithm, args)
    return [*metric_differences(old, new), *lora_differences(old, new)]


def train(code: Path, run: Path, algorithm: str, args: argparse.Namespace) -> None:
    """Train with the package in the folder `code`; the run's folder is `run`."""
    subprocess.run(["rm", "-rf", str(run)], check=True)
    flags = [f"--{setting}" for setting in args.settings]
    command = [sys.executable, "-m", "comfy_tdpo.trainer", "--run-dir", str(run.absolute())]
    command += ["--algorithm", algorithm, "--epochs", str(args.epochs), "--output.grid-images=1", *flags]
    environment = os.environ | THREAD | {"PYTHONPATH": str(code)}
    subprocess.run(command, check=True, cwd=code, env=environment, stdout=subprocess.DEVNULL)


def metric_differences(old: Path, new: Path) -> list[str]:
    epochs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (old, new)]
    if len(epochs[0]) != len(epochs[1]):
        return [f"{len(epochs[0])} epochs before, {len(epochs[1])} now"]
    return [
        f"epoch {before['epoch']}: {name} was {before.get(name)!r} and is {now.get(name)!r}"
        for before, now in zip(*epochs, strict=True)
        for name in sorted(before.keys() | now.keys())
        if not name.startswith(UNLIKE) and before.get(name) != now.get(name)
    ]


def lora_differences(old: Path, new: Path) -> list[str]:
    before, now = (load_file(run / "lora" / "latest.safetensors") for run in (old, new))
    if before.keys() != now.keys():
        return [f"the LoRA has other tensors: {sorted(before.keys() ^ now.keys())[0]}"]
    return [f"{name} of the LoRA differs" for name in sorted(before) if not before[name].equal(now[name])]


class Checkout:
    """Inside the block, a commit's code in a worktree of its own."""

    def __init__(self, commit: str, path: Path):
        self.commit, self.path = commit, path.absolute()

    def __enter__(self) -> Path:
        _git("worktree", "add", "--force", "--detach", str(self.path), self.commit)
        return self.path

    def __exit__(self, *_: object) -> None:
        _git("worktree", "remove", "--force", str(self.path))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
