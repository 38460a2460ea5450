"""Processes of one job on this host: the first that fails is named, and none stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aif_jax import cli
from aif_jax.sharding import processes

ONE = """
import os, signal, sys, time
how, index = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if index == 1 and how == "exits":
    sys.exit(3)
if index == 1 and how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how != "well":
    time.sleep(100)
"""


@pytest.mark.parametrize(
    "how, code, message",
    [
        ("well", 0, ""),
        ("exits", 3, "error: process 1 of 2: exit code 3; all are stopped\n"),
        ("killed", 137, "error: process 1 of 2: signal 9 ended it; all are stopped\n"),
    ],
)
def test_the_first_that_fails(how, code, message, capfd):
    started = processes.start(lambda address, index: [sys.executable, "-c", ONE, how, str(index)], 2)
    assert processes.wait(started, grace=0.1) == code
    assert capfd.readouterr().err == message
    assert all(process.returncode is not None for process in started)


def test_none_stays_where_one_cannot_start(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **options: started.append(popen(*words, **options)) or started[-1])
    with pytest.raises(FileNotFoundError):
        processes.start(lambda address, index: ([sys.executable, "-c", ONE, "sleeps", "0"], ["/no/such/program"])[index], 2)
    assert [process.returncode for process in started] == [-9]


def test_a_process_ends_with_its_parent():
    child = "import sys, time; from aif_jax.sharding import processes; processes.end_with(int(sys.argv[1]))"
    child += "; print('up', flush=True); time.sleep(100)"
    parent = (
        "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]); sys.stdin.read()"
    )
    words = [sys.executable, "-c", parent, child]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.kill()
        assert process.stdout.read() == ""  # returns when the child, which holds the other end, is gone


@pytest.mark.parametrize(
    "more, message",
    [
        (["--coordinator", "host:1"], "expected --coordinator and --process-id, or neither"),
        (["--processes", "2", "--coordinator", "host:1", "--process-id", "2"], "--process-id: expected 0 to 1"),
    ],
)
def test_wrong_words(more, message, capsys, monkeypatch):
    ended = []
    monkeypatch.setattr(cli, "end", ended.append)
    assert cli.main(["train", "--events", "e", "--items", "i", "--out", "o", *more]) == 2
    assert message in capsys.readouterr().err
    assert ended == [2]  # at once: others may wait for it
