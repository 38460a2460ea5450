"""Progress: bars on a terminal, nothing elsewhere or when it is not wanted."""

import io
import json
import os
import pty
import re
import select
import sys
import time

import pytest

import aif_jax as aif
from aif_jax import cli
from aif_jax import output as progress
from aif_jax.output import hidden, say, track
from aif_jax.train.tasks import NextItem
from tests.test_cli import FLAGS, SMALL, files, folder, run  # noqa: F401 fixtures

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x1b]")


class Terminal(io.StringIO):
    """What was written to a terminal, and what stands in its lines."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """The lines as a person sees them: "\\r" goes back to the start of a line, "\\n" and CSI A one line down or up."""
        rows: list[str] = [""]
        row = column = 0
        for part in re.findall(r"\x1b\[A|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if part == "\r":
                column = 0
            elif part in ("\n", "\x1b[A"):
                row, column = row + (1 if part == "\n" else -1), 0 if part == "\n" else column
                rows += [""] * (row + 1 - len(rows))
            else:
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in rows]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal on which every bar is drawn at once."""
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "INTERVAL", 0)
    return Terminal()


def test_a_file_gets_no_bar():
    file = io.StringIO()
    assert list(track(range(9), label="score", unit="batches", file=file)) == list(range(9))
    with track(total=100, label="train", unit="steps", file=file) as bar:
        bar.update(60)
        bar.set_postfix(loss=0.5)
        say("step done", file=file)
    assert file.getvalue() == "step done\n"


def test_a_terminal_that_tells_no_size_shows_bars_too(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.01)
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as file, track(total=4, label="train", unit="steps", file=file) as bar:
        time.sleep(0.02)
        bar.update(1)
        bar.set_postfix(loss=0.7)
        shown = os.read(reader, 1000).decode() if select.select([reader], [], [], 5)[0] else ""
    os.close(reader)
    assert "train:" in shown and "| 1/4 [" in shown


def test_a_line_that_is_said_stands_above_the_bar(terminal):
    with track(total=4, label="train", unit="steps", file=terminal) as bar:
        bar.set_postfix(loss=0.7)
        say("validation: gauc 0.8", file=terminal)
        assert "\nvalidation" not in terminal.getvalue() and "validation: gauc 0.8\n" in terminal.getvalue()
        assert terminal.lines()[-1].startswith("train:")


def test_nothing_is_shown_where_nobody_wants_it(terminal):
    with hidden(), track(total=10, label="train", unit="steps", file=terminal) as bar:
        bar.update(5)
    with hidden(), hidden(False), track(total=10, label="train", unit="steps", file=terminal) as bar:
        bar.update(5)
    assert terminal.getvalue() == ""
    with hidden(False), track(total=10, label="train", unit="steps", file=terminal) as bar:
        bar.update(5)
    assert "train" in terminal.getvalue()


def test_fit_evaluate_and_index_show_bars_on_a_terminal_and_nothing_when_silent(data, small, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal)
    task, config = NextItem(negatives=3, evaluated=20), aif.FitConfig(epochs=1, requests=60, k=10)
    trained = aif.fit(small, data, config, task=task)
    aif.ItemIndex.build(aif.Trained(small, trained.params, data.encoder), data.catalogue, batch_size=64)
    shown = terminal.getvalue()
    for bar in ("train: .* 3/3 ", "score: .* 1/1 ", "rank: .* 1/1 ", "item index: .*/90 "):
        assert re.search(bar, shown), bar
    aif.fit(small, data, config, task=task, progress=False)
    aif.ItemIndex.build(aif.Trained(small, trained.params, data.encoder), data.catalogue, batch_size=64, progress=False)
    trained.evaluate(data, progress=False)
    assert terminal.getvalue() == shown and capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def jobs(folder, tmp_path_factory):  # noqa: F811
    """Words of every job that ends by itself, by name, and what it says in a log; a last --out lacks its folder."""
    out = tmp_path_factory.mktemp("jobs")
    train = ["train", *files(folder), *FLAGS, "--epochs", 1, "--batch-size", 64, "--requests", 50, *SMALL, "--out"]
    build = ["index", "build", "--checkpoint", out / "run", "--items", folder / "items", "--out"]
    for words in ([*train, out / "run"], [*build, out / "index"]):
        assert cli.main([*map(str, words), "--quiet"]) == 0
    return {
        "train": (["train", "--evaluate", *train[1:]], "train: "),
        "check": (["check", *files(folder), *FLAGS], "rows"),
        "add": (["add", "popularity", "--run", out / "run", *files(folder), "--out"], "rows"),
        "index build": (build, "item index: "),
        "index verify": (["index", "verify", out / "index"], ""),
    }


def test_json_on_stdout_is_whole_and_quiet_is_silent(jobs, run, tmp_path):  # noqa: F811
    """Of every job: without a terminal JSON on stdout and no bar on stderr; with --quiet nothing but the result."""
    for name, (command, _) in jobs.items():
        place = [tmp_path / name] if command[-1] == "--out" else []
        form = ["--json"] * (name == "check")
        code, out, err = run(*command, *place, *form)
        assert code == 0 and not CONTROL.search(err), (name, err)
        place = [tmp_path / f"{name}, quiet"] if place else []
        code, again, err = run(*command, *place, *form, "--quiet")
        assert code == 0 and err == "", (name, err)
        assert json.loads(again).keys() == json.loads(out).keys(), name
    assert json.loads(out)["items"] == 90


def test_a_terminal_is_left_with_whole_lines(jobs, run, monkeypatch, tmp_path):  # noqa: F811
    """Every job shows a bar; those that were drawn within another one are gone, and none is left half."""
    monkeypatch.setattr(progress, "DELAY", 0)
    for name, (command, said) in jobs.items():
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        assert run(*command, *[tmp_path / name] if command[-1] == "--out" else [])[0] == 0
        assert said in terminal.getvalue(), name
        *lines, last = terminal.lines()
        assert last == "", name
        assert [line for line in lines if line.count("|") > 2] == [], name
