"""Makes the README's pictures from a finished run: `python benchmarks/readme_pictures.py runs/NAME`.

Writes docs/shapes-reward.png, the run's own plot, and docs/shapes-before-after.png, its first and last sample
grids.
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from comfy_tdpo.trainer.run import RunFolder

DOCS = Path(__file__).parent.parent / "docs"
ENLARGED, GAP, TITLE = 2, 24, 36  # times; pixels between the grids and above them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run = RunFolder.open(parser.parse_args().run)
    shutil.copyfile(run.plot("reward"), DOCS / "shapes-reward.png")
    last = len(run.metrics())
    side_by_side(
        {"before": run.sample_grid(0), f"after {last} epochs": run.sample_grid(last)}, DOCS / "shapes-before-after.png"
    )


def side_by_side(grids: dict[str, Path], out: Path) -> None:
    """The picture files of `grids`, of one size, next to each other under their names."""
    pictures = {name: Image.open(path).convert("RGB") for name, path in grids.items()}
    width, height = (ENLARGED * side for side in next(iter(pictures.values())).size)
    sheet = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height + TITLE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for i, (name, picture) in enumerate(pictures.items()):
        left = i * (width + GAP)
        draw.text((left, 4), name, "#333333", font)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, TITLE))
    sheet.save(out)


if __name__ == "__main__":
    main()
