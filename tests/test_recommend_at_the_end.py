"""A recommendation at the end of a training, and the `recommend` command."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import safe_open
from test_recommend import Held, constant
from toy import Brightness, new_run, toy_training

from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.job import Job
from comfy_tdpo.trainer.recommend import work
from comfy_tdpo.trainer.recommend.options import Options
from comfy_tdpo.trainer.run import RunFolder

ROOT = Path(__file__).parent.parent
QUICK = ["--epochs", "2", "--samples-per-epoch", "4", "--samples-per-update", "2", "--steps", "2"]
QUICK += ["--output.grid-images", "2", "--output.samples-every", "1"]


@pytest.fixture
def job(tmp_path, make_policy, monkeypatch):
    """A job on a toy run that recommends with rewards that need no model, from few images."""
    monkeypatch.setattr(work, "_load_rewards", lambda *_: (Brightness(), Held(constant)))
    monkeypatch.setattr(work, "Options", lambda images: Options(strengths=(1.0,), images=images))

    def make(**output):
        path, output = tmp_path / "run", output | {"recommend_images": 4}
        run = RunFolder.open(path) if path.exists() else new_run(path, output=output)
        return Job(run, lambda run, stop, watch: toy_training(run, make_policy, stop, watch))

    return make


def test_a_job_recommends_if_its_run_says_so(job):
    job, phases, left = job(recommend=True), [], []
    job.subscribe(lambda event, status: phases.append((status.phase, status.phase_done, status.phase_total)))
    job.subscribe(lambda event, status: left.append(status.eta_s) if phases[-1] == ("recommending", 0, 12) else None)
    job.start()
    assert job.wait(120).state == "finished"
    assert left == [None], "the last epoch's 0 seconds are not those of the recommendation"
    assert ("recommending", 12, 12) in phases, "the base model and the LoRAs of epochs 2 and 3, four images each"
    assert json.loads((job.run.recommendation / "choice.json").read_text())["newest_epoch"] == 3


def test_a_job_does_not_unless_asked(job):
    job = job()
    job.start()
    assert job.wait(120).state == "finished" and not job.run.recommendation.exists()


def test_a_stopped_recommendation_goes_on_without_training_again(job):
    first = job(recommend=True)
    first.subscribe(lambda event, status: first.stop() if (status.phase, status.phase_done) == PAUSE else None)
    first.start()
    assert first.wait(120).state == "stopped"
    table, metrics = first.run.recommendation / "table.jsonl", first.run.metrics()
    assert len(metrics) == 3 and len(table.read_text().splitlines()) == 4
    again, phases = job(), []
    again.subscribe(lambda event, status: phases.append((status.phase, status.phase_total)))
    again.start()
    assert again.wait(120).state == "finished"
    assert ("recommending", 8) in phases and again.run.metrics() == metrics


PAUSE = ("recommending", 4)


# --- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A quick run of Shapes, which recommends nothing by itself."""
    path = tmp_path_factory.mktemp("recommend") / "run"
    assert main(["--run-dir", str(path), *QUICK]) == 0
    return path


def recommend(*args: str, images: int = 4) -> int:
    return main(["recommend", *args, "--images", str(images)])


def test_the_command_prints_a_table_and_writes_the_lora(trained, capsys):
    assert recommend(str(trained), "--strengths", "1,0.5", "--tolerance", "100") == 0
    out, err = capsys.readouterr()
    assert "prompts: shapes-unseen (8 prompts, none of them trained on)" in err
    head, base, *rows = out.split("\n\n")[0].splitlines()
    assert head.split() == ["snapshot", "strength", "shapes-aesthetic", "shapes-match", "change"]
    assert base.split()[:2] == ["base", "-"]
    labels = [("epoch 1", "0.5"), ("epoch 1", "1"), ("epoch 2", "0.5"), ("epoch 2", "1")]
    assert [(" ".join(row.split()[:2]), row.split()[2]) for row in rows] == labels
    choice = json.loads((trained / "recommendation" / "choice.json").read_text())
    chosen = choice["recommended"]
    marked = [label for label, row in zip(labels, rows, strict=True) if row.endswith("recommended")]
    if chosen is None:
        assert marked == [] and "No snapshot is recommended" in out
        return
    assert marked == [(chosen["snapshot"], f"{chosen['strength']:g}")]
    with safe_open(trained / "lora" / "recommended.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == str(chosen["epoch"])
        assert file.metadata()["held_out"] == "shapes-match"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--strengths", "0.5,strong"], "got '0.5,strong'; expected numbers with commas"),
        (["--strengths", "nan"], "got strengths nan; expected different numbers above 0"),
        (["--held-out", "shapes-gold"], "'shapes-gold', which may only evaluate"),
        (["--held-out", "beauty"], "got reward 'beauty'; expected one of"),
        (["--prompts", "nowhere.txt"], "got prompts 'nowhere.txt'; expected a text file"),
        (["--steps", "1"], "unrecognized arguments: --steps 1"),
    ],
)
def test_nonsense_is_one_line(trained, capsys, args, message):
    try:
        status = main(["recommend", str(trained), *args])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1


def test_a_folder_that_is_no_run_and_a_run_that_trains(trained, tmp_path, capsys):
    assert recommend(str(tmp_path)) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    with RunFolder.open(trained).lock():
        assert recommend(str(trained)) == 2
    assert "is in use by another process; stop that first" in capsys.readouterr().err


def test_a_training_that_recommends_says_what(trained, tmp_path, capsys):
    few = ["--output.recommend", "true", "--output.recommend-images", "4"]
    assert main(["--run-dir", str(tmp_path / "run"), *QUICK, *few]) == 0
    out, err = capsys.readouterr()
    assert "2 snapshots (strengths 0.5, 0.75, 1) and the base model, 4 images each" in err
    assert out.index("load_lora_weights") < out.index("snapshot  strength"), "the summary comes first"
    assert (tmp_path / "run" / "recommendation" / "choice.json").is_file()


def test_a_training_that_cannot_recommend_does_not_start(tmp_path, capsys):
    rewards = ["--reward", "shapes-match", "--output.recommend", "true", "--eval-reward", "none"]
    folder = str(tmp_path / "run")
    assert main(["--run-dir", folder, *QUICK, *rewards]) == 2
    assert "no held-out reward which may choose its LoRA" in capsys.readouterr().err
    assert not Path(folder).exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_control_c_keeps_what_is_scored(trained, start):
    table = trained / "recommendation" / "table.jsonl"
    before = len(table.read_text().splitlines()) if table.exists() else 0
    command = [sys.executable, "-m", "comfy_tdpo.trainer", "recommend", str(trained), "--images", "4000"]
    process = start(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    scored = threading.Event()
    while not scored.wait(0.1):
        assert process.poll() is None, process.communicate()
        if table.exists() and len(table.read_text().splitlines()) > before:
            scored.set()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == "" and "stopped; what was scored is saved" in err and "Traceback" not in err
    assert all(json.loads(line)["scores"] for line in table.read_text().splitlines())
