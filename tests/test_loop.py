"""The loop: what goes wrong is stopped or skipped as stated, counted, and named; logs and checkpoints come when they should,
and no step is logged twice.
"""

import dataclasses
import itertools
import json
import logging
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import blocks, train
from aif_jax.data.candidates import impressions, sampled_negatives
from aif_jax.data.negatives import NegativeSampler, item_counts
from aif_jax.data.pipeline import Pipeline, to_device
from aif_jax.train import losses
from aif_jax.train.loop import JsonLines, Saving
from tests import demo
from tests.demo import same
from tests.refusals import refused

OPTIMIZER = optax.adam(0.1)
loop_module = sys.modules["aif_jax.train.loop"]  # `train.loop` is the function


@pytest.fixture(scope="module")
def feed(data) -> Pipeline:
    config = demo.config(schema=data.schema, blocks=(blocks.Bea(bridges=2),), sequence=False)
    source = impressions(data, candidates=1, threshold=2)
    return Pipeline(dataset=data, positions=range(600), source=source, config=config, batch_size=50, epochs=2)


def fresh() -> train.TrainState:
    return train.init_state({"user": {"w": jnp.zeros(3)}, "fitted": {"h": jnp.arange(2.0)}}, OPTIMIZER)


def joint(params, user, items):
    """Three weights, so that a step compiles at once."""
    item, w = jnp.asarray(items.ids["item"], jnp.float32), params["user"]["w"]
    return w[0] + w[1] * item / 60 + w[2] * jnp.asarray(user.history.mask, jnp.float32).mean()


model = aif.build(demo.config(blocks=()))._replace(joint=joint)
step = train.make_step(model, OPTIMIZER, loss=losses.pointwise_bce, sparse=())


def with_problems(feed, problems: dict[int, str], stop: int | None = None):
    """The feed with some batches replaced: by an empty one ("empty"), or by one with a NaN that no check saw ("nan")."""
    for number, fed in enumerate(itertools.islice(feed.batches(), stop)):
        what = problems.get(number)
        if what == "nan":
            yield dataclasses.replace(fed, batch=dataclasses.replace(fed.batch, labels=np.full_like(fed.batch.labels, np.nan)))
        else:
            yield dataclasses.replace(fed, batch=None) if what == "empty" else fed


def run(batches, **given):
    rows = []
    given = {"progress": False, "log_every": 1, "on_log": lambda at, values: rows.append((at, values)), **given}
    return train.loop(given.pop("state", None) or fresh(), given.pop("step", step), batches, **given), rows


def without(feed, *numbers: int) -> train.TrainState:
    """The state after all batches but some."""
    state = fresh()
    for number, fed in enumerate(feed.batches()):
        state = state if number in numbers else step(state, fed.batch)[0]
    return state


@pytest.fixture
def spend(monkeypatch):
    """`spend(seconds, value)` gives the value and moves the loop's clock, which nothing else moves."""
    now = [0.0]
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: now[0])

    def spend(seconds, value):
        now[0] += seconds
        return value

    return spend


def test_a_log_entry_has_loss_rate_and_input_share(feed):
    state, rows = run(feed.batches(), log_every=5)
    assert [at for at, _ in rows] == [5, 10, 15, 20, 24] and int(state.step) == 24
    plain = list(feed.batches())
    for _, values in rows:
        assert values["examples_per_s"] > 0 and 0 < values["input_share"] <= 1
        assert values["skipped"] == values["empty_batches"] == 0
    one = fresh()
    for fed in plain[:5]:
        one, metrics = step(one, fed.batch)
    assert rows[0][1]["loss"] == float(metrics["loss"]) and rows[0][1]["grad_norm"] == float(metrics["grad_norm"])


def test_a_slow_input_shows_in_the_input_share(feed, spend):
    _, rows = run((spend(3.0, fed) for fed in feed.batches()), log_every=8, step=lambda *given: spend(1.0, step(*given)))
    assert rows[1][1]["input_share"] == pytest.approx(0.75) and rows[1][1]["examples_per_s"] == pytest.approx(50 / 4)


def test_a_step_that_is_not_finite_is_counted_and_its_samples_are_named(feed, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.WARNING, "aif_jax.train.loop")
    state, rows = run(with_problems(feed, {3: "nan", 14: "nan"}), log_every=10)
    assert int(state.skipped) == 2 and int(state.step) == 24 and rows[-1][1]["skipped"] == 2
    plain = list(feed.batches())
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("step 4 changed nothing: loss nan, gradient norm nan (batch 3 of epoch 0; samples at")
    assert f"positions {plain[3].positions[0]}, {plain[3].positions[1]}, " in caplog.messages[0]
    assert "step 15 changed nothing" in caplog.messages[1] and "batch 2 of epoch 1" in caplog.messages[1]
    assert same(without(feed, 3, 14).trained, state.trained)
    with pytest.raises(FloatingPointError, match=r"2 of 15 steps had a loss or gradient that was not finite \(allowed: 1\)"):
        monkeypatch.setattr(loop_module, "MOST_SKIPPED", 1)
        saving = Saving(aif.Checkpoints(tmp_path), feed.config, every=15, evaluate=lambda state: pytest.fail("evaluated first"))
        run(with_problems(feed, {3: "nan", 14: "nan"}), save=saving)


def test_a_step_corrects_a_sampled_softmax(feed):
    config = feed.config
    sampler = NegativeSampler(item_counts(feed.dataset, feed.positions))
    source = sampled_negatives(feed.dataset, sampler=sampler, negatives=3, logq_correction=True)
    lists, model = dataclasses.replace(feed, source=source), aif.build(config)
    params = demo.init(model, items=feed.dataset.catalogue)
    real = train.make_step(model, OPTIMIZER, loss=losses.listwise_softmax)
    state, rows = run(itertools.islice(lists.batches(), 1), state=train.init_state(params, OPTIMIZER), step=real)
    assert not same(state.params, params)
    batch = next(lists.batches()).batch
    scores = jax.jit(lambda params, batch: train.score(model, params, batch))(params, batch)
    plain = losses.listwise_softmax(scores, batch.labels, where=batch.where)
    corrected = losses.listwise_softmax(scores, batch.labels, where=batch.where, log_q=batch.log_q)
    assert rows[0][1]["loss"] == pytest.approx(float(corrected), rel=1e-5) != pytest.approx(float(plain), rel=1e-3)


def test_a_batch_without_candidates_is_skipped(feed, caplog):
    caplog.set_level(logging.WARNING, "aif_jax.train.loop")
    state, rows = run(with_problems(feed, {3: "empty", 4: "empty"}), log_every=50)
    assert int(state.step) == 22 and [at for at, _ in rows] == [22]
    assert rows[-1][1]["empty_batches"] == 2
    assert len(caplog.messages) == 2 and "skipped" in caplog.messages[0]
    assert "after step 3" in caplog.messages[0] and "batch 3 of epoch 0; samples at positions" in caplog.messages[0]
    assert same(without(feed, 3, 4), state)


def test_wrong_policies_are_refused(feed, tmp_path):
    refused(ValueError, "loop log_every: expected at least 1, got 0", run, feed.batches(), log_every=0)
    refused(ValueError, "Saving.every: expected at least 1, got 0", Saving, aif.Checkpoints(tmp_path), feed.config, every=0)


def test_checkpoints_come_every_n_steps_and_at_the_end_and_are_resumed(feed, tmp_path):
    whole, _ = run(feed.batches())
    with aif.Checkpoints(tmp_path / "a", keep_last=9) as checkpoints:
        run(feed.batches(), save=Saving(checkpoints, feed.config, every=10))
        assert checkpoints.steps == [10, 20, 24]
        assert checkpoints.restore(10).position == list(feed.batches())[9].cursor
        state, cursor = train.resume(fresh(), checkpoints, config=feed.config)
        assert same(state, whole) and list(feed.batches(cursor)) == []

    def dies():
        for number, fed in enumerate(feed.batches()):
            if number == 17:
                raise KeyboardInterrupt
            yield fed

    with aif.Checkpoints(tmp_path / "b") as checkpoints:
        state, cursor = train.resume(fresh(), checkpoints, config=feed.config)
        assert same(state, fresh()) and cursor is None
        refused(KeyboardInterrupt, "", run, dies(), save=Saving(checkpoints, feed.config, every=7))
        assert checkpoints.steps == [7, 14]
        state, cursor = train.resume(fresh(), checkpoints, config=feed.config)
        assert int(state.step) == 14
        resumed, rows = run(feed.batches(cursor), state=state, save=Saving(checkpoints, feed.config, every=7), log_every=5)
        assert same(resumed, whole)
        assert [at for at, _ in rows] == [15, 20, 21, 24] and checkpoints.steps == [14, 21, 24]  # as if it had not died


def test_batches_made_ahead_are_not_in_the_cursor(feed, tmp_path):
    with aif.Checkpoints(tmp_path) as checkpoints, to_device(feed.batches()) as batches:
        run((fed for fed, _ in zip(batches, range(8), strict=False)), save=Saving(checkpoints, feed.config))
        assert checkpoints.restore().position == list(feed.batches())[7].cursor


def test_figures_go_to_logs_and_choose_the_best_checkpoint(feed, tmp_path):
    figures, log = iter([0.5, 0.7, 0.6]), JsonLines(tmp_path / "log.jsonl")
    with aif.Checkpoints(tmp_path / "run", keep_last=1, keep_best=("gauc", "max")) as checkpoints:
        saving = Saving(checkpoints, feed.config, every=10, evaluate=lambda state: {"gauc": next(figures)})
        run(feed.batches(), save=saving, log_every=6, log=log)
        assert (checkpoints.steps, checkpoints.best) == ([20, 24], 20)
    logged = [(row["step"], row.get("gauc")) for row in log.rows()]
    assert logged == [(6, None), (10, 0.5), (12, None), (18, None), (20, 0.7), (24, 0.6)]


def test_figures_of_the_last_evaluation_are_in_the_log_where_the_last_batch_is_skipped(feed, tmp_path):
    """Figures of any float type: a NumPy or JAX scalar ends no run."""
    with aif.Checkpoints(tmp_path) as checkpoints:
        figures = {"gauc": np.float32(0.5), "auc": jnp.float32(0.25)}
        saving = Saving(checkpoints, feed.config, every=100, evaluate=lambda state: figures)
        _, rows = run(with_problems(feed, {6: "empty"}, 7), save=saving, log_every=6)
        assert [(at, values.get("gauc"), values.get("auc")) for at, values in rows] == [(6, 0.5, 0.25)]
        assert checkpoints.steps == [6] and checkpoints.restore().metrics == {"gauc": 0.5, "auc": 0.25}


def test_an_evaluation_is_no_training_time_in_the_rates(feed, tmp_path, spend):
    with aif.Checkpoints(tmp_path) as checkpoints:
        evaluate = lambda state: spend(100.0, {"gauc": 0.5})  # noqa: E731
        given = dict(save=Saving(checkpoints, feed.config, every=4, evaluate=evaluate), log_every=50)
        _, rows = run(itertools.islice(feed.batches(), 8), step=lambda *given: spend(1.0, step(*given)), **given)
    assert [values["examples_per_s"] for _, values in rows] == pytest.approx([50, 50])


def test_json_lines_by_hand(tmp_path):
    log = JsonLines(tmp_path / "new" / "log.jsonl")
    log.rewind(0)
    assert log.rows() == [] and not (tmp_path / "new").exists()  # nothing was written
    log.write(5, {"loss": 0.1, "skipped": 0})
    log.write(10, {"loss": float("nan")})
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert rows == [{"step": 5, "loss": 0.1, "skipped": 0.0}, {"step": 10, "loss": None}]


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    log = JsonLines(tmp_path / "log")
    for step in (10, 20, 30):
        log.write(step, {"loss": 1 / step})
    whole = log.path.read_text()
    log.rewind(20)
    assert [row["step"] for row in log.rows()] == [10, 20]
    log.write(30, {"loss": 1 / 30})
    assert log.path.read_text() == whole
    log.rewind(0)
    log.write(10, {"accuracy": 0.5})
    assert [row["step"] for row in log.rows()] == [10]


def test_a_resumed_run_has_its_first_loss_and_its_totals_from_its_log(feed, tmp_path):
    log = JsonLines(tmp_path / "log")

    def large(state, batch):
        return dataclasses.replace(state, step=state.step + 1), {"loss": np.float32(150), "grad_norm": np.float32(1)}

    log.write(0, {"loss": 2.0, "empty_batches": 2})
    run(with_problems(feed, {0: "empty"}, 2), step=large, log=log)
    assert log.rows()[-1]["empty_batches"] == 3
    log.rewind(-1)
    log.write(0, {"accuracy": 1.0})
    refused(ValueError, "log: expected rows that `loop` wrote, got step, accuracy;", run, feed.batches(), log=log)
    log.rewind(-1)
    log.write(0, {"loss": 1.0, "empty_batches": 2})
    refused(FloatingPointError, "was 1 at first, 150 up to step 1", run, with_problems(feed, {}, 1), step=large, log=log)


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    refused(ValueError, "log.jsonl, line 2: expected JSON, got 'not json", log.rows)


@pytest.mark.parametrize("tail", [b'{"step": 30, "lo', b"\0" * 64, b'{"step": 30, "name": "\xc3'])
def test_a_cut_line_is_left_out_and_reported(tmp_path, caplog, tail):
    log = JsonLines(tmp_path / "log")
    log.write(10, {"loss": 1.0})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + tail)
    assert [row["step"] for row in log.rows()] == [10]
    assert "log, line 2: left out, it is cut: b'" in caplog.text
    log.rewind(10)
    assert log.path.read_bytes() == whole


def test_a_row_is_on_disk_when_it_is_written(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def sync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    log = JsonLines(tmp_path / "log")
    log.write(1, {})
    log.write(2, {})
    assert synced == [str(log.path), str(tmp_path), str(log.path)]
