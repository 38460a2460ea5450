"""Writers: what they write can be read, and a run that is killed and resumed leaves no step twice."""

import json
import os

import pytest

from aif_jax.train.loop import JsonLines
from tests.refusals import refused


def test_json_lines_by_hand(tmp_path):
    log = JsonLines(tmp_path / "new" / "log.jsonl")
    log.write(5, {"loss": 0.1, "skipped": 0})
    log.write(10, {"loss": float("nan")})
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert rows == [{"step": 5, "loss": 0.1, "skipped": 0.0}, {"step": 10, "loss": None}]


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    log = JsonLines(tmp_path / "log")
    log.rewind(0)
    for step in (10, 20, 30):
        log.write(step, {"loss": 1 / step})
    whole = log.path.read_text()
    again = JsonLines(tmp_path / "log")
    again.rewind(20)
    assert [row["step"] for row in again.rows()] == [10, 20]
    again.write(30, {"loss": 1 / 30})
    assert again.path.read_text() == whole
    fresh = JsonLines(tmp_path / "log")
    fresh.rewind(0)
    fresh.write(10, {"accuracy": 0.5})
    assert [row["step"] for row in fresh.rows()] == [10]


def test_a_writer_that_writes_nothing_leaves_nothing(tmp_path):
    log = JsonLines(tmp_path / "new" / "log")
    log.rewind(0)
    assert log.rows() == [] and not (tmp_path / "new").exists()


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    refused(ValueError, "log.jsonl, line 2: expected JSON, got 'not json", log.rows)


@pytest.mark.parametrize("tail", [b'{"step": 30, "lo', b"\0" * 64, b'{"step": 30, "name": "\xc3'])
def test_a_cut_line_is_left_out_and_reported(tmp_path, caplog, tail):
    log = JsonLines(tmp_path / "log")
    log.write(10, {"loss": 1.0})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + tail)
    assert [row["step"] for row in log.rows()] == [10]
    assert "log, line 2: left out, it is cut: b'" in caplog.text
    log.rewind(10)
    assert log.path.read_bytes() == whole


def test_a_row_is_on_disk_when_it_is_written(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def sync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    log = JsonLines(tmp_path / "log")
    log.write(1, {})
    log.write(2, {})
    assert synced == [str(log.path), str(tmp_path), str(log.path)]
