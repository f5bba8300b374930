"""The tests' own processes: a failed test leaves none behind, and Ctrl-C reaches them under any parent."""

import os
import signal
import subprocess
import sys

import children
import psutil
import pytest

# A parent whose child would sleep on; both say who they are.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
IGNORES = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"


def test_an_ended_process_takes_its_children_along():
    process = children.start([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    family = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
    children.end(process)
    _, alive = psutil.wait_procs(family, timeout=10)
    for member in alive:
        member.kill()
    assert alive == []
    assert process.stdout.closed
    children.end(process)  # a second time does nothing


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that a child inherits as ignored")
def test_ctrl_c_is_heard_where_the_tests_parent_had_it_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command = [sys.executable, "-c", IGNORES]
        process = children.start(command, stdout=subprocess.PIPE, text=True)
        assert process.communicate(timeout=60)[0] == "False\n"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "the tests' own is as it was"
        assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"
    finally:
        signal.signal(signal.SIGINT, before)
