"""Makes the README's pictures from a finished run: `python benchmarks/readme_pictures.py runs/NAME`.

Writes docs/shapes-reward.png, the run's own plot, and docs/shapes-before-after.png, its first and last samples side by
side.
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from comfy_tdpo.trainer.plots.image_grid import grid_shape, image_in_grid
from comfy_tdpo.trainer.recommend.drawing import as_picture
from comfy_tdpo.trainer.run import RunFolder

DOCS = Path(__file__).parent.parent / "docs"
ENLARGED, COLUMNS, GAP, CAPTION = 2, 4, 20, 26  # times; pairs in a row; pixels between pairs and below them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run = RunFolder.open(parser.parse_args().run)
    shutil.copyfile(run.plot("reward"), DOCS / "shapes-reward.png")
    prompts = run.grid_prompts(run.config)
    before, after = (images_of(run.sample_grid(epoch), len(prompts)) for epoch in (0, len(run.metrics())))
    pairs(prompts, before, after).save(DOCS / "shapes-before-after.png", optimize=True)


def images_of(grid: Path, count: int) -> list[Image.Image]:
    """The images of a sample grid, row by row."""
    _, columns = grid_shape(count)
    return [as_picture(image_in_grid(grid, count, *divmod(index, columns))[1]) for index in range(count)]


def pairs(prompts: list[str], before: list[Image.Image], after: list[Image.Image]) -> Image.Image:
    """Each prompt below its image from before, left, and after, right; the first row says which is which."""
    side = ENLARGED * before[0].width
    width, height = 2 * side + 2 + GAP, side + CAPTION + GAP
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width - GAP, CAPTION + rows * height - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for i, (prompt, *images) in enumerate(zip(prompts, before, after, strict=True)):
        left, top = i % COLUMNS * width, CAPTION + i // COLUMNS * height
        for j, (image, when) in enumerate(zip(images, ("before", "after"), strict=True)):
            corner = left + j * (side + 2)
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (corner, top))
            if i < COLUMNS:
                draw.text((corner + side / 2, 3), when, "#666666", font, anchor="ma")
        draw.text((left + side, top + side + 3), prompt, "#333333", font, anchor="ma")
    return sheet


if __name__ == "__main__":
    main()
