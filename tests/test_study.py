"""The study: its command at smoke size, its models, its records, its report, and the literature's protocol."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import train
from aif_jax.data import candidates
from aif_jax.data.candidates import SampleKey
from aif_jax.data.pipeline import make_batch
from aif_jax.data.sampling import NegativeSampler, item_counts
from aif_jax.train.distill import teacher_scores
from experiments import ablation
from experiments.datasets import movielens
from experiments.datasets.synthetic import synthetic_world
from experiments.study import (
    catalogue,
    datasets,
    evaluation,
    inttower,
    limits,
    models,
    plan,
    plots,
    recipes,
    records,
    report,
    runs,
    tables,
    tuning,
)
from experiments.study.runs import Run
from tests import demo
from tests.conftest import child_environment
from tests.light import flags

pytestmark = pytest.mark.usefixtures("light_compilation")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def smoke():
    return datasets.load("smoke")


def made(model, seed, gauc, *, truth=None, **more):
    run = Run(**{"dataset": "movielens", "model": model, "seed": seed, **more})
    figures = {"auc": gauc - 0.01, "gauc": gauc, "hr100": 0.5, "long_users": {"gauc": gauc - 0.02, "auc": 0.7}}
    figures["by_history"] = {"5-19": {"gauc": gauc}, "20+": {"gauc": gauc + 0.01}}
    figures |= {} if truth is None else {"ceiling": {"gauc": truth}}
    return {"id": run.id, **dataclasses.asdict(run), "figures": figures}


def by_id(*found):
    return {record["id"]: record for record in found}


def test_smoke(tmp_path):
    command = [sys.executable, "-m", "experiments.ablation", "--smoke", "--model", "aif", "exact"]
    command += ["--json", "a.json", "--results", "r", "--work", "w", "--figures", "f"]
    done = subprocess.run(
        command, cwd=tmp_path, env=child_environment(flags=flags()), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads((tmp_path / "a.json").read_text())["next"]["smoke"]
    assert set(got) == {"exact", "aif"}
    assert 0 < got["aif"]["ranker_top10_in_top100"] <= 1 and "ranker_top10_in_top100" not in got["exact"]
    for figures in got.values():
        for name in ("auc", "gauc", "gauc_mean", "hr100", "ndcg100", "ceiling_gauc"):
            assert 0 < figures[name] <= 1, name
    stored = records.read(tmp_path / "r")
    assert all(len(record["losses"]) >= 20 and record["losses"][-1][1] > 0 for record in stored.values())
    assert {run.id for run in ablation.wanted(ablation.parse(command[3:]))} == set(stored)  # the next run has nothing to do
    assert all(np.load(path).shape == (16, 100) for path in (tmp_path / "w" / "top").iterdir())


def test_critical_paths_of_models_and_lengths(tmp_path, capsys):
    folders = ["--results", str(tmp_path), "--figures", str(tmp_path), "--work", str(tmp_path / "work")]
    ablation.main(["--smoke", "--model", "two_tower", *folders])
    arguments = ["--smoke", "--critical", "--model", "two_tower", "exact", "aif", "--json", str(tmp_path / "a.json")]
    ablation.main([*arguments, *folders])
    timed = json.loads((tmp_path / ablation.CRITICAL).read_text())["models"]
    assert list(timed) == ["two_tower", "exact", "aif", "two_tower, with factors", "exact, L=64", "aif, L=64"]
    assert all(0 < times["best"] <= times["p50"] <= times["p99"] and times["cpu"] > 0 for times in timed.values())
    assert [name for name, times in timed.items() if times["trained"]] == ["two_tower", "two_tower, with factors"]
    claims = json.loads((tmp_path / "a.json").read_text())["claims"]
    assert claims["critical_exact_over_aif L=64"] == pytest.approx(
        timed["exact, L=64"]["p50"] / timed["aif, L=64"]["p50"], rel=1e-3
    )
    assert "critical_exact_over_aif L=64 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "three_tower"], "invalid choice: 'three_tower'"), (["--dataset", "netflix"], "invalid choice: 'netflix'")],
)
def test_command_refuses_wrong_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        ablation.parse(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_every_model_has_a_config(smoke):
    schema, fields = smoke.dataset.schema, smoke.sim_fields
    configs = {name: models.config(name, schema, sim_fields=fields) for name in models.names()}
    assert len(set(configs.values())) == len(configs)  # no two names are the same model
    names = {name: [block.name for block in config.blocks] for name, config in configs.items()}
    assert names["base"] == ["dot_product"] and not configs["base"].sequence
    assert names["+ SIM"] == ["sim_item", "sim_category", "dot_product"]
    assert "sim_tier" not in names["minus SimTier"] and {"lsh_din", "linear_memory"} < set(names["minus SimTier"])
    assert configs["sweep M=32"].blocks[0].bridges == 32 and "linear_memory" not in names["sweep M=32"]
    with pytest.raises(ValueError, match="model: expected one of"):
        models.config("three_tower", schema, sim_fields=())


def test_baselines_are_models_of_the_study(smoke):
    schema, fields = smoke.dataset.schema, smoke.sim_fields
    for name, preset in (("two_tower", aif.presets.two_tower), ("cold", aif.presets.cold)):
        assert models.config(name, schema, sim_fields=fields, long_length=512) == preset(schema, long_length=512)


def test_models_have_the_parameters_of_their_records():
    """Except that each SIM field has a query map now, 33 * 32 parameters, where two fields shared one in older records."""
    schema = aif.Schema(
        item_attributes=(aif.Attribute(name="item", size=2001), aif.Attribute(name="category", size=101)), actions=3, content=32
    )
    recorded = {r["model"]: r for r in records.read(records.RESULTS).values() if r["dataset"] == "synthetic"}
    assert len(recorded) > 15
    for name, record in recorded.items():
        config = models.config(name, schema, sim_fields=("item", "category"))
        shapes = jax.eval_shape(lambda key, c=config: aif.build(c).init(key, None, fitted={}), jax.random.key(0))
        shared = "by_seen" not in record["figures"] and sum(isinstance(block, aif.blocks.Sim) for block in config.blocks) == 2
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == record["parameters"] + 33 * 32 * shared, name


def test_plan_names_every_run_once():
    found = plan.everything()
    assert len({run.id for run in found}) == len(found) and found[0].slice == "validation"
    assert {run.model for run in found} == set(models.names())
    assert {run.dataset for run in found} == set(datasets.NAMES) - {"smoke", datasets.ONCE}
    assert {run.recipe for run in found} == set(recipes.NAMES)
    with pytest.raises(ValueError, match="stage: expected one of"):
        plan.runs("lunch")


def test_every_run_of_the_plan_has_a_record():
    found = records.read(records.RESULTS)
    missing = [run.id for run in plan.everything() if run.id not in found]
    assert not missing, "run them: python -m experiments.ablation --data DIR"


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="without /proc every claim counts as alive")


@pytest.fixture
def other_process():
    """A process that does nothing until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@needs_proc
def test_a_claim_holds_while_its_process_lives(tmp_path, other_process):
    path = tmp_path / "run"
    path.write_text(str(other_process.pid), encoding="utf-8")
    assert not ablation.claim(path)
    other_process.kill()
    other_process.wait()
    assert ablation.claim(path) and path.read_text() == str(os.getpid())
    assert not ablation.claim(path)


@pytest.mark.parametrize("ending", ["done", pytest.param("killed", marks=needs_proc)])
def test_models_wait_for_trials_of_other_processes(tmp_path, other_process, ending):
    claims = tmp_path / "claims"
    claims.mkdir()
    trial = claims / plan.runs("tuning")[0].file
    trial.write_text(str(other_process.pid), encoding="utf-8")
    (claims / plan.runs("main")[0].file).write_text(str(other_process.pid), encoding="utf-8")  # no trial: nobody waits for it
    waits = []

    def rest(seconds):
        waits.append(seconds)
        assert len(waits) < 5
        if len(waits) == 2:
            trial.unlink() if ending == "done" else (other_process.kill(), other_process.wait())

    ablation.wait_for_trials(tmp_path, rest=rest)
    assert len(waits) == 2


def test_records_round_trip(tmp_path):
    first = {**made("aif", 0, 0.8), "figures": {"gauc": np.float32(0.123456789), "bins": [np.int64(3)]}}
    records.append(tmp_path, first)
    records.append(tmp_path, made("cold", 0, 0.7))
    records.append(tmp_path, made("cold", 0, 0.75))  # the later record of an id counts
    got = records.read(tmp_path)
    assert list(got) == [first["id"], made("cold", 0, 0)["id"]]
    assert got[first["id"]]["figures"] == {"gauc": 0.12346, "bins": [3]}
    assert got[made("cold", 0, 0)["id"]]["figures"]["gauc"] == 0.75
    with open(tmp_path / "movielens.jsonl", "a") as file:
        file.write('{"half a rec')
    with pytest.raises(ValueError, match=r"movielens.jsonl, line 4: expected a record with an id"):
        records.read(tmp_path)


def test_projection_and_dtype_of_a_run_reach_the_model(smoke, tmp_path):
    config = models.config("+ DIN on LSH", smoke.dataset.schema, sim_fields=smoke.sim_fields, smoke=True)
    tables = [runs.fit_tables(smoke.dataset, config, projection=name)["signatures_128"] for name in ("rotated", "random")]
    for name in ("projection", "table"):
        assert tables[0][name].shape == tables[1][name].shape and not np.array_equal(tables[0][name], tables[1][name])
    figures = {}
    for dtype in ("float32", "bfloat16"):
        run = Run(dataset="smoke", model="two_tower", seed=0, compute=dtype)
        figures[dtype] = runs.train_and_evaluate(run, smoke, tmp_path, sizes=runs.SMOKE, progress=False)
    assert figures["bfloat16"]["id"] == figures["float32"]["id"].replace("/seed 0", "/bfloat16/seed 0")
    assert figures["float32"]["figures"]["gauc"] != figures["bfloat16"]["figures"]["gauc"]
    assert figures["float32"]["figures"]["gauc"] == pytest.approx(figures["bfloat16"]["figures"]["gauc"], abs=0.1)


def test_batches_by_length_and_hidden_ids_reach_the_pipeline(smoke, tmp_path, monkeypatch):
    given = []

    def pipeline(**arguments):
        given.append((arguments["buckets"], arguments["id_dropout"]))
        raise LookupError("seen enough")

    monkeypatch.setattr(runs, "Pipeline", pipeline)
    usual = Run(dataset="smoke", model="preset", seed=0)
    by_length = dataclasses.replace(usual, batches=runs.BY_LENGTH)
    hidden = dataclasses.replace(usual, recipe="item id dropout 0.1")
    for run in (usual, by_length, hidden):
        with pytest.raises(LookupError):
            runs.train_and_evaluate(run, smoke, tmp_path, progress=False)
    assert given == [((), 0.0), ((64, 128, 256), 0.0), ((), 0.1)]
    assert by_length.id == usual.id.replace("/seed 0", "/length buckets/seed 0")
    assert report.label(dataclasses.asdict(by_length)) == "preset, with length buckets"
    assert runs.of_default(by_length, "exact") == dataclasses.replace(usual, model="exact")


def test_hyperparameters_are_those_of_the_best_trial():
    first, _, fast, _, slow = plan.TRIALS
    trials = [
        made("aif", 0, 0.7, slice="validation", **first),
        made("aif", 0, 0.8, slice="validation", **fast),
        made("two_tower", 0, 0.9, slice="validation", **slow),
        made("aif", 0, 0.99, learning_rate=0.5),  # the test slice has no say
        made("aif", 0, 0.98, slice="validation", **first | dict(epochs=4)),  # nor what not every family has tried
        made("preset", 0, 0.97, slice="validation", **slow),
    ]
    found = by_id(*trials)
    assert tuning.tuned(Run(dataset="movielens", model="+ SIM", seed=1), found).learning_rate == 0.02
    assert tuning.tuned(Run(dataset="movielens", model="two_tower", seed=1), found).learning_rate == 0.005
    assert tuning.tuned(Run(dataset="movielens", model="cold", seed=1, learning_rate=0.3), found).learning_rate == 0.3
    more = found | by_id(made("aif", 1, 0.95, slice="validation", **first))  # other seeds are no trials
    assert tuning.tuned(Run(dataset="movielens", model="aif", seed=1), more).learning_rate == 0.02
    trial = Run(dataset="movielens", model="aif", seed=0, slice="validation", learning_rate=0.4)
    assert tuning.tuned(trial, found) == trial


def test_report_from_records(tmp_path):
    found = by_id(
        *(made("two_tower", seed, gauc) for seed, gauc in enumerate((0.80, 0.82))),
        *(made("aif", seed, gauc) for seed, gauc in enumerate((0.86, 0.86))),
        *(made("exact", seed, 0.87) for seed in range(2)),
        *(made("cold", seed, gauc) for seed, gauc in enumerate((0.84, 0.85))),
        made("+ SimTier", 0, 0.84, recipe="pointwise"),
        made("aif", 0, 0.5, slice="validation"),
        made("aif", 0, 0.7, compute="bfloat16"),  # is not averaged with the others
        *(made("+ SimTier", seed, 0.81, projection="random", **plan.FIXED) for seed in range(2)),
        made("+ SimTier", 1, 0.83, **plan.FIXED),
        made("sweep L=16", 0, 0.79, **plan.FIXED),
        *(made("aif", seed, gauc, **plan.FIXED) for seed, gauc in enumerate((0.90, 0.84))),
        *(made("minus SIM", seed, gauc, **plan.FIXED) for seed, gauc in enumerate((0.88, 0.83, 0.1))),
        *(made(model, 0, gauc, **plan.FIXED | dict(dataset="taobao")) for model, gauc in (("aif", 0.7), ("minus SIM", 0.6))),
        *(made("minus SIM", seed, gauc) for seed, gauc in enumerate((0.85, 0.83))),
        *(made(model, seed, 0.9, dataset="synthetic-long", truth=0.95) for model in ("aif", "+ SIM") for seed in range(2)),
        *(made("+ SIM", 0, gauc, **plan.FIXED | dict(dataset="synthetic-short", epochs=n)) for n, gauc in ((2, 0.7), (6, 0.8))),
    )
    for seed in range(2):
        seen = {n: {"gauc": level + 0.01 * seed, "rested": {"gauc": 0.6}} for n, level in (("32", 0.7), ("all", 0.8))}
        record = made("aif", seed, 0.86)
        found[record["id"]]["figures"]["by_seen"] = seen
    critical = {model: {"p50": ms, "cpu": 2 * ms} for model, ms in (("aif", 0.5), ("exact", 6.0), ("minus SIM", 0.25))}
    critical |= {"aif, L=9": {"p50": 1.0}, "exact, L=9": {"p50": 20.0}}
    keys = report.keys(found, critical)
    rows = keys["next"]["movielens"]
    assert list(rows) == ["two_tower", "cold", "exact", "aif", "aif, with bfloat16", "minus SIM"]
    assert rows["aif"]["seeds"] == 2 and rows["aif, with bfloat16"]["gauc"] == 0.7
    assert rows["two_tower"]["gauc"] == pytest.approx(0.81) and rows["two_tower"]["seeds"] == 2
    assert rows["two_tower"]["gauc_std"] == pytest.approx(0.02 / 2**0.5)
    assert rows["aif"]["gauc_long_users"] == pytest.approx(0.84) and rows["aif"]["critical_ms"] == 0.5
    assert keys["claims"]["movielens_gauc_points_over_two_tower"] == pytest.approx(5)
    assert keys["claims"]["movielens_share_of_exact_gain"] == pytest.approx(5 / 6)
    assert keys["claims"]["critical_exact_over_aif"] == 12 and keys["claims"]["critical_exact_over_aif L=9"] == 20
    assert keys["recipes"]["pointwise"]["gauc"] == 0.84
    signatures = keys["signatures"]
    assert signatures["+ SimTier, with random"]["gauc"] == pytest.approx(0.81)
    assert signatures["+ SimTier, with random"]["seeds"] == 2 and signatures["+ SimTier"]["seeds"] == 1
    assert list(keys["precision"]) == ["+ SimTier"] and keys["precision"]["+ SimTier"]["gauc"] == 0.83
    assert keys["by_history"]["aif"] == {"5-19": pytest.approx(0.86), "20+": pytest.approx(0.87)}
    points = {"points": pytest.approx(2), "points_std": pytest.approx(2**0.5)}  # 1 and 3
    assert keys["lost"] == {"minus SIM": {"movielens": points}} and rows["minus SIM"]["critical_ms"] == 0.25
    assert keys["lost, validation"] == {
        "minus SIM": {
            "movielens": {"points": pytest.approx(1.5), "points_std": pytest.approx(0.5 * 2**0.5)},
            "taobao": {"points": pytest.approx(10), "points_std": pytest.approx(np.nan, nan_ok=True)},
        }
    }
    before = keys["leave one out, validation"]
    assert before["aif"]["seeds"] == 2 and before["minus SIM"]["critical_ms"] == 0.25  # MovieLens alone
    lengths = report.sizes(found)["long history L"]
    assert {value: figures["gauc"] for value, figures in lengths.items()} == {"16": 0.79, "128": 0.83}
    assert keys["by_world"]["the truth"]["synthetic-long"]["gauc"] == 0.95
    assert {n: figures["gauc"] for n, figures in keys["by_epochs"]["+ SIM"].items()} == {"2 epochs": 0.7, "6 epochs": 0.8}
    shown = tables.tables(found, critical)
    text, page = tables.text(shown), tables.markdown(shown)
    assert re.search(r"two_tower +0.8000 ± 0.0141  0.8100 ± 0.0141", text)
    assert re.search("movielens_gauc_points_over_two_tower +5.000", text)
    assert "| two_tower | 0.8000 ± 0.0141 | 0.8100 ± 0.0141 | 0.5000 ± 0.0000 |  | 2 |" in page
    assert "| aif | 0.8500 ± 0.0000 | 0.8600 ± 0.0000 | 0.5000 ± 0.0000 | 0.50 | 2 |" in page
    assert "| minus SIM | 2.00 ± 1.41 |" in page and "| minus SIM | 1.50 ± 0.71 | 10.00 |" in page
    assert "| minus SIM | 0.5933 ± 0.4366 | 0.6033 ± 0.4366 | 0.5000 ± 0.0000 | 0.25 | 3 |" in page
    assert "## movielens, leave one out, validation slice" in page
    assert "| + SIM | 0.7000 | 0.8000 |" in page
    assert "| aif | 0.9000 ± 0.0000 |\n| the truth | 0.9500 |" in page
    assert keys["by_seen"]["movielens"]["aif"]["all"]["gauc"]["gauc"] == pytest.approx(0.805)
    assert "| aif | 0.7050 ± 0.0071 | 0.8050 ± 0.0071 |" in page and "| aif | 0.6000 ± 0.0000 | 0.6000 ± 0.0000 |" in page
    drawn = {path.stem: path.stat().st_size for path in plots.draw(found, critical, tmp_path)}
    others = {"gauc_by_critical_path", "gauc_by_history", "gauc_by_seen", "gauc_by_size", "leave_one_out"}
    assert set(drawn) == {"frontier", *others}
    assert all(size > 10_000 for size in drawn.values())
    assert plots.draw({}, None, tmp_path) == []


def test_sizes_name_models_of_the_plan():
    """Every value of a size is a model whose config has it; every sweep is in the figure or the table of recency windows."""
    planned = {run.model for stage in ("sweeps", "signatures") for run in plan.runs(stage)}
    assert all(set(values.values()) <= planned for values in models.SWEPT.values())
    shown = {model for values in models.SWEPT.values() for model in values.values()}
    assert planned - shown == {"sweep L=512, two recency windows", "sweep L=512, seven recency windows"}


def test_every_model_of_the_plan_has_its_critical_path():
    critical = json.loads((records.RESULTS / ablation.CRITICAL).read_text())["models"]
    planned = {run.model for run in plan.everything()}
    same = {*models.STREAMING, *models.HALF_LIVES, *models.RESTING}  # in real time they are what "preset" is
    assert planned - same <= set(critical), "measure it again: --critical --rounds 300"
    served = {name for name, times in critical.items() if times["trained"]}
    assert {"two_tower", "preset, with factors", "preset, L=2048, with factors"} <= served  # what README's times are of


def test_the_page_of_tables_is_that_of_the_records():
    critical = json.loads((records.RESULTS / ablation.CRITICAL).read_text())["models"]
    wanted = tables.markdown(tables.tables(records.read(records.RESULTS), critical))
    written = (ROOT / "experiments" / "notes" / tables.PAGE).read_text(encoding="utf-8")
    assert written == wanted, "write it again: python -m experiments.ablation --report-only --page docs"


def test_hard_negatives_are_the_highest_and_the_first_drawn():
    rows = np.array([[9, 1, 2, 3, 4, 5]])
    scores = np.array([[0.0, 1.0, 5.0, 2.0, 7.0, 3.0]])
    assert recipes.hardest(rows, scores, count=4).tolist() == [[9, 4, 2, 1, 3]]


def test_recipes_train_towards_the_positive():
    scores = np.array([[1.0, 2.0, 0.0]], np.float32)
    first = np.array([[1.0, 0.0, 0.0]], np.float32)
    plain = float(recipes.loss(recipes.DEFAULT)(scores, first))
    pointwise, listwise = (float(recipes.loss(name)(scores, first)) for name in ("pointwise", "listwise"))
    assert plain == pytest.approx(pointwise + listwise)
    teacher = np.array([[1.0, 2.0, 0.0]], np.float32)  # agrees: distillation adds nothing
    assert float(recipes.loss("distillation")(scores, teacher)) == pytest.approx(plain)
    log_q = np.array([[0.0, 3.0, 3.0]], np.float32)  # frequent negatives are pushed down less, by the listwise term alone
    corrected = float(recipes.loss("logQ")(scores, first, log_q=log_q))
    assert pointwise < corrected < plain
    with pytest.raises(ValueError, match="recipe: expected one of"):
        recipes.loss("prayer")


def test_recipes_with_a_helper_score_their_candidates(smoke):
    counts = item_counts(smoke.dataset, smoke.split.train)
    model = aif.build(models.config("two_tower", smoke.dataset.schema, sim_fields=(), smoke=True))
    helper = recipes.Helper(model, demo.init(model, items=smoke.dataset.catalogue))
    at = smoke.split.test[:4]
    made = {}
    for name in (recipes.DEFAULT, *recipes.HELPERS):
        given = helper if name in recipes.HELPERS else None
        made[name] = recipes.source(name, smoke.dataset, counts=counts, helper=given)(at, SampleKey(0, 0, 0))
    plain, taught, same, _, hard = made.values()
    np.testing.assert_array_equal(taught.rows, plain.rows)
    np.testing.assert_array_equal(same.labels, taught.labels)  # of another teacher by its name, the same helper here
    assert len(np.unique(taught.labels)) > 10 and hard.rows.shape == hard.labels.shape == plain.rows.shape
    np.testing.assert_array_equal(hard.rows[:, 0], smoke.dataset.log.item[at])
    with pytest.raises(ValueError, match="expected a trained exact as helper, got none"):
        recipes.source("distillation", smoke.dataset, counts=counts)


def test_a_helper_scores_alike_whatever_lengths_it_reads_together(smoke):
    config = models.config("preset", smoke.dataset.schema, sim_fields=smoke.sim_fields).replace(long_length=256)
    assert recipes.shorter(256) == (64, 128) and recipes.shorter(2048) == (128, 256, 512, 1024) and recipes.shorter(64) == ()
    helper = recipes.Helper(aif.build(config), demo.init(aif.build(config), items=smoke.dataset.catalogue))
    log, at = smoke.dataset.log, smoke.split.test[::40][:30]
    lengths = log.history_end(at) - log.offsets[log.user[at]]
    assert lengths.min() < 64 < lengths.max()
    draw = candidates.sampled_negatives(
        smoke.dataset, sampler=NegativeSampler(item_counts(smoke.dataset, smoke.split.train)), negatives=3
    )
    rows, labels, _ = draw(at, SampleKey(0, 0, 0))
    (whole,) = train.predict(*helper, [make_batch(smoke.dataset, at, rows, labels, config=config)])
    np.testing.assert_allclose(teacher_scores(*helper, smoke.dataset, at, rows), whole, atol=1e-5)


def test_a_model_with_factors_has_a_row_of_its_own():
    def record(model, gauc, hr100, recipe=recipes.DEFAULT):
        figures = {"gauc": gauc, "catalogue": {"corrected": {"hr100": hr100}}}
        where = {"dataset": "movielens", "slice": "test", "task": "next", "recipe": recipe, "model": model}
        return where | {"figures": figures}

    rows = [record("preset", 0.90, 0.40), record("two_tower", 0.86, 0.30), record("two_tower", 0.8, 0.32, recipe="logQ")]
    rows[0]["figures"]["factors"] = {"gauc": 0.91, "catalogue": {"corrected": {"hr100": 0.48}}}
    table = report.in_catalogue(dict(enumerate(rows)))
    assert list(table) == ["preset", "preset, with factors", "two_tower", "two_tower, logQ"]
    assert table["preset, with factors"]["hr100"] == 0.48 and table["preset"]["hr100"] == 0.40


def test_recipes_of_the_preset_run_one_after_another(smoke, tmp_path, monkeypatch):
    """On the validation slice: the student finds its teacher there; a hidden id is what items without an event take."""
    counted, shared = [], runs.unseen_as_unknown
    monkeypatch.setattr(
        runs,
        "unseen_as_unknown",
        lambda params, counts, config: counted.append(counts) or shared(params, counts, config=config),
    )
    taught = Run(dataset="smoke", model="two_tower", seed=0, slice="validation", recipe=recipes.FROM_PRESET)
    with pytest.raises(FileNotFoundError, match="expected the trained model of 'smoke/next/validation/preset"):
        runs.train_and_evaluate(taught, smoke, tmp_path, sizes=runs.SMOKE, progress=False)
    teacher = dataclasses.replace(taught, model="preset", recipe=recipes.DEFAULT)
    (hidden,) = (dataclasses.replace(taught, recipe=name) for name in recipes.HIDDEN)
    gauc = []
    for run in (teacher, taught, hidden):
        assert not counted
        gauc.append(runs.train_and_evaluate(run, smoke, tmp_path, sizes=runs.SMOKE, progress=False)["figures"]["gauc"])
    assert len(set(gauc)) == 3, gauc
    np.testing.assert_array_equal(counted, [item_counts(smoke.dataset, smoke.split.train)])


def test_corrected_recipes_draw_and_correct_as_they_say(smoke):
    counts, at = item_counts(smoke.dataset, smoke.split.train), smoke.split.train[200:204]
    made = {name: recipes.source(name, smoke.dataset, counts=counts)(at, SampleKey(0, 0, 0)) for name in recipes.CORRECTED}
    held, both = made[recipes.CATALOGUE], made[recipes.MIXED]
    np.testing.assert_allclose(held.log_q[:, 1:], NegativeSampler(counts).log_q(held.rows[:, 1:], 15))
    assert not held.log_q[:, 0].any()
    np.testing.assert_allclose(both.log_q, NegativeSampler(counts, uniform=0.5).log_q(both.rows, 15))
    assert not np.array_equal(both.rows, held.rows)
    assert recipes.source(recipes.LARGER, smoke.dataset, counts=counts)(at, SampleKey(0, 0, 0)).rows.shape == (4, 64)
    counts[5] = 0
    assert recipes.offset("logQ", counts, model="preset", dataset="movielens")[[0, 5, 6]].tolist() == [-100, -100, 0]
    assert not recipes.offset(recipes.MIXED, counts, model="preset", dataset="movielens").any()
    assert recipes.offset(recipes.DEFAULT, counts, model="cold", dataset="movielens")[[5, 6]] == pytest.approx(
        [-100, 0.75 * np.log(counts[6])]
    )
    assert recipes.offset(recipes.DEFAULT, counts, model="two_tower", dataset="movielens")[5] == 1
    assert recipes.offset(recipes.DEFAULT, counts, model="two_tower", dataset="taobao")[5] == 2
    for name in runs.IN_CATALOGUE:  # masked in one model alone, such items would make hit rates that do not compare
        assert recipes.offset(recipes.DEFAULT, counts, model=name, dataset="movielens")[5] >= 1


def test_hit_rates_of_the_catalogue_by_hand(smoke, monkeypatch):
    """Three requests over five items, one of which has no training event."""
    counts = np.array([0, 4, 2, 1, 0])
    scores = np.array([[-np.inf, 1, 2, 3, 4], [-np.inf, 1, 1.5, 0, -np.inf], [-np.inf, 0, 0, 0, 9]], np.float32)
    target = np.array([3, 2, 4])

    class Log:
        item = target

    class Data:
        log, catalogue = Log(), range(5)

    batches = [(np.array([0, 1]), scores[:2]), (np.array([2]), scores[2:])]
    monkeypatch.setattr(catalogue, "catalogue_scores", lambda *_, **__: iter(batches))
    retrieved = np.array([[3, 1], [1, 3], [4, 1]], np.int32)
    asked = catalogue.ask(None, None, Data(), np.arange(3), counts, retrieved=retrieved)  # type: ignore[arg-type]
    assert asked.plain.tolist() == [1, 0, 0]
    # 0.75 log of 4, 2, 1: 1.04, 0.52, 0; the untrained item falls to the end
    assert asked.corrected.tolist() == [0, 1, 3]
    assert asked.retrieved.tolist() == [0, 5, 1]  # 3 over 2.04; not retrieved; the untrained item behind the other
    assert asked.top[0].tolist() == [3, 2, 1, 4]
    np.testing.assert_allclose(asked.untrained, [0.25, 0.25, 0.25])
    found = catalogue.figures(asked, counts[target] == 0)
    assert found["plain"]["hr10"] == 1 and found["requests_for_untrained"] == pytest.approx(1 / 3)
    assert found["plain_untrained"]["hr10"] == 1.0


def test_catalogue_figures_by_hand(smoke):
    """The best rows and ranks of scores that are written down."""
    assert evaluation.hits(np.array([0, 99, 100, 5])) == {
        "hr100": 0.75,
        "ndcg100": pytest.approx((1 + 1 / np.log2(101) + 1 / np.log2(7)) / 4),
    }
    ranker, top = np.array([[1, 2], [3, 4]]), np.array([[2, 9, 8], [4, 3, 7]])
    assert evaluation.ranker_recall(ranker, top) == 0.75


def test_ceiling_is_what_no_model_beats(smoke):
    world = smoke.world
    assert world is not None
    assert smoke.split.test.min() >= 0 and 0.5 < world.ceiling_auc(smoke.split.test[world.observable[smoke.split.test]]) < 1


def test_limits_see_the_whole_truth_or_less(smoke):
    requests, sampling = limits.observable_requests(smoke, requests=200)
    full = limits.lift(smoke.world, requests, limits.View())
    np.testing.assert_allclose(full, smoke.world.lift(requests.positions, requests.rows), rtol=1e-9)
    whole = limits.gauc(smoke.world, requests, full, sampling)
    assert whole == smoke.world.ceiling_gauc(requests.positions, requests.rows, requests.labels, sampling=sampling).value
    for name, view in limits.VIEWS.items():
        less = limits.lift(smoke.world, requests, view._replace(window=view.window and 40))
        assert (np.abs(less - full).max() > 0.1) == (name != "the truth"), name
        if name not in ("the truth", "no categories"):  # categories are worth less than the luck of 200 requests
            assert limits.gauc(smoke.world, requests, less, sampling) < whole - 0.01, name


@pytest.fixture
def folder(tmp_path):
    """A small folder in the format of MovieLens 1M."""
    rng = np.random.default_rng(0)
    pairs = [(user, movie) for user in range(1, 13) for movie in rng.permutation(np.arange(1, 21))[:12]]
    lines = [f"{user}::{movie}::{rng.integers(1, 6)}::{978300000 + i}" for i, (user, movie) in enumerate(pairs)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    films = [f"{movie}::Film {movie} (19{70 + movie})::{'Drama' if movie % 2 else 'Comedy'}" for movie in range(1, 21)]
    (tmp_path / "movies.dat").write_text("\n".join(films) + "\n", encoding="latin-1")
    people = [f"{user}::{'MF'[user % 2]}::25::4::12345" for user in range(1, 13)]
    (tmp_path / "users.dat").write_text("\n".join(people) + "\n", encoding="latin-1")
    return tmp_path


def test_inttower_protocol_drops_threes_and_leaks_only_by_name(folder):
    dataset = movielens.read(folder)
    ratings = dataset.log.action / 2
    leaky, honest = (inttower.prepare(dataset, leak=leak) for leak in (True, False))
    for protocol in (leaky, honest):
        tested = np.concatenate([protocol.train, protocol.test])
        assert len(np.unique(tested)) == len(tested) == (ratings != 3).sum()
        assert len(protocol.test) == round(0.2 * len(tested))
        assert (protocol.labels[tested] == (ratings[tested] > 3)).all()
        assert (protocol.dataset.log.action[protocol.test] == 0).all()  # histories do not show what is asked
    user = int(dataset.log.user[leaky.test[0]])
    counted = {True: ratings != 3, False: np.isin(np.arange(len(ratings)), honest.train)}
    for leak, protocol in ((True, leaky), (False, honest)):
        mean = ratings[counted[leak] & (dataset.log.user == user)].mean() - ratings[counted[leak]].mean()
        assert protocol.dataset.user_floats[user, 0] == pytest.approx(mean, abs=1e-6)
    assert not np.allclose(leaky.dataset.user_floats, honest.dataset.user_floats)
    moved = dataclasses.replace(dataset.log, action=dataset.log.action.copy())
    moved.action[honest.test] = 10  # other test ratings change the leaky features alone
    other = dataclasses.replace(dataset, log=moved)
    assert np.array_equal(inttower.prepare(other, leak=False).dataset.user_floats, honest.dataset.user_floats)
    assert not np.array_equal(inttower.prepare(other, leak=True).dataset.user_floats, leaky.dataset.user_floats)


def test_rested_requests_are_for_a_category_that_was_not_met_lately():
    world = synthetic_world(0, users=1, items=6, topics=3, categories=3, interests=2, favourites=2, events_per_user=80)
    category, log = world.dataset.catalogue.ids["category"], world.dataset.log
    positions = np.arange(20, 80)
    found = evaluation.rested(world.dataset, positions, events=6)
    for at, rests in zip(positions, found, strict=True):
        past = category[log.item[log.time < log.time[at]]]
        wanted = category[log.item[at]]
        assert rests == (wanted in past and wanted not in past[-6:])
    assert found.any() and not found.all()
