"""The study: its protocol, met items, records with figures by user, paired comparisons, recipe, command."""

import dataclasses
import json

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.blocks import MatchingStatistics
from aif_jax.data import split_by_time
from aif_jax.data.negatives import SeenPairs, item_counts
from aif_jax.metrics import ByUser
from experiments.peers.judge import Lists
from experiments.study import datasets, question, records, rules
from tests.refusals import refused

pytestmark = [pytest.mark.lane("experiments"), pytest.mark.usefixtures("programs_stay")]


@pytest.fixture(scope="module")
def smoke():
    return datasets.load("smoke")


def test_smoke(tmp_path, capsys):
    """Trains, evaluates and compares models of the smoke world, one of them by blocks; a run with a record is not run again."""
    results = tmp_path / "results"
    arguments = ["--smoke", "--results", str(results), "--work", str(tmp_path / "work"), "--quiet"]
    question.main(arguments)
    assert capsys.readouterr().out.count("gauc_trained") == 4
    question.main(arguments)
    assert "gauc_trained" not in capsys.readouterr().out
    told = question.report(results)
    assert f"against {question.BASE}" in told and f"against {question.WITH_MATCHING}" in told
    for record in records.read(results).values():
        mine = records.by_user(results, record, "gauc")
        assert abs(mine.mean - record["figures"]["gauc"]) < 1e-5 and len(mine.users) == record["users"]
        assert (np.diff(mine.users) > 0).all()  # each user once, in whatever block
    (rolled,) = [record for record in records.read(results).values() if record["split"] == "rolling"]
    trained = [block["trained"] for block in rolled["blocks"]]
    assert trained == sorted(trained) and sum(block["users"] for block in rolled["blocks"]) == rolled["users"]
    assert len(list((tmp_path / "work").glob("*rolling*from_*"))) == len(trained)


def test_the_models_of_the_results_are_trained_as_fit_trains_by_default():
    usual = aif.FitConfig()
    assert (usual.epochs, usual.learning_rate) == (question.EPOCHS, question.Trial.learning_rate)


def met_once(data: datasets.StudyData, name: str) -> datasets.StudyData:
    """Each user's first event with an item alone, so that nobody comes back."""
    log, users = data.dataset.log, len(data.dataset.users)
    first = np.sort(np.unique(log.user.astype(np.int64) * len(data.dataset.items) + log.item, return_index=True)[1])
    kept = aif.EventLog(*(column[first] for column in (log.user, log.item, log.action, log.time)), users=users)
    dataset = dataclasses.replace(data.dataset, log=kept, repeats=None)
    return datasets.StudyData(name=name, dataset=dataset, split=split_by_time(kept), sim_fields=data.sim_fields)


def test_data_without_repeats_are_judged_without_met_items(smoke, tmp_path):
    data = met_once(smoke, "smoke")
    pairs = np.stack([data.dataset.log.user, data.dataset.log.item], 1)
    assert len(np.unique(pairs, axis=0)) == len(pairs) < len(smoke.dataset.log)
    assert smoke.repeats and not data.repeats
    trial = question.Trial(dataset="smoke", model=question.BASE)
    record = question.run(trial, data, results=tmp_path / "results", work=tmp_path / "work")
    assert record["figures"]["gauc"] == record["figures"]["gauc_unmet"] != record["figures"]["gauc_all"]


def test_every_model_has_the_same_sizes_and_the_fields_of_the_data(smoke):
    configs = {name: question.config_of(question.Trial(dataset="smoke", model=name), smoke) for name in question.MODELS}
    assert len({(config.width, config.towers, config.short_length) for config in configs.values()}) == 1
    assert MatchingStatistics(smoke.dataset.schema.behaviour_fields) in configs[question.AIF].blocks


def test_presets_are_models_of_the_study(smoke):
    """README's figures are of `presets.aif`: it is a model of the study, and so are the baselines and the ceiling."""
    schema, named = smoke.dataset.schema, aif.presets
    presets = {
        question.BASE: named.two_tower, question.WITH_MATCHING: named.two_tower_matching, question.AIF: named.aif,
        question.FULL: named.full_attention,
    }  # fmt: skip
    for name, preset in presets.items():
        config = question.config_of(question.Trial(dataset="movielens", model=name), smoke)
        assert config == preset(schema, long_length=config.long_length)
        assert config.long_length == aif.presets.LONG_LENGTH or name == question.BASE


def test_keys_are_of_the_test_split_with_intervals_over_users(tmp_path):
    """By hand: three users of one request each; the preset ranks all right, two-tower none, matching two of them."""
    rng = np.random.default_rng(0)
    for model, gauc, hits in (
        (question.AIF, 0.9, [1, 1, 1]),
        (question.BASE, 0.8, [0, 0, 1]),
        (question.WITH_MATCHING, 0.85, [1, 1, 0]),
    ):
        for split in ("validation", "test"):
            trial = question.Trial(dataset="movielens", model=model, split=split, epochs=question.EPOCHS)
            metric = ByUser(np.arange(3), gauc + 0.01 * np.arange(3), np.ones(3))
            rate = ByUser(np.arange(3), np.array(hits, float), np.ones(3))
            parts = {"gauc": metric} | {f"hr100@{untrained:g}": rate for untrained in question.UNTRAINED}
            if split == "test":
                parts["hr100@3"] = ByUser(np.arange(3), np.full(3, 0.5), np.ones(3))
            question.keep(tmp_path, trial, parts, met_items=0.1, extra=rng.random())
    made = question.keys(tmp_path)["movielens"]
    assert made["gauc_points"] == pytest.approx(10) and made["gauc_points_low"] == pytest.approx(10)
    assert made["hr100_ratio"] == pytest.approx(3) and made["hr100_ratio_over_matching"] == pytest.approx(1.5)
    assert made["gauc_points_over_matching_high"] == pytest.approx(5) and made["met_items"] == 0.1
    later = question.Trial(dataset="movielens", model=question.BASE, epochs=question.EPOCHS + 1)  # another best offset
    best = {f"hr100@{untrained:g}": ByUser(np.arange(3), np.full(3, float(untrained == 3)), np.ones(3)) for untrained in (0, 3)}
    question.keep(tmp_path, later, parts | best, met_items=0.1)
    assert question.keys(tmp_path)["movielens"] == made
    assert question.chosen(records.read(tmp_path), records.read(tmp_path)[later.id]) == 3
    assert question.keys(tmp_path / "none") == {}


def test_times_smoke(tmp_path):
    question.main(["--smoke", "--times", "--results", str(tmp_path), "--work", str(tmp_path / "work")])
    times = question.read_times(tmp_path)
    assert f"{question.AIF}, C=64, L=32" in times and all(one["score"]["p50"] > 0 for one in times.values())


def test_requests_hold_met_items_and_plans_name_each_run_once(smoke):
    trial = question.Trial(dataset="smoke", model=question.BASE)
    (part,) = question.parts_of(trial, smoke)
    requests = question.requests_of(trial, part, smoke)  # as for evaluation: met items are among them and are masked there
    sample = np.arange(len(requests.rows))[:, None]
    assert SeenPairs(smoke.dataset, requests.positions).contains(sample, requests.rows)[:, 1:].any()
    plans = [trial for name, trials in question.PLANS.items() if name != "smoke" for trial in trials]
    assert len({trial.id for trial in plans}) == len(plans)
    assert {trial.dataset for trial in plans} == {"movielens", "taobao"}


def test_blocks_train_on_the_past_alone_and_judge_each_user_once():
    rng, user = np.random.default_rng(0), np.repeat(np.arange(1, 41), 30)
    time = rng.integers(0, 1000, 40)[user - 1] + rng.integers(0, 300, len(user))  # of each user a while of their own
    log = aif.EventLog(user, rng.integers(1, 9, len(user)), np.ones(len(user), int), time)
    parts = question.rolling(log, blocks=(0.4, 0.7), last=5)
    assert [part.name for part in parts] == ["from 0.4", "from 0.7"]
    judged = [set(log.user[part.held].tolist()) for part in parts]
    assert not judged[0] & judged[1] and len(parts[0].seen) < len(parts[1].seen)
    final = log.time[log.offsets[1:] - 1]
    wanted = {int(row) for row in np.flatnonzero(final >= [log.time[part.seen].max() + 1 for part in parts][0]) if row}
    assert set.union(*judged) == wanted  # everybody who is active after the first cut
    for part in parts:
        assert log.time[part.seen].max() < log.time[part.held].min()
        assert np.array_equal(part.seen, np.flatnonzero(log.time <= log.time[part.seen].max()))  # all users' past, all of it
        assert np.bincount(log.user[part.held]).max() <= 5
        assert (log.offsets[log.user[part.held] + 1] - part.held <= 5).all()
    assert (final[sorted(judged[0])] < log.time[parts[1].seen].max() + 1).all()  # their very last event is in their block


def test_rules_by_hand():
    """The latest met item first, then the others by their training events."""
    count, item = np.array([0, 0, 7, 2, 1, 1, 0]), np.array([4, 5, 6])
    lists = Lists(repeats=True, count=count, events={}, item=item, start=np.array([0, 0]), end=np.array([3, 2]))
    orders = [np.argsort(-rules.scorer(rule, lists)(np.array([1]))[0, 2:], kind="stable") + 2 for rule in rules.RULES]
    assert [order.tolist() for order in orders] == [[2, 3, 4, 5, 6], [5, 4, 2, 3, 6], [5, 4, 6, 3, 2]]


def test_rules_are_judged_like_models(smoke, tmp_path):
    rules.main(["--smoke", "--results", str(tmp_path)])
    made = records.read(tmp_path)
    assert {record["model"] for record in made.values()} == set(rules.RULES)
    trial = question.Trial(dataset="smoke", model="rule, most popular first", split="test", epochs=0)
    (part,) = question.parts_of(trial, smoke)
    requests = question.requests_of(trial, part, smoke)
    counts = item_counts(smoke.dataset, part.seen)
    found = records.by_user(tmp_path, made[trial.id], "gauc_all")
    scores = counts[requests.rows[smoke.dataset.log.user[requests.positions] == found.users[0]]]
    positive, negative = scores[:, :1], scores[:, 1:].ravel()
    expected = (positive > negative).mean() + 0.5 * (positive == negative).mean()
    assert found.values[0] == pytest.approx(expected) and 0 < expected < 1


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
