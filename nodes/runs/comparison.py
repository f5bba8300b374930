"""What the browser compares: a run's sample grids, epoch by epoch, and its LoRAs at several strengths."""

import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

from ...trainer.alarm import lora_before
from ...trainer.config import TrainConfig
from ...trainer.recommend.files import IMAGES
from ...trainer.run import RunFolder
from ...trainer.run.loras import baked_strength, epoch_of
from ...trainer.run.paths import epoch_in
from .combos import EPOCH, RECOMMENDED

GAP = 2  # pixels between images
_DRAWN = re.compile(r"epoch-(\d+)-strength-([\d.]+)-[0-9a-f]+\.png")  # of the base model: epoch 0, strength 0


def grids(run: RunFolder) -> list[int]:
    """The epochs after which a sample grid was drawn; 0 is before training."""
    return _epochs((run.path / "samples").glob("epoch-*.png"))


def grid_shape_of(run: RunFolder, config: TrainConfig) -> list[int]:
    """Rows and columns of the run's sample grids, whose places votes name."""
    from ...trainer.plots.image_grid import grid_shape  # slow to import

    return list(grid_shape(len(run.grid_prompts(config))))


def kept(run: RunFolder) -> list[int]:
    """The epochs whose LoRA is kept."""
    return _epochs(run.snapshots.glob("epoch-*.safetensors"))


def _epochs(paths: Any) -> list[int]:
    return sorted(epoch for path in paths if (epoch := epoch_in(path)) is not None)


def strengths(run: RunFolder) -> dict[str, list[float]]:
    """By epoch, the strengths at which `recommend` has drawn its LoRA."""
    found: dict[int, set[float]] = {}
    for epoch, strength in _drawn(run):
        if epoch:
            found.setdefault(epoch, set()).add(strength)
    return {str(epoch): sorted(found[epoch]) for epoch in sorted(found)}


def at_strength(run: RunFolder, epoch: int, strength: float) -> bytes:
    """The images of an epoch's LoRA at a strength as one PNG, two in a row; epoch 0 at strength 0 is the base model.

    Raises:
        FileNotFoundError: none have been drawn.
    """
    files = sorted(_drawn(run).get((epoch, strength), []), key=lambda path: path.name.rpartition("-")[2])
    if not files:
        raise FileNotFoundError(f"run {run.path.name!r} has no images of epoch {epoch} at strength {strength:g}")
    images = [Image.open(file).convert("RGB") for file in files]
    width, height = images[0].width + GAP, images[0].height + GAP
    columns = min(len(images), 2)
    sheet = Image.new("RGB", (columns * width - GAP, -(-len(images) // columns) * height - GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "png")
    return buffer.getvalue()


def _drawn(run: RunFolder) -> dict[tuple[int, float], list[Path]]:
    found: dict[tuple[int, float], list[Path]] = {}
    for path in (run.recommendation / IMAGES).glob("*.png"):
        if match := _DRAWN.fullmatch(path.name):
            found.setdefault((int(match[1]), float(match[2])), []).append(path)
    return found


def best_use(run: RunFolder, overoptimised: int | None) -> dict[str, Any] | None:
    """What LoRA Apply should take, in its own words, with a label for a button; None if the latest will do."""
    if run.recommended_lora.is_file():
        epoch, strength = epoch_of(run.recommended_lora), baked_strength(run.recommended_lora)
        label = f"Use the recommended LoRA: epoch {epoch}, strength {strength:g}"
        return {"snapshot": RECOMMENDED, "epoch": epoch, "label": label}
    before = lora_before(run, overoptimised) if overoptimised is not None else None
    if before is None:
        return None
    epoch = epoch_in(before) or 0
    return {"snapshot": EPOCH, "epoch": epoch, "label": f"Use epoch {epoch}, from before the fall"}
