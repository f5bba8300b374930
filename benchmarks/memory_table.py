"""What fits into the memory of common GPUs? `python benchmarks/memory_table.py` writes the tables of docs/memory.md.

Counts without a GPU, as `python -m comfy_tdpo.trainer plan` does for one run; see comfy_tdpo/memory/without_values.py.
"""

import argparse
import platform
from datetime import date
from pathlib import Path

import torch

from comfy_tdpo.models import outline
from comfy_tdpo.trainer.config import make_config, override
from comfy_tdpo.trainer.terminal.fits import CARDS, GIB, choice, footprint

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
BEGIN, END = "<!-- memory-table: begin -->", "<!-- memory-table: end -->"
MODELS = [  # preset, its name, resolution
    ("sd15", "SD 1.x", 512),
    ("sdxl", "SDXL", 1024),
    ("sd3", "SD 3.5 medium", 1024),
    ("flux-dev", "FLUX.1 dev", 1024),
    ("z-image", "Z-Image", 1024),
]
KINDS = {
    "LoRA": {"train": "lora"},
    "full": {"train": "full"},
    "full, 8-bit": {"train": "full", "optimizer": "adamw-8bit"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [preset for preset, _, _ in MODELS]
    parser.add_argument("--presets", nargs="+", default=names, choices=names, help="count these alone, and print them")
    args = parser.parse_args()
    needed = ["| | weights | texts | optimizer, paths | sample | sample* | image |", "|---|---|---|---|---|---|---|"]
    fitting = [f"| | {' | '.join(f'{card} GiB' for card in CARDS)} |", "|---" * (len(CARDS) + 1) + "|"]
    for preset, name, resolution in MODELS:
        if preset not in args.presets:
            continue
        config, sizes = make_config(preset), outline(make_config(preset).model).configs
        assert sizes is not None, "the presets' models come with their configurations"
        for kind, policy in KINDS.items():
            of_kind = override(config, {"resolution": resolution, "precision": "bf16", "policy": policy})
            found = footprint(of_kind, sizes)
            training = (found.training[on].first for on in (False, True))
            parts = (found.weights, found.texts, found.reserve, *training, found.decoding.first)
            needed.append(f"| {name}, {resolution} px, {kind} | {' | '.join(f'{part / GIB:.1f}' for part in parts)} |")
            cells = (choice(found, of_kind, card) for card in CARDS)
            fitting.append(f"| {name}, {resolution} px, {kind} | {' | '.join(cells)} |")
            print(needed[-1], fitting[-1], sep="\n", flush=True)
    text = "\n".join(
        [
            f"Counted on {date.today()} by `python benchmarks/memory_table.py` (torch {torch.__version__}, Python "
            f"{platform.python_version()}), GiB.",
            "",
            *needed,
            "",
            *fitting,
        ]
    )
    if len(args.presets) == len(MODELS):
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
