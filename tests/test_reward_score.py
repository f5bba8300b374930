"""`python -m comfy_tdpo.trainer score`: files in, scores out, one line for a wrong input."""

import numpy as np
import pytest
import torch
from PIL import Image

from comfy_tdpo.rewards import function, load_reward
from comfy_tdpo.trainer import score
from comfy_tdpo.trainer.__main__ import main


@pytest.fixture
def files(tmp_path) -> list[str]:
    paths = [tmp_path / name for name in ("red.png", "grey.jpg", "alpha.png")]
    Image.new("RGB", (40, 30), "red").save(paths[0])
    Image.new("L", (64, 64), 128).save(paths[1])
    Image.new("RGBA", (50, 80), (0, 255, 0, 128)).save(paths[2])
    return [str(path) for path in paths]


def test_it_scores_files_of_any_size_and_kind(files, capsys):
    rewards = ["shapes-alignment", "jpeg-compressibility"]
    flags = [flag for name in rewards for flag in ("--reward", name)]
    assert main(["score", *flags, "--prompt", "a red circle", *files]) == 0
    header, *lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == ["image", *rewards]
    assert [line[0] for line in lines] == [*files, "mean", "standard deviation"]
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(1, 3, 30, 40)
    expected = [load_reward(name, torch.device("cpu")).score(red, ["a red circle"]).item() for name in rewards]
    assert [float(value) for value in lines[0][1:]] == pytest.approx(expected, rel=1e-5)
    column = torch.tensor([float(line[1]) for line in lines[:3]])
    assert float(lines[3][1]) == pytest.approx(column.mean().item(), rel=1e-4)
    assert float(lines[4][1]) == pytest.approx(column.std().item(), rel=1e-4)


def test_sixteen_bits_are_what_eight_are(tmp_path, capsys):
    levels = np.arange(64 * 64).reshape(64, 64) % 256
    paths = [tmp_path / "eight.png", tmp_path / "sixteen.png"]
    Image.fromarray(levels.astype(np.uint8)).save(paths[0])
    Image.fromarray((levels * 257).astype(np.uint16)).save(paths[1])
    assert main(["score", "--reward", "shapes-judge", "--prompt", "a red circle", *map(str, paths)]) == 0
    eight, sixteen = (line.split("\t")[1] for line in capsys.readouterr().out.splitlines()[1:3])
    assert eight == sixteen


def test_a_photo_is_turned_as_its_camera_says(tmp_path, capsys):
    picture = Image.fromarray(np.arange(64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "plain.png")
    picture.rotate(180).save(tmp_path / "turned.png", exif=exif)
    paths = [str(tmp_path / name) for name in ("plain.png", "turned.png")]
    assert main(["score", "--reward", "shapes-aesthetic", *paths]) == 0
    plain, turned = (line.split("\t")[1] for line in capsys.readouterr().out.splitlines()[1:3])
    assert plain == turned


def test_a_reward_that_fails_is_named(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_score.py").write_text("def broken(images, prompts):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(function, "_allowed", False)  # put back after the test: the command allows them
    assert main(["score", "--reward", "python:my_score:broken", files[0]]) == 1
    assert "reward 'python:my_score:broken' returned shape ()" in capsys.readouterr().err


def test_precision_and_weights_are_passed_on(files, monkeypatch):
    asked = {}

    def load(name, *how):
        asked[name] = how
        return load_reward("jpeg-compressibility", how[0])

    monkeypatch.setattr(score, "load_reward", load)
    how = ["--reward-precision", "bf16", "--reward-weights", "hpsv2=/a/b.pt"]
    assert main(["score", "--reward", "hpsv2", *how, files[0]]) == 0
    assert asked["hpsv2"][1:] == ("bf16", {"hpsv2": "/a/b.pt"})


def test_one_file_has_no_spread(files, capsys):
    assert main(["score", "--reward", "jpeg-compressibility", files[0]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


WRONG = {
    "an unknown reward": (["--reward", "beauty", "{image}"], "got reward 'beauty'; expected one of"),
    "no image": (["--reward", "shapes-judge", "{folder}/no.png"], "no.png cannot be read as an image"),
    "no weights": (
        ["--reward", "hpsv2", "--reward-weights", "hpsv2={folder}/hps.pt", "{image}"],
        "hps.pt' as the weights of reward 'hpsv2', where nothing is",
    ),
    "weights of another": (
        ["--reward", "shapes-judge", "--reward-weights", "hpsv2=hps.pt", "{image}"],
        "got --reward-weights 'hpsv2=hps.pt'; expected NAME=PATH,... of rewards that --reward names",
    ),
    "weights of nothing": (["--reward", "hpsv2", "--reward-weights", "hpsv2", "{image}"], "expected NAME=PATH,..."),
    "floats": (["--reward", "shapes-judge", "{folder}/floats.tiff"], "has 32 bits a pixel, whose white nobody knows"),
    "a bomb": (["--reward", "shapes-judge", "{folder}/bomb.png"], "bomb.png cannot be read as an image"),
    "a prompt it cannot judge": (
        ["--reward", "shapes-gold", "--prompt", "a fox", "{image}"],
        "judges prompts of Shapes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line(files, tmp_path, capsys, case):
    args, complaint = WRONG[case]
    Image.new("F", (8, 8)).save(tmp_path / "floats.tiff")
    if case == "a bomb":
        Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert main(["score", *(arg.format(image=files[0], folder=tmp_path) for arg in args)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("comfy_tdpo: ") and complaint in line
