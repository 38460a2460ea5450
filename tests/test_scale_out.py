"""`experiments/scale_out` runs from end to end without any engine, and names what is not installed."""

import json

import pytest

from experiments.scale_out import __main__ as scale_out
from experiments.scale_out import catalogue

pytestmark = pytest.mark.usefixtures("light_compilation")


def test_catalogue_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "present", lambda need: need == "java")
    scale_out.main(["--smoke", "--parts", "catalogue", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["missing"] == ["pyspark", "ray"] and figures["catalogue_rows"] == catalogue.SMOKE_ROWS
    assert [figures[name] for name in ("ray_equal", "spark_equal", "ray_rows_per_s", "spark_rows_per_s")] == [None] * 4
    assert figures["build_rows_per_s"] > 0 and figures["merge_rows_per_s"] > 0
    printed = capsys.readouterr().out
    assert (
        "not installed: ray" in printed and "not installed: pyspark" in printed and "left out by --parts: training" in printed
    )


def test_a_difference_is_noticed(tmp_path):
    world = catalogue.make(tmp_path, rows=2048)
    index, _ = catalogue.build(world, "index")
    parts = list(world.job()(catalogue.read(world)))
    assert catalogue.same(catalogue.merge(world, parts), index)
    changed = {"item": [5], "category": [1], "brand": [1], "bid": [1.0]} | dict.fromkeys(catalogue.COLUMNS.item_floats, [0.5])
    assert not catalogue.same(catalogue.merge(world, parts).upsert(changed), index)


def test_what_is_present():
    assert catalogue.present("numpy") and not catalogue.present("no_such_package")
