"""`fit(buckets=None)`: which lengths it chooses, what it records and says, and how a run goes on."""

import dataclasses
import itertools

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.checkpoint import settings_of
from aif_jax.data import lengths
from aif_jax.data.pipeline import Pipeline
from aif_jax.train import training
from aif_jax.train.tasks import NextItem
from tests import demo
from tests.demo import fit
from tests.refusals import refused

GIVEN = dict(epochs=1, batch_size=64, task=NextItem(negatives=3, evaluated=20), requests=40, k=10)
LIKE_ML_100K = np.repeat([11, 28, 71, 120, 180, 231, 451, 512], [10, 20, 25, 16, 12, 8, 8, 1])


def test_few_steps_take_two_lengths_and_many_take_more():
    def chosen(histories, longest, steps):
        return lengths.choose_lengths(histories, longest=longest, batch_size=256, steps=steps)

    like = LIKE_ML_100K.repeat(4)
    assert chosen(like, 512, 918) == (128,) and chosen(like, 512, 30_000) == (128, 256)
    long = np.random.default_rng(0).exponential(600, 20_000).clip(1, 4096).astype(int)
    assert len(chosen(long, 4096, 2_999)) == 1 < len(chosen(long, 4096, 3_000))
    assert len(chosen(long, 4096, 10**6)) == lengths.MOST_LENGTHS - 1


@pytest.mark.parametrize("histories, longest, steps", [
    (LIKE_ML_100K.clip(max=128), 128, 10**6),  # nothing below the shortest length
    (LIKE_ML_100K, 512, 40),  # fewer steps than the compilation is worth
    (np.full(9, 512), 512, 10**6),  # no shorter history
    (np.zeros(0, int), 512, 10**6),
])  # fmt: skip
def test_one_length_is_enough(histories, longest, steps):
    assert lengths.choose_lengths(histories, longest=longest, batch_size=256, steps=steps) == ()


def test_the_choice_is_the_cheapest_of_all_subsets():
    rng = np.random.default_rng(1)
    for steps in (3_000, 20_000, 10**6):
        histories = rng.lognormal(4.5, 1.2, 3000).clip(0, 1024).astype(int)

        def cost(subset, histories=histories, steps=steps):
            taken = [min(length for length in (*subset, 1024) if length >= history) for history in histories]
            return steps * 64 * np.mean(taken) + lengths.COMPILE * len(subset)

        subsets = [s for count in range(4) for s in itertools.combinations((128, 256, 512), count)]
        assert lengths.choose_lengths(histories, longest=1024, batch_size=64, steps=steps) == min(subsets, key=cost)


def test_histories_are_counted_as_the_pipeline_counts_them(data, model, monkeypatch):
    positions = GIVEN["task"].positions(data, min_history=0, since=None, before=None)
    expected = [min(data.log.history_end([at])[0] - data.log.offsets[data.log.user[at]], 7) for at in positions]
    assert lengths.sampled_lengths(data, positions, longest=7).tolist() == expected
    monkeypatch.setattr(lengths, "COUNTED_SAMPLES", 100)
    assert 100 <= len(lengths.sampled_lengths(data, range(len(data.log)), longest=7)) < 200


@pytest.fixture(scope="module")
def model(data):
    return aif.build(demo.config(schema=data.schema, **(demo.SMALL | {"long_length": 24})))


@pytest.fixture
def small_world(monkeypatch):
    """Lengths worth compiling for histories of a few events."""
    monkeypatch.setattr(lengths, "SHORTEST_LENGTH", 4)
    monkeypatch.setattr(lengths, "COMPILE", 10)
    monkeypatch.setattr(lengths, "FEW_STEPS", 10)


def test_the_chosen_lengths_are_recorded_and_a_run_goes_on_with_them(data, model, small_world, monkeypatch, tmp_path, capsys):
    run = fit(model, data, out=tmp_path / "auto", **GIVEN)
    said = capsys.readouterr().err
    assert run.settings.buckets and settings_of(tmp_path / "auto")["buckets"] == list(run.settings.buckets)
    assert f"lengths of the history {', '.join(map(str, (*run.settings.buckets, run.config.history_length)))}\n" in said
    # another version of the rule, or a run from before it
    monkeypatch.setattr(lengths, "choose_lengths", lambda *_, **__: (5,))
    again = fit(model, data, out=tmp_path / "auto", progress=False, **GIVEN)
    assert again.settings == run.settings and aif.Run.load(tmp_path / "auto").settings == run.settings
    refused(ValueError, "buckets", fit, model, data, out=tmp_path / "auto", buckets=(5,), progress=False, **GIVEN)


@pytest.mark.parametrize("buckets", [(), (2, 5)])
def test_lengths_that_are_given_stay(data, model, small_world, buckets, tmp_path):
    run = fit(model, data, out=tmp_path / "run", buckets=buckets, progress=False, **GIVEN)
    assert run.settings.buckets == buckets == tuple(settings_of(tmp_path / "run")["buckets"])
    assert fit(model, data, out=tmp_path / "run", progress=False, **GIVEN).settings.buckets == buckets


def test_the_plan_warns_of_a_catalogue_no_larger_than_k(data, model, small_world):
    run = fit(model, data, buckets=(), progress=False, **GIVEN)
    positions = run.settings.task.positions(data, min_history=1, **run.settings.span("train"))
    source = run.settings.task.source(data, before=run.settings.first_validation)
    feed = Pipeline(dataset=data, positions=positions, source=source, config=run.config, batch_size=8)
    lines = list(training.plan(feed, run.settings))
    assert len(lines) == 3 and lines[2].startswith("batches: ")
    *same, warning = training.plan(feed, dataclasses.replace(run.settings, k=90))
    assert same == lines and warning == "hr@90 is 1 for every model: the catalogue has 90 items; take a smaller k"
