"""What the first study left: its records and their means, the command that prints them; and the recipe of today's."""

import json

import numpy as np
import pytest

from aif_jax.train import losses
from experiments import ablation
from experiments.study import models, records

pytestmark = pytest.mark.usefixtures("light_compilation")

USUAL = {"compute": "float32", "projection": "rotated", "batches": "mixed"}
"""Of a run; others have a row of their own."""


def test_the_command_prints_tables_and_writes_the_figures_of_both_studies(tmp_path, capsys):
    ablation.main(["--report-only", "--json", str(tmp_path / "a.json")])
    got = json.loads((tmp_path / "a.json").read_text())
    assert {"next", "liked", "recipes", "by_history", "by_seen", "lost", "claims", "preset"} < set(got)
    printed = capsys.readouterr().out
    for name, value in got["claims"].items():
        assert f"| {name} | {value:.3f} |" in printed
    assert set(got["preset"]) == {"movielens", "taobao"} and got["preset"]["taobao"]["gauc_points"] > 0


def test_figures_are_the_means_of_their_records():
    groups = {}
    for record in records.read(records.RESULTS).values():
        usual = all(record.get(name, value) == value for name, value in USUAL.items())
        if usual and (record["task"], record["slice"], record["recipe"]) == ("next", "test", models.RECIPE):
            groups.setdefault((record["dataset"], record["model"]), []).append(record["figures"]["gauc"])
    figures = json.loads(ablation.FIGURES.read_text())["next"]
    assert len(groups) > 100
    for (dataset, model), values in groups.items():
        assert figures[dataset][model]["gauc"] == pytest.approx(np.mean(values), abs=1e-5), (dataset, model)
        assert figures[dataset][model]["seeds"] == len(values)


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
    with pytest.raises(ValueError, match=r"movielens.jsonl, line 4: expected a record with an id"):
        records.read(tmp_path)


def test_the_recipe_trains_towards_the_positive():
    scores, first = np.array([[1.0, 2.0, 0.0]], np.float32), np.array([[1.0, 0.0, 0.0]], np.float32)
    terms = [float(loss(scores, first)) for loss in (losses.listwise_softmax, losses.pointwise_bce)]
    assert float(models.LOSS(scores, first)) == pytest.approx(sum(terms))


def test_lengths_that_a_teacher_reads_together():
    assert models.shorter(256) == (64, 128) and models.shorter(2048) == (128, 256, 512, 1024) and models.shorter(64) == ()
