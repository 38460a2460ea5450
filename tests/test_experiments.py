"""Every experiment runs as its header says, at `--smoke` size, and writes the figures that it promises."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aif_jax as aif
from aif_jax import output as progress
from experiments import benchmarks, common, quickstart
from experiments.datasets.synthetic import synthetic_world
from tests.conftest import child_environment
from tests.light import flags
from tests.refusals import refused
from tests.test_progress import Terminal
from tests.test_scripts import measured

pytestmark = pytest.mark.lane("experiments")
ROOT = Path(__file__).resolve().parent.parent


def run(module: str, folder: Path, *arguments: str) -> tuple[dict, str]:
    """What a script writes and prints as a process of its own."""
    words = [sys.executable, "-m", module, "--smoke", "--json", "figures.json", *arguments]
    done = subprocess.run(words, cwd=folder, env=child_environment(flags=flags()), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "\r" not in done.stdout + done.stderr, done.stdout + done.stderr
    return json.loads((folder / "figures.json").read_text()), done.stdout


def test_scripts_draw_with_the_package_and_know_quiet(monkeypatch):
    """Every script whose parser is of `common` has --json, --quiet and the wrapper that hides bars; none draws by itself."""
    texts = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "experiments").rglob("*.py")}
    assert [path for path, text in texts.items() if re.search(r"tqdm|\\r(?!\\n)", text)] == []
    shared = {path: text for path, text in texts.items() if "common.parser(" in text or "common.options(" in text}
    assert len(shared) > 10 and [path for path, text in shared.items() if "@common.script\ndef main(" not in text] == []

    @common.script
    def main(arguments):
        common.options("", arguments, {})
        assert list(progress.track([1, 2], label="work", unit="turns")) == [1, 2]

    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    main(["--smoke", "--quiet"])
    assert terminal.getvalue() == ""
    main(["--smoke"])
    assert "work: 100%" in terminal.getvalue() and " 2/2 [" in terminal.getvalue()


def test_quickstart(tmp_path):
    got, printed = run("experiments.quickstart", tmp_path, "--out", "run")
    assert aif.Run.load(tmp_path / "run").config.blocks == aif.presets.aif(synthetic_world().dataset.schema).blocks
    assert list(got["models"]) == ["two_tower", "aif", "ranker"]
    for way, found in got["models"].items():
        (recall, *ends), (share, *around) = found["recall"], found["share"]
        assert 0 < ends[0] <= recall <= ends[1] <= 1 and 0 <= around[0] <= share <= around[1], way
        assert 0 < found["after_retrieval_ms_p50"] <= found["after_retrieval_ms_p90"] and found["cpu_ms"] > 0, way
        assert found["rps"] > 0, way
    recalls = {way: found["recall"][0] for way, found in got["models"].items()}
    assert recalls["ranker"] == got["models"]["ranker"]["share"][0] == 1
    assert got["recall_gain"][0] == pytest.approx(recalls["aif"] - recalls["two_tower"])
    assert (got["candidates"], got["kept"], got["requests"], got["dataset"]) == (40, 10, 40, "synthetic")
    assert set(got["seconds_by_part"]) == set(got["cpu_seconds_by_part"]) >= {"ranker", "index", "requests at once"}
    assert 0.9 * got["seconds"] < sum(got["seconds_by_part"].values()) <= got["seconds"]
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert "40 retrieved candidates are cut to 10" in printed
    assert printed.endswith("  aif-jax check --events EVENTS --items ITEMS\n")


def test_quickstart_refuses_wrong_flags_and_names_a_wrong_file(tmp_path, capsys):
    for words, message in (
        (["--retrieval-ms", "-1"], "--retrieval-ms: expected at least 0, got -1"),
        (["--sped", "up"], "unrecognized arguments: --sped up"),
        (["--keep", "9"], "--keep: expected at least 10, got 9"),
    ):
        refused(SystemExit, "2", quickstart.main, words)
        assert message in capsys.readouterr().err
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,five,3\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n2,Film (1999),Drama\n")
    refused(ValueError, "ratings.csv.*line 2.*five", quickstart.main, ["--data", str(tmp_path)])


def test_refresh(tmp_path):
    got = measured(tmp_path, "experiments.refresh")
    found = got["worlds"]["synthetic"]
    arms = {"day", "never", "scratch", "warm", "hourly"}
    assert [set(day) for day in found["by_day"]] == [arms, arms, arms | {"hourly scratch"}] and found["hours"] == 3
    assert found["by_day"][0]["hourly"]["gauc"] != found["by_day"][0]["warm"]["gauc"]
    spent = found["cpu_seconds_a_day_within"]
    assert found["hourly_cpu_seconds"] == pytest.approx(spent["hourly"] / 3) and 0 < spent["hourly"] < spent["hourly scratch"]
    assert found["bytes_published_a_day_within"] == {"hourly": 3 * found["bytes_published_a_day"]["warm"]}
    last = found["by_day"][-1]
    difference = 100 * (last["hourly"]["gauc"] - last["hourly scratch"]["gauc"])
    assert found["hourly_minus_scratch_gauc_points"] == pytest.approx(difference)
    low, high = found["hourly_minus_scratch_interval"]
    assert low <= difference <= high
    assert found["by_day"][0]["never"] == found["by_day"][0]["warm"] != found["by_day"][2]["warm"]
    names = ("stale_loss_gauc_points", "warm_minus_scratch_gauc_points", "warm_cost_share", "new_item_hr100_gain")
    for name in (*names, "hourly_minus_scratch_gauc_points", "hourly_cpu_seconds"):
        assert got[name] == {"synthetic": found[name]} and math.isfinite(found[name])
    assert found["warm_cost_share"] > 0 and found["new_item_hr100_gain"] > 0
    by_fault = got["gate"]["refused_by_fault"]  # 82 requests are too few to be sure of the others
    assert by_fault["NaN"] == by_fault["lost half of the data"] == [1, 1] and 0 <= got["gate_passed_good"] <= 6
    assert got["gate_refused_bad"] == sum(refused for refused, _ in by_fault.values()) and got["gate"]["models"] == 6


def test_cascade(tmp_path):
    got = measured(tmp_path, "experiments.cascade")
    assert -100 <= got["ranker_recall100_gain"] <= 100 and 0 < got["ranker_recall100_bce"] <= 1
    assert [weight for weight, *_ in got["frontier"]][0] == 0
    assert 0 < got["auc_consistent"] < 1 and 0 < got["auc_bce"] < 1


@pytest.mark.parametrize("name", ["recflow", "kuairand"])
def test_public_benchmarks(name, tmp_path, capsys):
    got = measured(tmp_path, "experiments.benchmarks", name, "--model", "two-tower", "aif", "--epochs", "1")
    assert list(got["models"]) == ["two-tower", "aif"]
    for model in got["models"].values():
        assert model and all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in model.values())
    assert list(got["published"]) == (["LCRON, two stages"] if name == "recflow" else [])
    refused(SystemExit, "", benchmarks.main, [name])
    assert "expected --data DIR or --smoke, one of them" in capsys.readouterr().err


def test_options_refuse_numbers_that_are_no_sizes(capsys):
    settings = {"rounds": (5, 1, ""), "seconds": (0.5, None, ""), "sizes": ([1, 4], None, ""), "seed": (0, None, "")}
    settings |= {"hours": (24, 3, "", 0)}
    parser = common.parser("")
    parser.add_argument("--worlds", nargs="*")
    given = common.options(parser, ["--smoke", "--sizes", "2", "3", "--hours", "0", "--worlds"], settings)
    assert (given.rounds, given.seconds, given.sizes, given.seed) == (1, 0.5, [2, 3], 0)
    assert given.hours == 0 and given.worlds == []  # a setting may have its own least value, and a parser other options
    for wrong, message in (
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--seconds", "-1"], "--seconds: expected at least 0, got -1"),
        (["--sizes", "4", "0"], "--sizes: expected at least 1, got 0"),
        (["--sizes"], "argument --sizes: expected at least one argument"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--hours", "-1"], "--hours: expected at least 0, got -1"),
    ):
        refused(SystemExit, "", common.options, "", wrong, settings)
        assert message in capsys.readouterr().err


def test_a_report_has_every_figure(tmp_path, capsys):
    rows = {"one": {"p50": 1.0, "p99": 2.0}, "two": {"p50": 3.0, "p99": 4.0}}
    figures = {"rate": 5.0, "ms": {"p50": 6.0, "p99": 7.0}, "by": rows, "loops": [{"n": 1, "rps": 8.0}, {"n": 2, "rps": 9.0}]}
    common.report(figures | {"raw": [1, 2], "left": 10.0}, tmp_path / "figures.json", hidden=("left",))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in (["rate", "5.0000"], ["ms", "6.0000", "7.0000"], ["two", "3.0000", "4.0000"], ["1", "2", "9.0000"]):
        assert line in printed
    assert ["left", "10.0000"] not in printed and json.loads((tmp_path / "figures.json").read_text())["left"] == 10.0
