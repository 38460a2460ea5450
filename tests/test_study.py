"""The study's records, the command that prints them, and its recipe."""

import json

import numpy as np
import pytest

from aif_jax.train import losses
from experiments.study import models, question, records
from tests.refusals import refused


def test_the_command_prints_tables_and_writes_the_figures(tmp_path, capsys):
    question.main(["--report-only", "--json", str(tmp_path / "a.json")])
    preset = json.loads((tmp_path / "a.json").read_text())["preset"]
    assert set(preset) == {"movielens", "taobao"} and preset["taobao"]["gauc_points"] > 0
    assert "two-tower with matching statistics" in capsys.readouterr().out


def test_records_round_trip(tmp_path):
    first = {"id": "a", "dataset": "movielens", "figures": {"gauc": np.float32(0.123456789), "bins": [np.int64(3)]}}
    records.append(tmp_path, first)
    records.append(tmp_path, first | {"id": "b", "figures": {"gauc": 0.7}})
    records.append(tmp_path, first | {"id": "b", "figures": {"gauc": 0.75}})  # the later record of an id counts
    got = records.read(tmp_path)
    assert list(got) == ["a", "b"]
    assert got["a"]["figures"] == {"gauc": 0.12346, "bins": [3]} and got["b"]["figures"] == {"gauc": 0.75}
    with open(tmp_path / "movielens.jsonl", "a") as file:
        file.write('{"half a rec')
    refused(ValueError, r"movielens.jsonl, line 4: expected a record with an id", records.read, tmp_path)


def test_the_recipe_trains_towards_the_positive_and_reads_lengths_together():
    scores, first = np.array([[1.0, 2.0, 0.0]], np.float32), np.array([[1.0, 0.0, 0.0]], np.float32)
    terms = [float(loss(scores, first)) for loss in (losses.listwise_softmax, losses.pointwise_bce)]
    assert float(models.LOSS(scores, first)) == pytest.approx(sum(terms))
    assert models.shorter(256) == (64, 128) and models.shorter(2048) == (128, 256, 512, 1024) and models.shorter(64) == ()
