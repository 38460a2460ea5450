"""The study's protocol: met items, records with figures by user, paired comparisons."""

import numpy as np
import pytest

from aif_jax.blocks import MatchingStatistics
from aif_jax.data.sampling import Seen
from experiments.study import datasets, question, records

pytestmark = pytest.mark.usefixtures("light_compilation")


@pytest.fixture(scope="module")
def smoke():
    return datasets.load("smoke")


def test_smoke(tmp_path, capsys):
    """Trains, evaluates and compares three models of the smoke world; a run that has a record is not run again."""
    results = tmp_path / "results"
    arguments = ["--plan", "smoke", "--results", str(results), "--work", str(tmp_path / "work"), "--quiet"]
    question.main(arguments)
    assert capsys.readouterr().out.count("GAUC") == 3
    question.main(arguments)
    assert "GAUC" not in capsys.readouterr().out
    question.main([*arguments, "--report"])
    told = capsys.readouterr().out
    assert f"against {question.BASE}" in told and f"against {question.WITH_MATCHING}" in told
    for record in records.read(results).values():
        mine = question.by_user(results, record, "gauc")
        assert abs(mine.mean - record["figures"]["gauc"]) < 1e-5 and len(mine.users) == record["users"]


def test_every_model_has_the_same_sizes_and_the_fields_of_the_data(smoke):
    configs = {name: question.config_of(question.Trial(dataset="smoke", model=name), smoke) for name in question.MODELS}
    assert len({(config.width, config.towers, config.short_length) for config in configs.values()}) == 1
    fields = smoke.dataset.schema.behaviour_fields
    assert MatchingStatistics(fields) in configs[question.AIF].blocks


def test_requests_hold_met_items_and_plans_name_each_run_once(smoke):
    trial = question.Trial(dataset="smoke", model=question.BASE)
    requests = question.requests_of(trial, smoke)  # as for evaluation: met items are among them and are masked there
    sample = np.arange(len(requests.rows))[:, None]
    assert Seen.before(smoke.dataset.log, requests.positions).contains(sample, requests.rows)[:, 1:].any()
    plans = [trial for name in ("validation", "tuning", "test") for trial in question.plan(name)]
    assert len({trial.id for trial in plans}) == len(plans) and {trial.dataset for trial in plans} == {"movielens", "taobao"}
    with pytest.raises(ValueError, match="plan: expected 'validation'"):
        question.plan("all")
