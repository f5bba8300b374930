"""Do the paper's presets train with the true encoders? `python benchmarks/reward_presets.py`

Makes Stable Diffusion 1.x and every reward of the presets sd14-* at full size with random weights, in the file formats
and with the keys of the published ones. Then it trains one epoch of two samples at 64 px for each preset and algorithm
through the command line. This shows that everything fits together at full size, not how well anything learns.

Needs 17 GB of disk and 16 GB of memory. `--work DIR` keeps models and finished runs in DIR and reuses them. The methods
that back-propagate the reward have a page of their own, which this makes:

    python benchmarks/reward_presets.py --presets aesthetic hpsv2 --algorithms alignprop draft refl \
        --out benchmarks/direct_presets.md
"""

import argparse
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from comfy_tdpo.methods import ALGORITHMS
from comfy_tdpo.models.shipped import CONFIGS
from comfy_tdpo.trainer.run import RunFolder

HERE = Path(__file__).parent
REFERENCE = runpy.run_path(str(HERE / "reward_inputs.py"))
MODELS = runpy.run_path(str(HERE / "full_architecture.py"))
PRESETS = ("aesthetic", "pickscore", "hpsv2")
FILES = {
    "aesthetic/model.safetensors": "",
    "aesthetic/aesthetic-model.pth": "",
    "pickscore/model.safetensors": "",
    "hpsv2/HPS_v2_compressed.pt": "state_dict",
    "imagereward/ImageReward.pt": "",
}
STEPS = 4  # SDPO needs 3, and ReFL chooses among the last quarter
TRAINING = (
    *("--epochs", "1", "--samples-per-epoch", "2", "--samples-per-update", "2", "--samples-per-prompt", "2"),
    *("--steps", str(STEPS), "--resolution", "64", "--prompts", "simple-animals"),
    *("--precision", "fp32", "--output.grid-images", "1"),  # few CPUs compute in bf16
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the models and the runs; the default is removed after")
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--out", type=Path, default=HERE / "reward_presets.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        make_files(work, (*args.presets, "imagereward"))
        folder, _ = MODELS["make_models"](work, CONFIGS / "sd1")
        runs = [train(work, folder, preset, algorithm) for preset in args.presets for algorithm in args.algorithms]
        text = report(runs, " ".join(["python benchmarks/reward_presets.py", *sys.argv[1:]]))
    args.out.write_text(text, encoding="utf-8")
    print(text)


def make_files(work: Path, rewards: tuple[str, ...]) -> None:
    for file, inside in FILES.items():
        if Path(file).parts[0] in rewards:
            REFERENCE["save"](work / file, REFERENCE["published"](file), inside)
    vocabulary = REFERENCE["bert_vocabulary"](REFERENCE["BLIPS"]["full"][1][3] - 2)
    (work / "imagereward" / "vocab.txt").write_text(vocabulary, encoding="utf-8")


def train(work: Path, model: Path, preset: str, algorithm: str) -> RunFolder:
    run = RunFolder(work / "runs" / f"{preset}-{algorithm}")
    if not (run.path / "config.toml").exists() or not run.metrics():
        print(f"--- sd14-{preset}, {algorithm}", flush=True)
        weights = f"{preset}={work / preset},imagereward={work / 'imagereward'}"
        flags = ["--preset", f"sd14-{preset}", "--algorithm", algorithm, "--model", str(model)]
        flags += ["--run-dir", str(run.path), "--reward-weights", weights, *TRAINING]
        subprocess.run([sys.executable, "-m", "comfy_tdpo.trainer", *flags], check=True)
    return run


def report(runs: list[RunFolder], command: str) -> str:
    lines = [
        "# The paper's presets with encoders of the true size",
        "",
        f"`{command}`",
        "",
        f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}. Random weights, one "
        f"epoch of two samples, {STEPS} steps, 64 px, float32; the reward values mean nothing. Direct gradients sample "
        "in the update.",
        "",
        "| preset | algorithm | reward | imagereward, held out | ratio drift | sampling | update | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        config, (m,) = run.config, run.metrics()
        (reward,) = config.rewards
        scores = m[f"reward/{reward}/mean"], m["eval/imagereward/mean"]
        lines.append(
            f"| sd14-{reward} | {config.algorithm} | {scores[0]:.4g} | {scores[1]:.4g} | {drift(m)} "
            f"| {m['time/sample_s']:.1f} s | {m['time/train_s']:.1f} s | {m['memory/peak_bytes'] / 2**30:.1f} GiB |"
        )
    return "\n".join(lines) + "\n"


def drift(metrics: dict[str, float]) -> str:
    """How far sampling and training disagree; direct gradients have no ratio."""
    return f"{metrics['policy/ratio_drift']:.0e}" if "policy/ratio_drift" in metrics else "none"


if __name__ == "__main__":
    main()
