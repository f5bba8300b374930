"""Which LoRA of a run is chosen, and files that are not LoRAs."""

import pytest
import torch
from fake_training import begin, runs_in
from safetensors.torch import save_file

from comfy_tdpo.nodes.runs.combos import SNAPSHOTS
from comfy_tdpo.nodes.runs.snapshots import Found, best_epoch, find_snapshot
from comfy_tdpo.trainer.recommend.files import write_choice
from comfy_tdpo.trainer.run.loras import baked_strength, read_lora, snapshots

TRAINING, HELD_OUT = "best training reward", "best held-out reward"


@pytest.fixture
def run(tmp_path):
    """One of three epochs, whose images scored 1, 2 and 3."""
    runs = runs_in(tmp_path)
    assert begin(runs, epochs=3).wait(30).state == "finished"
    return runs.find("one")


def test_the_latest_and_those_of_epochs(run):
    assert find_snapshot(run, "latest", 1) == Found(run.latest_lora)
    assert find_snapshot(run, "epoch", 2) == Found(run.lora(2))
    with pytest.raises(ValueError, match="no snapshot of epoch 9; expected one of those it has .1, 2, 3.: lower"):
        find_snapshot(run, "epoch", 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_that_is_not_finite_is_refused(tmp_path, value):
    path = tmp_path / "broken.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.tensor([[1.0, value]])}, path)
    with pytest.raises(ValueError, match=r"'broken.safetensors', whose lora_unet_x.lora_up.weight contains NaN"):
        read_lora(path)


@pytest.mark.parametrize("which", SNAPSHOTS)
def test_a_run_without_a_lora_leaves_the_model_as_it_is(run, which):
    for path in (run.path / "lora").iterdir():
        path.unlink()
    assert find_snapshot(run, which, 1) == Found(None, "no LoRA yet")


def test_a_newest_lora_between_two_snapshots_counts_by_what_it_says_of_itself(run):
    run.lora(3).unlink()
    assert snapshots(run) == {1: run.lora(1), 2: run.lora(2), 3: run.latest_lora}
    save_file({"x": torch.zeros(1)}, run.latest_lora)
    with pytest.raises(ValueError, match="does not state its epoch"):
        snapshots(run)


def test_the_best_is_judged_by_the_images_that_it_drew(run):
    scores = {1: 0.0, 2: 5.0, 3: 9.0, 4: 1.0}
    metrics = [{"epoch": epoch, "key": score} for epoch, score in scores.items()]
    assert best_epoch([1, 2, 3, 4], metrics, "key") == 2, "the images of epoch 3 are drawn by the LoRA of epoch 2"
    assert best_epoch([3, 4], metrics, "key") == 3, "they scored the same, and the first is taken"
    assert find_snapshot(run, TRAINING, 1) == Found(run.lora(2))


def test_without_a_held_out_reward_the_latest_stands_in(run):
    found = find_snapshot(run, HELD_OUT, 1)
    assert found == Found(run.latest_lora, "no held-out reward was measured, so the latest")


def test_the_recommended_one_and_what_stands_in(run):
    assert find_snapshot(run, "recommended", 1) == Found(run.latest_lora, "none is recommended yet, so the latest")
    write_choice(run.recommendation, {"recommended": None})
    found = find_snapshot(run, "recommended", 1)
    assert found.file is None and "no snapshot gained reward and kept the held-out reward" in found.note
    save_file({"x": torch.zeros(1)}, run.recommended_lora, {"epoch": "2", "strength": "0.75"})
    assert find_snapshot(run, "recommended", 1) == Found(run.recommended_lora)
    assert (baked_strength(run.recommended_lora), baked_strength(run.lora(2))) == (0.75, 1.0)
    assert run.recommended_lora not in snapshots(run).values()


@pytest.mark.parametrize(
    "content",
    [b"\x80\x04}\x94\x8c\x01a\x94K\x01s.", b"", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "[:12]],
    ids=["a pickle", "empty", "noise", "truncated"],
)
def test_what_is_no_safetensors_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="got LoRA file 'x.safetensors', which cannot be read") as error:
        read_lora(path)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
