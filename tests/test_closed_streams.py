"""Consoles and pipes that are not UTF-8, closed, or left by their reader; the training goes on, the status is right."""

import io
import os
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.terminal.streams import forgiving_streams, unheard_stdout

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-m", "comfy_tdpo.trainer"]
QUICK = ["--epochs", "1", "--samples-per-epoch", "4", "--samples-per-update", "2", "--steps", "2"]
QUICK += ["--output.grid-images", "2", "--run-dir"]
posix = pytest.mark.skipif(os.name == "nt", reason="shells of Windows close no streams")


def shell(command: str, **settings: str) -> subprocess.CompletedProcess:
    """`command` in bash, where TRAIN is the command line; its status is that of the first part of a pipe."""
    script = f'TRAIN() {{ "{sys.executable}" -m comfy_tdpo.trainer "$@"; }}; {command}; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | settings
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, timeout=300)


def test_a_finished_run_ends_as_finished_whatever_the_console(monkeypatch, tmp_path):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main([*QUICK, str(tmp_path / "фокс")]) == 0
    assert b"\\u0444\\u043e\\u043a\\u0441/lora" in out.buffer.getvalue()
    assert b" +- " in err.buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are Unicode")
@pytest.mark.parametrize("option", ["--run-dir", "--resume", "--model"])
def test_a_name_that_is_no_text_is_refused_before_a_run_lies_under_it(option, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    with suppress(SystemExit):
        assert main([option, "caf\udce9"]) == 2
    assert "got the path 'caf\\udce9', which is not UTF-8; rename the file or folder" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_printed_configuration_is_one_on_every_console(tmp_path):
    flags = ["--print-config", "--prompts", "фокс é.txt"]
    for encoding in ("ascii", "cp1252", "utf-8"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        process = subprocess.run([*TRAIN, *flags], cwd=ROOT, env=environment, capture_output=True, timeout=60)
        assert tomllib.loads(process.stdout.decode())["prompts"] == "фокс é.txt"


@posix
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("TRAIN --print-config | true", 0),
        ("TRAIN --help | true", 0),
        ("TRAIN --print-config >&-", 0),
        ("TRAIN --epoch 3 2>&-", 2),
        ("TRAIN --epoch 3 2>&1 | true", 2),
    ],
)
def test_a_reader_that_leaves_hears_no_complaint(command, status):
    process = shell(command)
    assert (process.returncode, process.stderr) == (status, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_configuration_that_cannot_be_written_is_a_failure():
    process = shell("TRAIN --print-config > /dev/full")
    assert process.returncode == 1
    assert process.stderr == b"comfy_tdpo: [Errno 28] No space left on device\n"


@posix
def test_a_training_goes_on_without_its_readers(monkeypatch, tmp_path):
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))
    assert main([*QUICK, str(tmp_path / "run")]) == 0
    sys.stdout.close()
    sys.stderr.close()
    assert_finished(tmp_path / "run")


OPENS_A_FILE = """
import os, sys
from comfy_tdpo.trainer.terminal.streams import forgiving_streams
with forgiving_streams():
    os._exit(os.open(os.devnull, os.O_WRONLY))
"""


@posix
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed):
    assert shell(f"\"{sys.executable}\" -c '{OPENS_A_FILE}' {closed}").returncode > 2


@posix
def test_a_training_needs_no_streams(tmp_path):
    process = shell(f'TRAIN {" ".join(QUICK)} "{tmp_path / "run"}" >&- 2>&-')
    assert process.returncode == 0
    assert_finished(tmp_path / "run")


def assert_finished(path: Path) -> None:
    assert [line["epoch"] for line in RunFolder.open(path).metrics()] == [1]
    assert (path / "plots" / "reward.png").exists()


def test_the_streams_are_the_programs_own_again(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with forgiving_streams(), unheard_stdout():
        print("é")
        print("ü", file=sys.stderr)
    assert (sys.stdout, sys.stderr, out.errors, err.errors) == (out, err, "strict", "strict")
    assert (out.buffer.getvalue(), err.buffer.getvalue()) == (b"\\xe9\n", b"\\xfc\n")
