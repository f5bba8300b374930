"""The command line as a user meets it: exit status, one line for a wrong input, Ctrl-C, a full disk."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from accelerate.tracking import GeneralTracker
from toy import new_run, toy_training

from comfy_tdpo import __version__
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.new_folder import make_folder

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-m", "comfy_tdpo.trainer"]
QUICK = ["--epochs", "2", "--samples-per-epoch", "4", "--samples-per-update", "2", "--steps", "2"]
QUICK += ["--output.grid-images", "2"]
OUTPUT = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def train(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*TRAIN, *args], cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A quick run of the embedded world, through a process of its own."""
    path = tmp_path_factory.mktemp("cli") / "run"
    return path, train("--run-dir", str(path), *QUICK)


def test_a_run_leaves_everything_it_promises(finished):
    path, process = finished
    assert process.returncode == 0, process.stderr
    made = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert made >= {
        "config.toml",
        "metrics.jsonl",
        "samples/epoch-0000.png",
        "samples/epoch-0002.png",
        "lora/epoch-0002.safetensors",
        "lora/latest.safetensors",
        "checkpoints/epoch-0002/state.json",
        "plots/reward.png",
    }
    assert [line["epoch"] for line in RunFolder.open(path).metrics()] == [1, 2]


def test_it_prints_lines_and_a_summary_and_nothing_else(finished):
    _, process = finished
    loading, training, *epochs = process.stderr.splitlines()
    assert loading.startswith("run ") and loading.endswith("loading")
    assert training == "training shapes with ddpo-g on cpu, 4 samples per epoch"
    assert [line.split()[:2] for line in epochs] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert "shapes-gold (held out)" in process.stdout
    assert "shapes-alignment (guard)" in process.stdout
    assert "load_lora_weights" in process.stdout


def test_resuming_a_finished_run_changes_nothing(finished):
    path, _ = finished
    before = (path / "metrics.jsonl").read_bytes(), (path / "lora" / "latest.safetensors").read_bytes()
    assert main(["--resume", str(path)]) == 0
    assert before == ((path / "metrics.jsonl").read_bytes(), (path / "lora" / "latest.safetensors").read_bytes())


def test_a_finished_run_is_trained_longer(finished, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "longer")
    process = train("--resume", str(path), "--epochs", "3", "--output.samples_every", "1")
    assert process.returncode == 0, process.stderr
    assert [line["epoch"] for line in RunFolder.open(path).metrics()] == [1, 2, 3]
    assert RunFolder.open(path).config.epochs == 3


def test_resumed_settings_are_the_runs_own(finished, capsys):
    path, _ = finished
    assert main(["--resume", str(path), "--print-config"]) == 0
    written_by, _, settings = (path / "config.toml").read_text().partition("\n")
    assert capsys.readouterr().out == settings and written_by == f"# comfy_tdpo {__version__}"
    assert main(["--resume", str(path), "--policy.lr", "0.1"]) == 2
    assert "--resume with other settings (--policy.lr)" in capsys.readouterr().err
    assert main(["--resume", str(path), "--reward", "shapes-gold", "--preset", "shapes"]) == 2
    assert "--resume with other settings (--preset, --reward)" in capsys.readouterr().err


def test_a_run_whose_configuration_was_edited_says_what_to_put_back(finished, tmp_path, capsys):
    path = shutil.copytree(finished[0], tmp_path / "edited")
    lr, config = RunFolder.open(path).config.policy.lr, (path / "config.toml").read_text()
    edited = config.replace("guidance = 3.0", "guidance = 4.0").replace(f"lr = {lr}", "lr = 0.0006")
    (path / "config.toml").write_text(edited)
    assert main(["--resume", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"guidance was 3.0 and is 4.0, policy.lr was {lr} and is 0.0006; expected the same" in err
    assert "restore its config.toml, or start a new run" in err
    (path / "config.toml").write_text(edited.replace("lr = 0.0006", "lr = 6.0"))
    assert main(["--resume", str(path)]) == 2
    assert f"configuration '{path / 'config.toml'}': policy.lr: got 6.0; expected" in capsys.readouterr().err


def test_a_run_whose_files_have_moved_says_how_to_go_on(finished, tmp_path, capsys):
    path = shutil.copytree(finished[0], tmp_path / "moved")
    config = (path / "config.toml").read_text()
    for model in ("/gone/model", "C:\\gone\\model.safetensors"):
        (path / "config.toml").write_text(config.replace('model = "shapes"', f"model = '{model}'"))
        assert main(["--resume", str(path)]) == 2
        err = capsys.readouterr().err
        assert f"the model of this run, {model!r}, does not exist; if it was moved, resume with: " in err
        assert err.endswith(f"-m comfy_tdpo.trainer --resume {path} --model NEW\n")
    (path / "config.toml").write_text(
        config.replace("[reward_weights]", '[reward_weights]\nshapes-judge = "/gone/weights"')
    )
    assert main(["--resume", str(path)]) == 2
    assert f"--resume {path} --reward-weights shapes-judge=NEW" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "1"], "got 1 epoch for a run that has finished 2"),
        (["--output.trackers", "abacus"], "got tracker 'abacus'"),
        (["--epochs", "3", "--model", "no/such"], "no/such"),
        (
            ["--epochs", "3", "--reward-weights", "shapes-aesthetic=x"],
            "as the weights of reward 'shapes-aesthetic', which",
        ),
    ],
)
def test_a_resume_that_is_refused_changes_no_file(flags, message, finished, capfd, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # nobody waits for the hub
    path, _ = finished
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert main(["--resume", str(path), *flags]) == 2
    assert message in capfd.readouterr().err
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_equal_runs_leave_equal_files_that_others_can_read(finished, tmp_path):
    path = tmp_path / "again"
    assert main(["--run-dir", str(path), *QUICK]) == 0
    for name in ("lora/latest.safetensors", "checkpoints/epoch-0002/policy.safetensors"):
        assert (path / name).read_bytes() == (finished[0] / name).read_bytes(), name
        assert (path / name).stat().st_mode == (path / "metrics.jsonl").stat().st_mode


def test_a_preset_does_not_watch_what_is_trained_on(capsys):
    assert main(["--reward", "shapes-judge", "--print-config"]) == 0
    assert 'eval_rewards = [\n    "shapes-gold",\n]' in capsys.readouterr().out


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_idle_threads_spin_briefly_unless_the_user_says_how_long(own, monkeypatch, capsys):
    """Before torch is loaded, as the next test checks: its OpenMP reads this once."""
    named = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in named} | own)
    assert main(["--print-config"]) == 0
    expected = own or {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    assert {name: os.environ[name] for name in named if name in os.environ} == expected


def test_the_help_needs_no_torch():
    code = "import sys, comfy_tdpo.trainer.__main__ as m; m.parse([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_default_folders_differ_within_a_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = [folder for folder, _ in pool.map(make_folder, [None] * 8)]
    assert len(set(folders)) == 8


WRONG = {
    "an unknown preset": (["--preset", "sd99"], "got preset 'sd99'; expected one of"),
    "an unknown flag": (["--polcy.lr", "1"], "unrecognized arguments: --polcy.lr 1; did you mean --policy.lr?"),
    "a flag without its section": (["--lr=1"], "--lr=1; did you mean --policy.lr or --critic.lr?"),
    "a flag by another name": (["--learning_rate", "1"], "did you mean --policy.lr or --critic.lr?"),
    "no flag": (["train"], "unrecognized arguments: train; options begin with --"),
    "an empty variable": (["--run-dir="], "argument --run-dir: got '' as a path"),
    "a home of nobody": (["--resume=~nobody-of-that-name/x"], "~nobody-of-that-name has no home folder here"),
    "a model in a home of nobody": (["--model=~nobody-of-that-name/x"], "~nobody-of-that-name has no home folder"),
    "an unknown reward": (["--reward", "beauty"], "got reward 'beauty'"),
    "a weight that is no number": (["--reward", "shapes-judge=much"], "NAME=WEIGHT"),
    "no weights": (
        ["--preset", "sd14-pickscore", "--reward-weights", "pickscore=/no/such/file"],
        "got '/no/such/file' as the weights of reward 'pickscore', but nothing is there",
    ),
    "a reward's weights without their name": (["--reward-weights", "a.pth"], "got 'a.pth'; expected NAME=VALUE"),
    "a scale without its number": (["--reward-scales", "shapes-judge"], "got 'shapes-judge'; expected NAME=VALUE"),
    "a function that is nowhere": (["--reward", "python:no_such_module:f"], "cannot be imported"),
    "an unknown prompt set": (["--prompts", "no-such-set"], "got prompts 'no-such-set'"),
    "prompts that need a copy": (["--prompts", "hpd-photo"], "does not ship"),
    "a negative number": (["--epochs", "-3"], "epochs: got '-3'"),
    "an absurd number": (["--policy.lr", "1e9"], "policy.lr: got '1e9'"),
    "no number": (["--steps", "many"], "steps: got 'many'"),
    "no model": (["--preset", "shapes", "--model", "/no/such/model"], "/no/such/model"),
    "a missing configuration": (["--config", "/no/such.toml"], "/no/such.toml"),
    "a resolution between latents": (["--resolution", "67"], "resolution 67"),
    "no run to resume": (["--resume", "/no/such/run"], "got run directory '/no/such/run'"),
    "a folder under a file": (["--run-dir", f"{__file__}/run"], "cannot be created"),
    "no model at all": (["--model", ""], "model: got ''"),
    "a reward twice": (["--reward", "shapes-gold", "--reward", "shapes-gold=2"], "'shapes-gold' twice"),
    "a weight beyond reason": (["--reward", "shapes-aesthetic=1e308"], "rewards.shapes-aesthetic: got 1e+308"),
    "a guard that only evaluates": (["--guard", "shapes-judge"], "which may only evaluate"),
    "a held-out reward that is trained on": (["--eval-reward", "shapes-aesthetic"], "which is trained on"),
    "a prompt for a file": (["--prompts", "a red circle " * 3000], "got prompts 'a red circle"),
    "an unknown tracker": (["--output.trackers", "abacus"], "got tracker 'abacus'"),
    "prompts that a reward cannot read": (
        ["--prompts", "simple-animals"],
        "shapes-gold can only judge prompts of Shapes",
    ),
    "more steps than the schedule has": (["--steps", "1000"], "start beyond the 1000 timesteps"),
    "a critic without an encoder": (["--critic.encoder", "shapes-gold"], "has no image encoder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_gives_one_line_and_status_2_and_leaves_nothing(case, tmp_path, monkeypatch, capfd):
    flags, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    try:
        status = main(flags)
    except SystemExit as exit_:  # argparse
        status = exit_.code
    assert status == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("comfy_tdpo:")]
    assert len(lines) == 1
    assert message in lines[0] and len(lines[0]) < 1000
    assert list(tmp_path.iterdir()) == []


def test_watching_no_reward_lets_other_prompts_in(tmp_path, capsys):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a whale in the sea\n")
    flags = ["--prompts", str(prompts), "--eval-reward", "none", "--run-dir", str(tmp_path / "run")]
    assert main([*flags, *QUICK, "--epochs", "1"]) == 0
    assert "shapes-gold" not in capsys.readouterr().out


README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
MISSING = {"score": "*.png cannot be read as an image", "recommend": "expected the folder of a run"}
MISSING["evaluate"] = MISSING["recommend"]
README_COMMANDS = set(re.findall(r"python -m comfy_tdpo\.trainer([^`\n]*)", README))


@pytest.mark.parametrize("command", sorted(command for command in README_COMMANDS if "--resume" not in command))
def test_the_readmes_commands_are_understood(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no image to score and no run
    name, *rest = shlex.split(command) or [""]
    if name in MISSING:
        assert main([name, *rest]) == 2
        assert MISSING[name] in capsys.readouterr().err
    else:
        assert main([*shlex.split(command), "--print-config"]) == 0, capsys.readouterr().err


def test_a_run_directory_that_is_taken_is_left_alone(finished, tmp_path, capsys):
    path, _ = finished
    assert main(["--run-dir", str(path)]) == 2
    assert "--resume" in capsys.readouterr().err
    (tmp_path / "thesis.doc").write_text("important")
    assert main(["--run-dir", str(tmp_path)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_print_config_is_a_configuration(tmp_path, capsys):
    assert main(["--print-config", "--epochs", "7", "--policy.alpha", "8"]) == 0
    file = tmp_path / "printed.toml"
    file.write_text(capsys.readouterr().out)
    assert main(["--print-config", "--config", str(file)]) == 0
    assert capsys.readouterr().out == file.read_text()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_ctrl_c_saves_and_says_how_to_continue(tmp_path, start):
    path = tmp_path / "run"
    flags = ["--run-dir", str(path), *QUICK, "--epochs", "500"]
    process = start([*TRAIN, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not RunFolder(path).metrics() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"{sys.executable} -m comfy_tdpo.trainer --resume {path}" in out
    assert "Traceback" not in err
    assert (path / "lora" / "latest.safetensors").exists()
    assert any((path / "checkpoints").iterdir())


def test_signals_are_the_programs_own_again_when_it_is_done(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["--run-dir", str(tmp_path / "run"), *QUICK, "--epochs", "1"]) == 0
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_ctrl_c_before_the_first_epoch_does_not_wait_for_the_sample_grid(tmp_path, make_policy):
    stop, seen = threading.Event(), []
    training = toy_training(new_run(tmp_path / "run"), make_policy, stop, lambda *call: seen.append(call) or stop.set())
    assert list(training.epochs()) == [] and training.stopped
    assert [phase for phase, _, _ in seen] == ["drawing samples"]
    assert not (tmp_path / "run" / "samples").exists()


class Notebook(GeneralTracker):
    """A tracker that keeps what it is told, and makes its folder as soon as it is started."""

    name, requires_logging_directory, told = "notebook", True, []

    def __init__(self, run_name, logging_dir, **_):
        super().__init__()
        self.folder = Path(logging_dir) / run_name

    @property
    def tracker(self):
        return self.told

    def start(self):
        self.folder.mkdir(parents=True)
        self.told.append("start")

    def store_init_configuration(self, values):
        self.told.append(values["policy.lr"])

    def log(self, values, step=None, **_):
        self.told.append(step)

    def finish(self):
        self.told.append("finish")


def test_trackers_hear_of_every_epoch_and_of_the_end(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setattr("comfy_tdpo.trainer.assemble.check_trackers", lambda names: [Notebook("comfy_tdpo", path)])
    assert main(["--run-dir", str(path), *QUICK, "--output.trackers", "notebook", "--policy.lr", "0.003"]) == 0
    assert Notebook.told == ["start", 0.003, 1, 2, "finish"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_ctrl_c_while_it_loads_is_one_line_and_leaves_nothing(tmp_path, start):
    flags = ["--run-dir", str(tmp_path / "run"), *QUICK, "--epochs", "500"]
    process = start([*TRAIN, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().endswith("loading\n")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    last = err.splitlines()[-1].removesuffix(" while loading; nothing was changed")  # unless it came at once
    assert last == "comfy_tdpo: stopped"
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


LIMIT_FILE_SIZE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from comfy_tdpo.trainer.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of a file")
def test_a_disk_that_takes_no_more_ends_the_run_in_one_line_and_damages_nothing(tmp_path):
    path = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, "-c", LIMIT_FILE_SIZE, "--run-dir", str(path), *QUICK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert [line for line in process.stderr.splitlines() if "File too large" in line and str(path) in line]
    assert not list(path.rglob("*.partial*"))
    assert main(["--resume", str(path)]) == 0


def test_two_processes_do_not_write_to_one_run(finished, capsys):
    path, _ = finished
    with RunFolder.open(path).lock():
        assert main(["--resume", str(path)]) == 2
    assert "in use by another process" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path, start):
    path = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "comfy_tdpo.trainer"]
    process = start([sys.executable, *launch, "--run-dir", str(path), *QUICK], cwd=ROOT, **OUTPUT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert [line["epoch"] for line in RunFolder.open(path).metrics()] == [1, 2]


# accelerate's own launcher starts one process on a CPU whatever it is told; torch's, which it uses on GPUs, starts two
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "comfy_tdpo.trainer"]
ON_TWO_PROCESSES = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}}


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one(tmp_path, finished, start):
    path = tmp_path / "run"
    flags = [*TWO_PROCESSES, "--run-dir", str(path), *QUICK]
    process = start([sys.executable, *flags], **ON_TWO_PROCESSES, **OUTPUT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    one, two = RunFolder.open(finished[0]).metrics(), RunFolder.open(path).metrics()
    assert [line["epoch"] for line in two] == [1, 2]
    names = [name for name in one[0] if name.startswith(("reward/", "eval/", "guard/"))]
    assert len(names) == 11
    for name in names:  # forwards of one row and of two round differently: float32, through two steps and a decoder
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send to another process")
def test_two_processes_stop_together_with_everything_saved(tmp_path, start):
    path = tmp_path / "run"
    flags = [*TWO_PROCESSES, "--run-dir", str(path), *QUICK, "--epochs", "500", "--output.checkpoint-every", "500"]
    process = start([sys.executable, *flags], **ON_TWO_PROCESSES, **OUTPUT)
    deadline = time.monotonic() + 200
    while not RunFolder(path).metrics() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=100)
    assert f"--resume {path}" in out, out
    epochs = len(RunFolder.open(path).metrics())
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == [f"epoch-{epochs:04d}"]
    assert (path / "lora" / "latest.safetensors").exists()
