"""A run outlives moves of its model and of its rewards' weights: told once where they are, it knows."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_rewards import save_small_weights, use_small_architectures

from comfy_tdpo.shapes import WORLD
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.run import RunFolder

QUICK = ["--preset", "shapes", "--epochs", "1", "--samples-per-epoch", "4", "--samples-per-update", "2", "--steps", "2"]
QUICK += ["--resolution", "32", "--output.grid-images", "1", "--run-dir", "run"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Where everything lies, and paths begin."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resume(*flags: str) -> int:
    return main(["--resume", "run", *flags])


def epochs() -> list[float]:
    return [line["epoch"] for line in RunFolder.open(Path("run")).metrics()]


def test_a_model_that_moves_twice(place, capsys):
    model = Path(shutil.copytree(WORLD / "pipeline", "first"))
    assert main([*QUICK, "--eval-reward", "none", "--model", str(model)]) == 0
    for count, name in ((2, "second"), (3, "third")):
        model = model.rename(name)
        assert resume() == 2
        assert "--model NEW" in capsys.readouterr().err
        assert resume("--model", name, "--epochs", str(count)) == 0
        assert RunFolder.open(Path("run")).config.model == str(place / name)
        assert resume() == 0, "it was kept"
        assert epochs() == list(range(1, count + 1))


def test_another_model_at_the_new_place_is_refused(capsys):
    model = Path(shutil.copytree(WORLD / "pipeline", "first"))
    assert main([*QUICK, "--eval-reward", "none", "--model", str(model)]) == 0
    (file,) = Path(shutil.copytree(model, "other")).glob("unet/*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"] += 0.01
    save_file(weights, file)
    before = Path("run/config.toml").read_bytes()
    assert resume("--model", "other", "--epochs", "2") == 2
    assert re.search("got .* model ", capsys.readouterr().err)
    assert Path("run/config.toml").read_bytes() == before and epochs() == [1]
    assert resume("--epochs", "2") == 0, "with its own it goes on"


def test_a_rewards_weights_that_move_twice(place, capsys, monkeypatch):
    use_small_architectures(monkeypatch)
    weights = Path(save_small_weights(place / "all")["clipscore"]).rename("first")
    watch = ["--eval-reward", "clipscore", "--reward-weights"]
    assert main([*QUICK, *watch, f"clipscore={weights}"]) == 0
    for count, name in ((2, "second"), (3, "third")):
        weights = weights.rename(name)
        assert resume() == 2
        assert "--reward-weights clipscore=NEW" in capsys.readouterr().err
        assert resume("--reward-weights", f"clipscore={name}", "--epochs", str(count)) == 0
        assert RunFolder.open(Path("run")).config.reward_weights == {"clipscore": str(place / name)}
        assert resume() == 0, "it was kept"
        assert epochs() == list(range(1, count + 1))
