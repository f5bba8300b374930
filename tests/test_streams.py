"""Text for people survives its output stream: limited encodings, few columns, no reader at the other end."""

import io
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from comfy_tdpo.trainer.__main__ import _conclude
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.run import EpochMetrics, RunFolder
from comfy_tdpo.trainer.terminal.console import Console
from comfy_tdpo.trainer.terminal.streams import SafeStream, encodable, say
from comfy_tdpo.trainer.terminal.summary import summary

ROOT = Path(__file__).parent.parent
REWARD = "python:вкус:оценка"
WIDE = "python:審美:点数"
on_a_terminal = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")


def metrics_of(epoch: int, held_out: str = "shapes-judge") -> EpochMetrics:
    line = {"epoch": epoch, "reward_queries": 48 * epoch, f"reward/{REWARD}/mean": 6.31, f"reward/{REWARD}/std": 1.2}
    line |= {f"eval/{held_out}/mean": 0.61, "policy/ratio_drift": 2.1e-7, "time/epoch_s": 4.2}
    return line | {"memory/peak_bytes": 2**30}


def written(encoding: str, write) -> str:
    """What `write` leaves on a strict stream of that encoding, read back in it."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    write(stream)
    stream.flush()
    return raw.getvalue().decode(encoding)


class Pty:
    """A terminal of so many columns; `text` is everything that was written to it."""

    def __init__(self, columns: int, encoding: str = "utf-8"):
        import fcntl
        import termios

        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding=encoding, errors="strict")
        self._encoding, self._read = encoding, b""
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        try:
            while part := os.read(self._master, 1024):
                self._read += part
        except OSError:  # the other end is closed
            pass

    @property
    def text(self) -> str:
        self.stream.close()
        self._reader.join(10)
        os.close(self._master)
        return self._read.decode(self._encoding)


def show(stream, epochs: int = 2, **metrics) -> None:
    console = Console(make_config(overrides={"epochs": 40}), 1, stream)
    if console._bar is not None:
        console._bar.mininterval = 0  # every change is drawn
    console.begin("cpu")
    for epoch in range(1, epochs + 1):
        console.watch("sampling", 24, 48)
        console.epoch(metrics_of(epoch, **metrics))
    console.close()


# --- characters


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "± → é 審 \\udce9"),
        ("utf-16", "± → é 審 \\udce9"),
        ("cp1252", "± -> é \\u5be9 \\udce9"),
        ("latin-1", "± -> é \\u5be9 \\udce9"),
        ("ascii", "+- -> \\xe9 \\u5be9 \\udce9"),
        (None, "± → é 審 \\udce9"),  # a stream in memory
    ],
)
def test_what_an_encoding_lacks_gets_a_stand_in(encoding, expected):
    assert encodable("± → é 審 \udce9", encoding) == expected


def test_a_file_name_that_is_no_text_is_written_as_its_bytes_where_the_stream_can():
    path = os.fsdecode(b"/runs/caf\xe9")
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape")
    say(path, stream)
    assert raw.getvalue() == b"/runs/caf\xe9\n"


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("cp1252", "±"), ("utf-8", "±")])
def test_lines_are_whole_in_every_encoding(encoding, sign):
    lines = written(encoding, lambda stream: show(stream, held_out=REWARD)).splitlines()
    name = REWARD if encoding == "utf-8" else encodable(REWARD, encoding)
    assert lines[1].startswith(f"epoch 1/40  reward 6.31 {sign} 1.20  {name} 0.610  ratio drift 2e-7  4.2 s  ETA")
    assert len(lines) == 3


@on_a_terminal
@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("cp1252", "±"), ("utf-8", "±")])
def test_a_terminal_of_every_encoding_has_its_bar(encoding, sign):
    terminal = Pty(200, encoding)
    show(terminal.stream, held_out=REWARD)
    last = [part for part in re.split(r"[\r\n]+", terminal.text) if part.strip()][-1]
    name = REWARD if encoding == "utf-8" else encodable(REWARD, encoding)
    assert last.startswith("epochs 2/40 |") and last.rstrip().endswith(f"{name} 0.610") and f" {sign} " in last


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_finished_training_ends_well_whatever_its_names_are(encoding, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "été 審").create(make_config())
    for epoch in (1, 2):
        run.append_metrics(metrics_of(epoch, held_out=WIDE))

    def conclude(stream):
        monkeypatch.setattr(sys, "stdout", stream)
        assert _conclude(run, stopped=False) == 0
        assert _conclude(run, stopped=True) == 130

    text = written(encoding, conclude)
    assert encodable(f"{WIDE} (held out)", encoding) in text
    assert encodable(str(run.latest_lora), encoding) in text
    assert "Stopped; there was nothing to save yet." in text


# --- columns


@on_a_terminal
@pytest.mark.parametrize("columns", [20, 49, 80, 200])
def test_the_bar_never_leaves_its_line(columns):
    terminal = Pty(columns)
    show(terminal.stream, held_out=WIDE)
    text = terminal.text.split("per epoch\r\n")[1]  # after the line that says what begins
    assert text.count("\n") == 1 and text.endswith("\n")
    drawn = [part.rstrip("\n") for part in text.split("\r") if part.strip()]
    wide = re.compile("[\u4e00-\u9fff]")
    assert max(len(part) + len(wide.findall(part)) for part in drawn) < columns
    assert any("1/40" in part and "sampling" in part for part in drawn)


@on_a_terminal
def test_a_terminal_that_does_not_know_its_size_has_80_columns():
    terminal = Pty(0)
    assert SafeStream(terminal.stream).columns() == 79
    show(terminal.stream, held_out=WIDE * 9)
    assert "epoch done" in terminal.text


@on_a_terminal
def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Pty(80)
    show(terminal.stream)
    text = terminal.text.replace("\r\n", "\n")  # as the terminal's driver ends lines
    assert "\r" not in text and [line.split()[1] for line in text.splitlines()[1:]] == ["1/40", "2/40"]


def test_the_tables_columns_stay_aligned_under_wide_names(tmp_path):
    run = RunFolder(tmp_path / "run").create(make_config())
    for epoch in (1, 2):
        run.append_metrics(metrics_of(epoch, held_out=WIDE * 3))
    rows = summary(run).split("\n\n")[0].splitlines()
    wide = re.compile("[\u4e00-\u9fff]")
    assert len({len(row) + len(wide.findall(row)) for row in rows}) == 1
    assert "..." in rows[2]


# --- nobody at the other end


def test_a_reader_that_left_ends_no_training():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as stream:
        show(stream)
        say("all is well", stream)


@on_a_terminal
def test_a_terminal_that_went_away_ends_no_training():
    master, slave = os.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        console = Console(make_config(overrides={"epochs": 40}), 1, stream)
        assert console._bar is not None
        os.close(master)
        for epoch in (1, 2):
            console.epoch(metrics_of(epoch))
        console.close()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_closed_stream_is_no_error(stream, monkeypatch):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    show(None)
    say("nobody reads this")


# dup2 and the interpreter's last flush need a process of their own
@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell's redirections")
@pytest.mark.parametrize("redirect", ["| true", ">&-", "> /dev/full"])
def test_the_status_is_0_where_nobody_reads_what_is_said(redirect):
    code = "import time; time.sleep(0.5); from comfy_tdpo.trainer.terminal.streams import say; say('done')"
    command = f"set -o pipefail; '{sys.executable}' -c \"{code}\" {redirect}"
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
