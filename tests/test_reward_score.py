"""`python -m comfy_tdpo.trainer score`: files in, scores out, one line for a wrong input."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from comfy_tdpo.rewards import function, load_reward
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.terminal import score


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


def test_a_prompt_is_read_as_plain_words(files, capsys):
    """As in a file of prompts: signs that nobody sees are left out, and markup is refused."""
    asked = ["score", "--reward", "shapes-judge", files[0], "--prompt"]
    for prompt in ("a red circle", "\ufeffa\u00a0red circle\u200b\n"):
        assert main([*asked, prompt]) == 0
    first, second = capsys.readouterr().out.splitlines()[1::2]
    assert first == second
    assert main([*asked, "a (red:1.3) circle"]) == 2
    said = capsys.readouterr().err
    assert "--prompt has a weight of a user interface in the prompt, '(red:1.3)'; expected plain words" in said


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


def test_a_transparent_image_scores_as_on_white(tmp_path, capsys):
    cutout = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    cutout.paste((255, 0, 0, 255), (20, 20, 44, 44))
    cutout.save(tmp_path / "cutout.png")
    white = Image.new("RGB", cutout.size, "white")
    white.paste(cutout, mask=cutout.getchannel("A"))
    white.save(tmp_path / "white.png")
    paths = [str(tmp_path / name) for name in ("cutout.png", "white.png")]
    assert main(["score", "--reward", "shapes-aesthetic", *paths]) == 0
    transparent, opaque = (line.split("\t")[1] for line in capsys.readouterr().out.splitlines()[1:3])
    assert transparent == opaque


def test_a_tilde_is_the_home_folder(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert main(["score", "--reward", "jpeg-compressibility", "~/red.png"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{tmp_path / 'red.png'}\t")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_name_that_the_console_cannot_show_is_escaped(tmp_path, monkeypatch, encoding):
    """Of another script, of bytes that are no text, and of a tab, which would be a column."""
    names = ["\u72d0.png", os.fsdecode(b"caf\xe9.png"), "a\tb.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    rewards = ["--reward", "jpeg-compressibility"]
    assert main(["score", *rewards, *(str(tmp_path / name) for name in names)]) == 0
    _, fox, cafe, tab, *_ = out.buffer.getvalue().decode(encoding).splitlines()
    assert fox.split("\t")[0].endswith("\u72d0.png" if encoding == "utf-8" else r"\u72d0.png")
    assert cafe.split("\t")[0].endswith(r"caf\udce9.png")
    assert tab.split("\t")[0].endswith(r"a\tb.png")
    assert main(["score", *rewards, str(tmp_path / "\u72d1.png")]) == 2
    assert b"cannot be read as an image: there is no such file" in err.buffer.getvalue()


def test_control_c_is_one_line(files, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "load_reward", interrupted)
    assert main(["score", "--reward", "hpsv2", files[0]]) == 130
    assert capsys.readouterr().err == "comfy_tdpo: stopped\n"


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
        "hps.pt' as the weights of reward 'hpsv2', but nothing is there",
    ),
    "weights of another": (
        ["--reward", "shapes-judge", "--reward-weights", "hpsv2=hps.pt", "{image}"],
        "got --reward-weights for hpsv2; expected a reward that is used here (shapes-judge): remove it",
    ),
    "weights of an unknown reward": (
        ["--reward", "beauty", "--reward-weights", "beauty=x", "{image}"],
        "got reward 'beauty'; expected one of",
    ),
    "weights twice": (
        ["--reward", "hpsv2", "--reward-weights", "hpsv2=a.pt,hpsv2=b.pt", "{image}"],
        "got --reward-weights with hpsv2 twice, 'a.pt' and 'b.pt'; expected it once",
    ),
    "weights of nothing": (
        ["--reward", "hpsv2", "--reward-weights", "hpsv2", "{image}"],
        "expected a reward with its",
    ),
    "floats": (["--reward", "shapes-judge", "{folder}/floats.tiff"], "has 32-bit pixels, which define no white"),
    "a folder": (["--reward", "shapes-judge", "{folder}"], "it is a folder; give the files in it"),
    "an image twice": (["--reward", "shapes-judge", "{image}", "{image}"], "the same file; give each image once"),
    "an image by two names": (["--reward", "shapes-judge", "{image}", "{folder}/link.png"], "give each image once"),
    "another's home": (["--reward", "shapes-judge", "~nobody-at-all/a.png"], "got ~nobody-at-all/a.png, whose home"),
    "a bomb": (["--reward", "shapes-judge", "{folder}/bomb.png"], "bomb.png cannot be read as an image"),
    "a prompt it cannot judge": (
        ["--reward", "shapes-gold", "--prompt", "a fox", "{image}"],
        "can only judge prompts of Shapes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line(files, tmp_path, capsys, case):
    args, complaint = WRONG[case]
    Image.new("F", (8, 8)).save(tmp_path / "floats.tiff")
    (tmp_path / "link.png").symlink_to(files[0])
    if case == "a bomb":
        Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert main(["score", *(arg.format(image=files[0], folder=tmp_path) for arg in args)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("comfy_tdpo: ") and complaint in line
