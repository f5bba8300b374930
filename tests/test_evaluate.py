"""The command `evaluate` as a user meets it: what it prints, refuses in one line, and keeps after Ctrl-C."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import new_run

from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.evaluation import work
from comfy_tdpo.trainer.run import RunFolder

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-m", "comfy_tdpo.trainer"]
QUICK = ["--epochs", "2", "--samples-per-epoch", "4", "--samples-per-update", "2", "--steps", "2"]
QUICK += ["--output.grid-images", "2", "--output.samples-every", "1"]
PATIENCE = 600  # seconds for what takes a few on a quiet machine


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[Path]:
    """Quick runs of the embedded world by two algorithms, with the LoRAs of two epochs each."""
    folder, runs = tmp_path_factory.mktemp("runs"), []
    for algorithm in ("tdpo-g", "ddpo-2"):
        runs.append(folder / algorithm)
        assert main(["--run-dir", str(runs[-1]), "--algorithm", algorithm, *QUICK]) == 0
    return runs


@pytest.fixture
def nothing_loads(monkeypatch):
    """Make it an error to load a reward or a model."""

    def fail(*_, **__):
        raise AssertionError("something was loaded")

    for name in ("load_reward", "load_rewards", "_load_policy"):
        monkeypatch.setattr(work, name, fail)


def command(runs, out: Path, *more: str) -> list[str]:
    asked = ["--rewards", "shapes-judge,shapes-gold", "--prompts", "shapes-unseen,shapes-complex", "--images", "1"]
    return ["evaluate", *map(str, runs), *asked, "--out", str(out), *more]


@pytest.mark.slow
def test_ctrl_c_and_going_on_give_the_same_files(trained, tmp_path, start, capsys):
    assert main(command(trained, tmp_path / "whole")) == 0
    told = capsys.readouterr()
    lines = (tmp_path / "whole" / "evaluation.jsonl").read_text().splitlines()
    assert len(lines) == (1 + 2 * 2) * 2
    scores = [json.loads(line)["scores"] for line in lines]
    assert all(list(found) == ["shapes-aesthetic", "shapes-judge", "shapes-gold"] for found in scores)
    assert [len(found["shapes-gold"]) for found in scores] == [8, 4] * 5
    assert "evaluating: 60 of 60 images" in told.err
    assert [line.split()[:2] for line in told.out.splitlines()[2:7]] == [
        ["base", "-"],
        *([algorithm, epoch] for algorithm in ("tdpo-g", "ddpo-2") for epoch in "12"),
    ]
    process = start([*TRAIN, *command(trained, tmp_path / "parts")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    file, end = tmp_path / "parts" / "evaluation.jsonl", time.monotonic() + PATIENCE
    while not (file.exists() and file.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert "what was scored is saved: run the same command again" in err
    assert process.returncode == 130
    assert 3 <= file.read_text().count("\n") < len(lines)
    kept = file.read_bytes()
    assert main(command(trained, tmp_path / "parts")) == 0
    assert file.read_bytes().startswith(kept)
    names = {path.name for path in (tmp_path / "whole").iterdir()} - {".lock", "images"}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    assert {"evaluation.jsonl", "evaluation.md", "cross-reward-shapes-aesthetic.png"} <= names


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run with LoRAs of epochs 3 and 6, which are not read before they are drawn."""
    return with_loras(new_run(tmp_path / "mine"))


def with_loras(run: RunFolder) -> RunFolder:
    for epoch in (3, 6):
        run.lora(epoch).parent.mkdir(exist_ok=True)
        run.lora(epoch).write_bytes(b"%d" % epoch)
    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rewards", "beauty"], "got reward 'beauty'; expected one of aesthetic, "),
        (["--rewards", "shapes-gold,shapes-gold"], "got 'shapes-gold' twice in --rewards; expected each once"),
        (["--rewards", "taste:nowhere"], "got reward 'taste:nowhere', but 'tastes/nowhere' does not exist"),
        (["--prompts", "nothing"], "got prompts 'nothing'; expected a text file with one prompt per line, or one of"),
        (["--prompts", "shapes-unseen,shapes-unseen"], "got 'shapes-unseen' twice in --prompts; expected each once"),
        (["--images", "0"], "got 0 images; expected 1 to 256 per prompt"),
        (["--images", "many"], "argument --images: invalid int value: 'many'"),
        (["--epochs", "3,4"], "run 'mine' has no snapshot of epoch 4; expected some of those it has (3, 6)"),
        (["--epochs", "first"], "expected numbers of epochs with commas between them, such as 5,10, or 'last'"),
        (["--reward-weights", "hpsv2=/x"], "--reward-weights for hpsv2; expected a reward that is used here (shapes-"),
        (["--reward-weights", "hpsv2=/nowhere", "--rewards", "taste:x"], "got reward 'taste:x', but 'tastes/x' does"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_anything_is_loaded(
    run, options, message, tmp_path, capsys, nothing_loads, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    refused(["evaluate", str(run.path), *options], message, capsys)
    assert not (run.path / "evaluation").exists()


def refused(argv: list[str], message: str, capsys) -> None:
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    err = capsys.readouterr().err
    assert status == 2 and message in err
    assert err.count("\n") == 1 and err.startswith("comfy_tdpo: ")


def other_world(run: RunFolder) -> None:
    values = (run.path / "config.toml").read_text()
    values = values.replace('model = "shapes"', 'model = "stable/diffusion"').replace('"shapes"', '"simple-animals"')
    values = values.replace("shapes-aesthetic", "aesthetic").replace("shapes-alignment", "clipscore")
    (run.path / "config.toml").write_text(values.replace("shapes-match", "clipscore"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: other_world(run), "got reward 'shapes-gold', which knows only the world of Shapes, for runs of"),
        (lambda run: shutil.rmtree(run.path / "lora"), "got run 'mine', which has no LoRA yet; expected one that has"),
        (lambda run: shutil.rmtree(run.path), "expected the folder of a run, which has a config.toml"),
        (lambda run: (run.path / "prompts.txt").unlink(), "prompts.txt is missing"),
        (lambda run: (run.path / "evaluation").write_text(""), "evaluation' is a file; choose another with --out DIR"),
        (
            lambda run: run.write_config(run.config.model_copy(update={"model": "comfyui:SD15:abc"})),
            "exists only in its ComfyUI graph; expected one that can be loaded from disk. In that graph, use the node",
        ),
    ],
    ids=["another world", "no snapshot", "no run", "no prompts", "a file in the way", "of a graph"],
)
def test_runs_that_cannot_be_evaluated_are_refused_too(run, change, message, capsys, nothing_loads):
    change(run)
    refused(["evaluate", str(run.path), "--rewards", "shapes-gold"], message, capsys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "x/y"}, "got runs of different base models: model is 'shapes' in 'mine' and 'x/y' in 'other'"),
        ({"steps": 7}, "draw or score their images differently: steps of evaluation is 3 in 'mine' and 7 in 'other'"),
        ({"embedded_guidance": 2.0}, "embedded_guidance is None in 'mine' and 2.0 in 'other'; expected the same"),
        (
            {"eval_guidance": 1.5},
            "guidance of evaluation is 3.0 in 'mine' and 1.5 in 'other'; expected the same",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(run, settings, message, tmp_path, capsys, nothing_loads):
    other = with_loras(new_run(tmp_path / "other", **settings))
    refused(["evaluate", str(run.path), str(other.path)], message, capsys)


def test_runs_of_one_name_and_one_run_twice_are_refused(run, tmp_path, capsys, nothing_loads):
    refused(["evaluate", str(run.path), str(run.path)], "twice; expected each run once: remove one", capsys)
    other = with_loras(new_run(tmp_path / "folder" / "mine"))
    refused(["evaluate", str(run.path), str(other.path)], "got two runs called 'mine', ", capsys)


def test_prompts_that_a_reward_cannot_read_are_refused_before_the_model_is_loaded(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(work, "_load_policy", lambda *_: pytest.fail("the model was loaded"))
    out = ["--out", str(tmp_path / "out")]
    refused(
        ["evaluate", str(run.path), "--rewards", "shapes-gold", "--prompts", "complex", *out],
        "shapes-gold can only judge prompts of Shapes",
        capsys,
    )


def test_runs_with_other_prompts_than_known_ones_need_sets(run, tmp_path, capsys, nothing_loads):
    other_world(run)
    (run.path / "prompts.txt").write_text("a house\n")
    refused(["evaluate", str(run.path)], "name sets or files with --prompts SET,SET", capsys)
