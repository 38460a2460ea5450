"""Every experiment, script and figure runs as its header says, at `--smoke` size, and writes what it promises."""

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import metrics
from aif_jax import output as progress
from aif_jax.metrics import Interval
from experiments import benchmarks, common, cost, kernels, plots, quickstart, ranker_recall, runtimes, tables
from experiments.datasets.synthetic import synthetic_world
from experiments.study import calibration, datasets, question, records, storage
from tests.conftest import child_environment
from tests.refusals import refused
from tests.test_progress import Terminal

pytestmark = pytest.mark.lane("experiments")
ROOT = Path(__file__).resolve().parent.parent


def run(module: str, folder: Path, *arguments: str) -> tuple[dict, str]:
    """What a script writes and prints as a process of its own."""
    words = [sys.executable, "-m", module, "--smoke", "--json", "figures.json", *arguments]
    done = subprocess.run(words, cwd=folder, env=child_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "\r" not in done.stdout + done.stderr, done.stdout + done.stderr
    return json.loads((folder / "figures.json").read_text()), done.stdout


def measured(folder: Path, name: str, *words: str, needs: tuple[str, ...] = ()) -> dict:
    """The figures that a script writes, where all that it needs is installed."""
    for package in needs:
        pytest.importorskip(package, reason="the extra 'experiments' or 'benchmarks' is not installed")
    importlib.import_module(name).main(["--smoke", "--json", str(folder / "figures.json"), *words])
    return json.loads((folder / "figures.json").read_text())


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
    refused(ValueError, "ratings.csv.*Row #2.*five", quickstart.main, ["--data", str(tmp_path)])


def test_refresh(tmp_path):
    got = measured(tmp_path, "experiments.refresh")
    found, arms = got["worlds"]["synthetic"], {"day", "never", "scratch", "warm", "hourly"}
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


def test_figures_are_drawn_from_the_records(tmp_path, capsys):
    plots.main(["--out", str(tmp_path)])
    names = {"blocks", "calibration", "refresh", "quality_against_time", "budget"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert "blocks.png" in capsys.readouterr().out


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_tables_of_a_page_are_those_of_the_records(page):
    text = page.read_text(encoding="utf-8")
    assert tables.written(text) == text, f"{page.name}: run python -m experiments.plots"


def test_figures_in_the_text_are_those_of_the_records():
    """What README and the results page say in sentences, next to their tables."""
    results, found, every = ranker_recall.RESULTS, ranker_recall.read(ranker_recall.RESULTS), records.read(question.RESULTS)
    movielens, taobao = ranker_recall.keys(results).values()

    def gauc(how: ranker_recall.Taught) -> str:
        runs = ranker_recall.runs_of(found, "taobao", "test", "attention", "aif", how)
        return f"{ranker_recall.pooled(results, runs, 'gauc').mean:.3f}"

    def lead(dataset: str) -> str:
        pair = (question.of_test(question.RESULTS, every, dataset, model, "gauc") for model in (question.AIF, question.BASE))
        return f"{100 * metrics.paired_interval(*pair).value:.1f}"

    def spread(of: dict, name: str, digits: int, unit: str = "") -> str:
        value, low, high = (f"{of[name + end]:.{digits}f}" for end in ranker_recall.ENDS)
        return f"{value}{unit} [{low}, {high}]"

    def kept(of: dict, *models: str, how: str = "") -> str:
        return ", ".join(f"{100 - of[f'lost10_{model}{how}']:.1f}" for model in models or ("aif", "matching", "two_tower"))

    lost = [f"{of[ranker]['lost10_aif']:.1f}" for ranker in ("trees", "sequence") for of in (movielens, taobao)]
    sasrec = (f"{100 - taobao['sequence'][f'lost10_aif{how}']:.0f} %" for how in ("", "_not_taught"))
    said = {
        "README.md": (
            f"from {gauc(ranker_recall.ALONE)} to {gauc(ranker_recall.USUAL)} for `aif` on Taobao",
            f"`aif` leads `two_tower` by {lead('movielens')} (MovieLens) and {lead('taobao')} (Taobao) GAUC points",
            "`aif` keeps {} of SASRec's best 10 when taught, {} when not".format(*sasrec),
        ),
        "docs/results.md": (
            f"AIF loses {spread(movielens, 'lost10_aif', 2, ' %')}, matching {movielens['lost10_matching']:.1f}, two-tower "
            f"{movielens['lost10_two_tower']:.1f}; AIF's GAUC is {movielens['gauc_points_over_two_tower']:.1f} [",
            f"its HR@100 {spread(movielens, 'hr100_ratio_over_two_tower', 2, ' times')}",
            *(f"matching {kept(movielens[ranker], 'matching')}, two-tower {kept(movielens[ranker], 'two_tower')};"
              for ranker in ("trees", "sequence")),
            f"on Taobao {kept(taobao['trees'])}, with", f"on Taobao {kept(taobao['sequence'])} (not taught",
            f"(not taught {kept(taobao['sequence'], how='_not_taught')})",
            "(trees {} and {}, SASRec {} and {};".format(*lost), spread(taobao, "lost10_ratio_over_matching", 2, " times"),
        ),
    }  # fmt: skip
    seeds = [
        100 * np.std([question.pooled(question.RESULTS, every, [run], "gauc").mean for run in runs], ddof=1)
        for dataset in question.PUBLIC
        for model in (question.BASE, question.WITH_MATCHING, question.AIF)
        for runs in [question.runs_of(every, dataset, model)]
    ]
    said["docs/how_to_tune.md"] = (f"Seeds differ by {min(seeds):.1f} to {max(seeds):.1f} points",)
    texts = {page: (tables.ROOT / page).read_text(encoding="utf-8") for page in said}
    assert [(page, each) for page, sentences in said.items() for each in sentences if each not in texts[page]] == []


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


def test_the_figure_of_the_budget_says_what_its_points_show(tmp_path, monkeypatch):
    losses = {
        "movielens": {"two_tower": Interval(6.9, 6.0, 8.0), "matching": Interval(2.0, 1.0, 3.0), "aif": Interval(0.7, 0.5, 0.9)}
    }
    losses["movielens"]["full_attention"] = Interval(0.1, 0.0, 0.2)
    loops: dict[str, dict[str, list]] = {}
    for place, (service, users, *_) in enumerate(plots.SERVED):
        loops.setdefault(service, {})[users] = [{"concurrency": 1, "rps": 100.0 + place, "p99_ms": 20.0}]
    drawn, titles = [], []
    monkeypatch.setattr(plots, "_legend", lambda axis, **where: drawn.extend(text.get_text() for text in axis.texts))
    monkeypatch.setattr(plots, "drawing", lambda *given, usual=plots.drawing: titles.append(given[-1]) or usual(*given))
    plots.draw_budget({"closed_loops": loops}, losses, tmp_path / "budget.png")
    assert drawn == [name for *_, name, _ in plots.SERVED] and len(drawn) == 6
    assert "99.3 % of the ranker's top 10 at 102 requests" in titles[0] and "93.1 % at 100 " in titles[0]
    assert (tmp_path / "budget.png").stat().st_size > 10_000


def test_points_are_hundredths_with_the_error_to_both_sides():
    value, error = plots.points(Interval(0.02, 0.015, 0.03))
    assert value == pytest.approx(2.0) and np.ravel(error) == pytest.approx([0.5, 1.0])


def test_kernels(tmp_path):
    figures = measured(tmp_path, "experiments.kernels")
    for key in "din_linear", "simtier", "interaction", "interaction_exact", "head_only":
        assert list(figures[f"{key}_ms"]) == ["40,64"]
        assert all(math.isfinite(x) and x > 0 for x in figures[f"{key}_ms"].values()), key
    assert figures["interaction_longest_over_shortest"] == {"40": 1.0}  # one length


def test_nothing_of_the_size_of_the_history_reaches_the_interaction():
    """Inputs of every form that is timed as flat in L have the same shapes at any L."""
    short, long = (kernels.fixed_forms(5, n) for n in (64, 96))
    for name, form in short.items():
        shapes = [[x.shape for x in jax.tree.leaves(made.args)] for made in (form, long[name])]
        assert shapes[0] == shapes[1], name


def test_index_refresh(tmp_path, capsys):
    figures = measured(tmp_path, "experiments.index_refresh")
    for name in ("build_items_per_s", "bare_items_per_s", "build_over_bare", "freshness_p50_ms", "freshness_p99_ms"):
        assert figures[name] > 0, name
    for name in ("upsert_1000_ms", "lookup_10k_ms"):
        assert set(figures[name]) == {"2000", "8000"} and min(figures[name].values()) > 0
    assert figures["freshness_p50_ms"] <= figures["freshness_p99_ms"]
    rows = figures["bytes_per_row"]
    assert rows["int8"] < rows["bfloat16"] < rows["float32"]
    assert "build_over_bare" in capsys.readouterr().out


SERVICES = {"aif", "sequential", "exact", "matching", "two_tower"}


def test_cost(tmp_path, monkeypatch, capsys):
    for name, value in child_environment().items():  # of the process of the empty engine
        monkeypatch.setenv(name, value)
    found = measured(tmp_path, "experiments.cost")
    assert list(found) == ["C=60, L=64", "empty_engine_requests_per_second", "machine"]
    assert found["empty_engine_requests_per_second"] > 0
    figures = found["C=60, L=64"]
    for key in ("cpu_ms", "max_rps", "lone_p50_ms", "lone_p99_ms", "critical_p50_ms", "critical_p99_ms"):
        assert set(figures[key]) == SERVICES
        assert all(set(kinds) == set(cost.KINDS) for kinds in figures[key].values())
    assert all(value > 0 for kinds in figures["cpu_ms"].values() for value in kinds.values())
    ratios = [key for key in figures if "_ratio_" in key]
    assert len(ratios) == 2
    for key in ("floor_cpu_ms", "engine_over_floor", *ratios):
        assert set(figures[key]) == set(cost.KINDS)
    ratio = figures["cpu_ms"]["aif"]["new"] / figures["floor_cpu_ms"]["new"]
    assert figures["engine_over_floor"]["new"] == pytest.approx(ratio)
    assert set(figures["overhead_p50_ms"]) == {"after_wait", "back_to_back"}
    assert all(figures["critical_p50_ms"][name]["new"] < figures["lone_p50_ms"][name]["new"] for name in SERVICES)
    assert "cpu_ratio_sequential_over_aif" in capsys.readouterr().out


def test_runtimes(tmp_path, capsys):
    figures = measured(tmp_path, "experiments.runtimes", needs=("torch", "onnxscript", "onnxruntime"))
    programs, times = {"user", "score", "whole", "score_10000", "whole_10000"}, figures["runtime_ms"]
    assert set(times) == {"aif_jax", "torch", "onnxruntime"} and all(set(ms) == programs for ms in times.values())
    for name in ("torch", "onnxruntime"):
        assert figures[f"over_{name}"] == pytest.approx({what: times[name][what] / times["aif_jax"][what] for what in programs})
    assert figures["score_over_head"] == pytest.approx(times["aif_jax"]["score"] / figures["head_ms"][""])
    ours_alone = ("over_bfloat16", "over_int8")
    assert all(figures[f"{score}_{name}"] > 0 for score in ("score", "score_10000") for name in ours_alone)
    assert "over_onnxruntime" in capsys.readouterr().out


def test_storage(tmp_path, capsys):
    figures = measured(tmp_path, "experiments.study.storage", "--work", str(tmp_path / "work"))["smoke"]
    for narrow in ("bfloat16", "int8"):
        assert all(low <= value <= high for value, low, high in figures[narrow].values())
    data, trial = datasets.load("smoke"), question.Trial(dataset="smoke", model=question.AIF)
    made = question.trained(trial, question.parts_of(trial, data)[0], data, work=tmp_path / "work")
    one = jax.tree.map(lambda leaf: leaf[1], data.dataset.catalogue.features(np.arange(2)))
    exact, rounded = (
        np.asarray(each.item(made.params, one).vector) for each in (made.model, storage.stored(made.model.config, "int8"))
    )
    assert 0 < np.abs(rounded - exact).max() < 0.01 * np.abs(exact).max()


def test_runtimes_refuse_another_network(capsys):
    ours = np.array([2.0, 1.0], np.float32), np.array([0, 1])
    runtimes.check("torch", ours, ours)
    with pytest.raises(SystemExit, match="torch: expected the logits of ours, got some that differ by 1.0e-03"):
        runtimes.check("torch", ours, (ours[0] + np.float32(1e-3), ours[1]))


def test_a_runtime_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(runtimes, "NEEDED", {"torch": ("no_such_package",)})
    figures = runtimes.measure(rounds=1, smoke=True)
    assert set(figures["runtime_ms"]) == {"aif_jax"} and not any(name.startswith("over_") for name in figures)
    assert "torch: left out, no_such_package not installed" in capsys.readouterr().out


@pytest.mark.timeout(900)
def test_service_load(tmp_path, monkeypatch, capsys):
    for name, value in child_environment().items():  # of the services, which share what is compiled
        monkeypatch.setenv(name, value)
    figures = measured(tmp_path, "experiments.service_load")
    names = {"http_overhead_p50_ms", "http_rps_share", "http_service_cpu_ms", "http_client_cpu_ms", "engine_cpu_ms"}
    assert names <= figures.keys() and names <= set(capsys.readouterr().out.split())
    assert figures["http_rps_share"] > 0


def test_train_throughput(tmp_path):
    figures = measured(tmp_path, "experiments.train_throughput")
    assert set(figures["step_ms_by_history"]) == {"16", "32"}
    times = figures["step_ms_by_table_rows"]
    assert figures["step_ratio_1e7_over_1e4"] == pytest.approx(list(times.values())[-1] / list(times.values())[0])
