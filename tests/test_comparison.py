"""What the browser compares: grids, strengths, and the LoRA to use."""

import io

import pytest
import torch
from fake_training import begin, runs_in
from PIL import Image
from safetensors.torch import save_file

from comfy_tdpo.nodes.runs.comparison import at_strength, best_use, grids, kept, strengths
from comfy_tdpo.trainer.recommend.files import BASE, Cell, Draw, image_file

DRAWS = [Draw("a red circle", 0), Draw("a blue square", 0), Draw("two circles", 0)]
COLOURS = [(255, 0, 0), (0, 0, 255), (0, 255, 0)]


@pytest.fixture
def run(tmp_path):
    runs = runs_in(tmp_path)
    assert begin(runs, epochs=3).wait(30).state == "finished"
    return runs.find("one")


def draw(run, cell: Cell, shade: int) -> None:
    for draw, colour in zip(DRAWS, COLOURS, strict=True):
        path = image_file(run.recommendation, cell, draw)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(value * shade // 255 for value in colour)).save(path)


def test_grids_and_loras_by_epoch(run):
    run.lora(2).unlink()
    (run.path / "samples" / "notes.png").write_bytes(b"")
    assert (grids(run), kept(run)) == ([1, 2, 3], [1, 3])


def test_the_same_images_at_every_strength(run):
    assert strengths(run) == {}
    cells = {BASE: 50, Cell(3, 0.5, run.lora(3), "x", "epoch 3"): 100, Cell(3, 1.0, run.lora(3), "x", "epoch 3"): 200}
    for cell, shade in cells.items():
        draw(run, cell, shade)
    assert strengths(run) == {"3": [0.5, 1.0]}
    places = None
    for cell, shade in cells.items():
        sheet = Image.open(io.BytesIO(at_strength(run, cell.epoch, cell.strength)))
        assert sheet.size == (18, 18), "three of 8 x 8, two in a row, with a gap"
        found = [sheet.getpixel(place) for place in ((4, 4), (14, 4), (4, 14), (14, 14))]
        assert sorted(found[:3]) == sorted(tuple(v * shade // 255 for v in colour) for colour in COLOURS)
        order = [max(range(3), key=pixel.__getitem__) for pixel in found[:3]]
        assert places in (None, order), "a prompt has the same place in every picture"
        places = order
    with pytest.raises(FileNotFoundError, match="no images of epoch 2 at strength 1"):
        at_strength(run, 2, 1.0)


def test_what_to_use(run):
    assert best_use(run, None) is None, "the latest"
    assert best_use(run, 3) == {"snapshot": "epoch", "epoch": 1, "label": "Use epoch 1, from before the fall"}
    assert best_use(run, 2) is None, "no LoRA is older than the fall"
    save_file({"x": torch.zeros(1)}, run.recommended_lora, {"epoch": "2", "strength": "0.75"})
    label = "Use the recommended LoRA: epoch 2, strength 0.75"
    assert best_use(run, 3) == {"snapshot": "recommended", "epoch": 2, "label": label}
