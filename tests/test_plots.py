"""Figures for a talk: what they show is what the records and docs/results.md say."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from aif_jax.metrics import Interval
from experiments import plots, tables
from experiments.study import calibration, question, records
from experiments.study.question import AIF, WITH_MATCHING
from tests.light import lightly_compiled
from tests.refusals import refused


def test_figures_are_drawn_from_the_records(tmp_path, capsys):
    plots.main(["--out", str(tmp_path)])
    names = {"blocks", "calibration", "load", "refresh", "quality_against_time", "budget"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert "blocks.png" in capsys.readouterr().out


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_tables_of_a_page_are_those_of_the_records(page):
    text = page.read_text(encoding="utf-8")
    assert tables.written(text) == text, f"{page.name}: run python -m experiments.plots"


def test_a_page_has_the_tables_that_it_names(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "some", lambda: "| a |\n| --- |\n| 1 |")
    page = "Text.\n\n<!-- table some: command -->\n\n| a |\n| old |\n\nMore.\n"
    made = tables.written(page)
    assert made == page.replace("| old |", "| --- |\n| 1 |") == tables.written(made)
    refused(ValueError, "table 'none': expected one of .*'recall'", tables.written, "<!-- table none: command -->\n")
    names = [name for path in tables.PAGES for name in re.findall(r"<!-- table (\w+):", path.read_text(encoding="utf-8"))]
    assert names[:2] == ["rankers", "budget"]


def test_requests_a_second_are_the_most_within_the_bound_interpolated_to_it():
    figures = ((1, 50.0, 17.0), (8, 700.0, 25.0), (16, 900.0, 35.0), (32, 800.0, 60.0))
    loops = [dict(zip(("concurrency", "rps", "p99_ms"), each, strict=True)) for each in figures]
    assert tables.within(loops) == {"concurrency": 12.0, "rps": 800.0, "p99_ms": 30.0}
    assert tables.within(loops, 36.0) == loops[2] and tables.within(loops, 10.0) is None
    assert tables.title("C=1000, L=512") == "1,000 candidates, 512 events"


def test_history_compares_the_same_users(tmp_path):
    """Users of the records, dealt to bins by a made log: every user is in one bin, and the whole is the mean of the bins."""
    run = question.runs_of(records.read(question.RESULTS), "movielens", AIF)[0]
    users = records.by_user(question.RESULTS, run, "gauc_trained").users
    counts = np.zeros(users.max() + 1, np.int64)
    counts[users] = np.where(np.arange(len(users)) % 2 == 0, 50, 600)
    log = SimpleNamespace(user=np.repeat(np.arange(len(counts)), counts))
    data = SimpleNamespace(name="movielens", dataset=SimpleNamespace(log=log))
    gains = plots.history(question.RESULTS, data)  # type: ignore[arg-type]
    half = (len(users) + 1) // 2
    assert [count for count, _ in gains[AIF]] == [half, 0, 0, len(users) - half]
    assert gains[AIF][0][1].value != gains[AIF][3][1].value
    plots.draw_history(gains, tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000


@lightly_compiled()
def test_a_calibration_is_measured_on_events_that_did_not_fit_it(tmp_path, capsys):
    """The script on a tiny world: the same requests before and after, other probabilities, the figure drawn from its record."""
    calibration.main(["--smoke", "--quiet", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    before, logistic = record["ways"]["before"], record["ways"]["logistic"]
    assert before["observed"] != before["predicted"] != logistic["predicted"] and record["requests"] > record["users"] > 10
    observed = [np.mean(way["observed"]) for way in (before, logistic)]
    assert observed[0] == pytest.approx(observed[1], abs=1e-4) and observed[1] == pytest.approx(1 / 16, abs=0.01)
    assert "logistic" in capsys.readouterr().out
    plots.draw_calibration(record, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


def test_the_figure_of_load_is_the_table_of_the_experiments():
    """Figures of experiments/README.md, at the concurrency of the most requests a second whose p99 is within 100 ms."""
    record = json.loads(plots.LOAD.read_text(encoding="utf-8"))[plots.LONG]
    page = (Path(__file__).resolve().parent.parent / "experiments" / "README.md").read_text(encoding="utf-8")

    def cpu(service: str, users: str) -> float:
        loops = [loop for loop in record["closed_loops"][service][users] if loop["p99_ms"] <= 100]
        return max(loops, key=lambda loop: loop["rps"])["cpu_ms"]

    assert f"aif new / cached / session | {cpu('aif', 'new'):.2g} / {cpu('aif', 'returning_0'):.2g} / " in page
    others = ", ".join(f"{cpu(name, 'new'):.2g}" for name in ("sequential", "two_tower", "exact"))
    assert f"{others} ms" in page


def test_the_figure_of_the_budget_has_a_point_for_each_model_that_is_known(tmp_path):
    losses = {"movielens": {"two_tower": Interval(6.9, 6.0, 8.0), "aif": Interval(0.7, 0.5, 0.9)}}
    loops = {name: {"new": [{"concurrency": 1, "rps": 99.0, "p99_ms": 40.0 - n}]} for n, name in enumerate(plots.SERVED)}
    loops["aif"]["new"][0]["p99_ms"] = loops["sequential"]["new"][0]["p99_ms"] = 20.0
    record = {"closed_loops": loops}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_legend", lambda axis, **where: drawn.extend(text.get_text() for text in axis.texts))
        plots.draw_budget(record, losses, tmp_path / "budget.png")
    assert drawn == ["AIF", "AIF, not split"]  # the two-tower model has no load within the budget, others no ranker recall
    assert (tmp_path / "budget.png").stat().st_size > 10_000


def test_points_are_hundredths_with_the_error_to_both_sides():
    value, error = plots.points(Interval(0.02, 0.015, 0.03))
    assert value == pytest.approx(2.0) and np.ravel(error) == pytest.approx([0.5, 1.0])
    assert plots.MODELS.keys() == {AIF, WITH_MATCHING}
