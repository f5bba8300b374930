"""Do the rewards agree with upstream at full size? `python benchmarks/reward_parity.py --upstream OLD/bin/python`

OLD is a separate environment with upstream's packages; benchmarks/reward_reference.py says how to make it. For hpsv2
alone, the extra `hpsv2` makes an environment in which both sides run:

    python3.11 -m venv old && old/bin/pip install '.[hpsv2]'
    old/bin/python benchmarks/reward_parity.py hpsv2 --upstream old/bin/python --out build/parity/hpsv2.md

hpsv2's wheel lacks its BPE vocabulary; this program copies open_clip's, which is the same file, into it.

For each learned reward, upstream's code makes a checkpoint of the true architecture with random weights and scores 16
images with 4 prompts. Our code loads that file and scores the same images, and the scores are compared. It also
measures what bf16 changes, memory, and time per image. The results go into a page with date and machine. Rewards whose
results are already in --work are not measured again. Needs 12 GB of memory, and 4 GB of disk for the largest
checkpoint; each checkpoint is removed after use unless --keep is given.
"""

import argparse
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comfy_tdpo.rewards import RewardModel, load_reward

HERE = Path(__file__).parent
REFERENCE = runpy.run_path(str(HERE / "reward_reference.py"))
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of a score, and of the largest where a score is next to nothing
BF16_IMAGES = 4  # few, since many CPUs are slow in bf16


@dataclass
class Result:
    """What was measured of one reward; differences in upstream's units unless they are relative."""

    name: str
    low: float
    high: float
    deviation: float
    relative: float
    batch: float
    bf16: float
    megabytes: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="*", default=REFERENCE["REWARDS"])
    parser.add_argument("--upstream", type=Path, required=True, help="the interpreter that has upstream's packages")
    parser.add_argument("--work", type=Path, default=Path("build/parity"), help="folder for checkpoints and scores")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, and use those that are there")
    parser.add_argument("--out", type=Path, default=HERE / "reward_parity.md")
    args = parser.parse_args()
    results = [compare(name, args) for name in args.rewards]
    text = report(results, " ".join(["python benchmarks/reward_parity.py", *sys.argv[1:]]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)
    if any(result.relative > TOLERANCE for result in results):
        sys.exit("not at parity")


def compare(name: str, args: argparse.Namespace) -> Result:
    done = args.work / f"{name}-result.json"
    if done.exists():
        return Result(**json.loads(done.read_text(encoding="utf-8")))
    vocabulary = REFERENCE["package_folder"]("open_clip") / REFERENCE["VOCABULARY"]
    script = [HERE / "reward_reference.py", name, "--size", "full", "--work", args.work, "--out", args.work]
    script += ["--vocabulary", vocabulary]
    subprocess.run([str(part) for part in (args.upstream, "-W", "ignore", *script)], check=True)
    record = json.loads((args.work / f"{name}.json").read_text(encoding="utf-8"))
    result = measure(name, record, {name: str(args.work / name)})
    done.write_text(json.dumps(vars(result)), encoding="utf-8")
    if not args.keep:
        shutil.rmtree(args.work / name)
    print(f"{name}: {result.relative:.1e} relative, bf16 {result.bf16:.1e}", flush=True)
    return result


@torch.no_grad()
def measure(name: str, record: dict, weights: dict[str, str]) -> Result:
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in REFERENCE["images"]()]
    expected, prompts = torch.tensor(record["scores"]), record["prompts"]
    reward = load_reward(name, CPU, weights=weights)
    megabytes = sum(part.nbytes for part in parts(reward)) / 2**20
    begin = time.process_time()
    together = reward.score(torch.cat(images[::8]), prompts[:2])  # two of one size
    seconds = (time.process_time() - begin) / 2
    encode_once(reward)
    scores = torch.stack([score_all(reward, images, prompt) for prompt in prompts])
    alone = torch.stack([scores[0, 0], scores[1, 8]])
    del reward
    half = score_all(load_reward(name, CPU, "bf16", weights), images[:BF16_IMAGES], prompts[0])
    return Result(
        name,
        low=scores.min().item(),
        high=scores.max().item(),
        deviation=scores.std(1).mean().item(),
        relative=((scores - expected).abs() / expected.abs().clamp(min=1e-2 * expected.abs().max())).max().item(),
        batch=(together - alone).abs().max().item(),
        bf16=(half - scores[0, :BF16_IMAGES]).abs().max().item(),
        megabytes=megabytes,
        seconds=seconds,
    )


def encode_once(reward: Any) -> None:
    remembered, encoder = REFERENCE["remembered"], reward.encoder
    if hasattr(encoder, "encode_image"):
        encoder.encode_image = remembered(encoder.encode_image)
    else:
        image = getattr(encoder, "vision", encoder)
        image.forward = remembered(image.forward)


def score_all(reward: RewardModel, images: list[Tensor], prompt: str) -> Tensor:
    return torch.cat([reward.score(image, [prompt]) for image in images])


def parts(reward: RewardModel) -> list[Tensor]:
    """The weights of every network the reward holds."""
    networks = [value for value in vars(reward).values() if isinstance(value, nn.Module)]
    return [parameter for network in networks for parameter in network.parameters()]


def report(results: list[Result], command: str) -> str:
    lines = [
        "# Rewards against upstream",
        "",
        f"`{command}`",
        "",
        f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}. True "
        "architectures with random weights, 16 images of 64 to 768 px, 4 prompts.",
        "",
        "- scores: smallest and largest;",
        "- spread: standard deviation over the images, averaged over the prompts;",
        "- upstream: largest difference from upstream's own code in float32, relative to the score, or to a hundredth "
        "of the largest score if that is more;",
        "- batch: largest difference between scores computed two at a time and the same scores computed one at a time;",
        f"- bf16: largest difference between bf16 and float32, {BF16_IMAGES} images;",
        "- weights, time: memory of the weights, and CPU time of all cores together for one image and one prompt, in "
        "float32.",
        "",
        "| reward | scores | spread | upstream | batch | bf16 | weights | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r.name} | {r.low:.4g} to {r.high:.4g} | {r.deviation:.2g} | {r.relative:.1e} | {r.batch:.1e} "
            f"| {r.bf16:.1e} | {r.megabytes:,.0f} MiB | {r.seconds:.2f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
