"""`python -m comfy_tdpo.trainer score`: files in, scores out, one line for a wrong input."""

import pytest
import torch
from PIL import Image

from comfy_tdpo.rewards import load_reward
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


def test_one_file_has_no_spread(files, capsys):
    assert main(["score", "--reward", "jpeg-compressibility", files[0]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


WRONG = {
    "an unknown reward": (["--reward", "beauty", "{image}"], "got reward 'beauty'; expected one of"),
    "no image": (["--reward", "shapes-judge", "{folder}/no.png"], "no.png cannot be read as an image"),
    "no weights": (
        ["--reward", "hpsv2", "--reward-weights", "hpsv2={folder}/hps.pt", "{image}"],
        "hps.pt as the weights of reward 'hpsv2', where nothing is",
    ),
    "a prompt it cannot judge": (
        ["--reward", "shapes-gold", "--prompt", "a fox", "{image}"],
        "judges prompts of Shapes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line(files, tmp_path, capsys, case):
    args, complaint = WRONG[case]
    assert main(["score", *(arg.format(image=files[0], folder=tmp_path) for arg in args)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("comfy_tdpo: ") and complaint in line
