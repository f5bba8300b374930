"""Ctrl-C is told as such even where compiled code has replaced the exception that Python raises for it."""

import signal
import threading
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_tdpo.interrupts import Meanwhile, heed, heeding, keyboard_interrupts
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.terminal import evaluate, recommend, score, taste


def read(*_):
    """Reads a file, as it were, and Ctrl-C is pressed meanwhile."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")


def test_a_file_is_read_whole_or_interrupted(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({str(i): torch.zeros(8) for i in range(300)}, path)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted = 0
    try:
        for i in range(100):  # before it was mended, a third of them ended in a ValueError
            with suppress(KeyboardInterrupt), keyboard_interrupts():
                interrupted += 1
                signal.setitimer(signal.ITIMER_REAL, (i + 1) * 5e-5)
                load_file(path)
                signal.setitimer(signal.ITIMER_REAL, 0)
                interrupted -= 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10


def test_it_leaves_the_block_as_what_it_was():
    with pytest.raises(KeyboardInterrupt), keyboard_interrupts():
        read()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_without_ctrl_c_passes_as_it_is():
    with pytest.raises(ValueError, match="wrong"), keyboard_interrupts():
        raise ValueError("wrong")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_what_other_programs_do_with_it_stays(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with keyboard_interrupts():
            assert signal.getsignal(signal.SIGINT) is handler
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("module", "function", "command"),
    [
        (evaluate, "_evaluate", ["evaluate", "run"]),
        (recommend, "_recommend", ["recommend", "run"]),
        (score, "_score", ["score", "--reward", "shapes-aesthetic", "image.png"]),
        (taste, "_told", ["taste", "run"]),
    ],
)
def test_a_subcommand_ends_as_stopped(module, function, command, monkeypatch, capsys):
    monkeypatch.setattr(module, function, read)
    assert main(command) == 130
    assert capsys.readouterr().err.startswith("comfy_tdpo: stopped")


# --- on a thread of its own


def endless(ended: threading.Event) -> None:
    try:
        while True:
            heed()
            time.sleep(0.01)
    finally:
        ended.set()


def test_what_is_done_meanwhile_is_given_or_raised_where_it_is_asked_for():
    assert Meanwhile(lambda: 3).result() == 3
    failing = Meanwhile(lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.result()
    assert failing.done


def test_it_ends_with_the_block_that_is_stopped_and_when_it_is_given_up():
    class Stopped(Exception):
        pass

    stop, ended = threading.Event(), [threading.Event(), threading.Event()]

    def check() -> None:
        if stop.is_set():
            raise Stopped

    with heeding(check):
        given_up = Meanwhile(lambda: endless(ended[0]))
        given_up.give_up()
        assert ended[0].wait(10)
        going_on = Meanwhile(lambda: endless(ended[1]))
        assert not going_on.done
    with pytest.raises(Stopped), heeding(check):
        stop.set()
        going_on.result()
    assert ended[1].wait(10), "it heeds the block that began it, although that has ended"
