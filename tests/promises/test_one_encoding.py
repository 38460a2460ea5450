"""Promise: what one encoder made never meets a model of another one; every door compares, and says how to go on."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import export, train
from aif_jax.checks import EncodingMismatch
from aif_jax.data.candidates import sampled_negatives
from aif_jax.data.negatives import NegativeSampler, counts_before
from aif_jax.data.pipeline import Pipeline
from aif_jax.index import ItemIndex
from aif_jax.train.evaluate import catalogue_scores, item_rows
from tests import demo

ITEMS, QUIET = 30, {"progress": False}


def read(first: int) -> aif.data.Dataset:
    """The same events of items with other ids: as many rows of everything, and another meaning of each."""
    rng = np.random.default_rng(0)
    ids = first + 7 * np.arange(ITEMS)
    events = {"user": rng.integers(1, 9, 300), "item": rng.choice(ids, 300), "time": 1_600_000_000 + np.arange(300)}
    return aif.read(events, items={"item": ids, "category": ids % 5}, columns=aif.Columns())


@pytest.fixture(scope="module")
def data():
    return read(100)


@pytest.fixture(scope="module")
def other():
    return read(9000)


@pytest.fixture(scope="module")
def model(data):
    return aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False, short_length=4))


@pytest.fixture(scope="module")
def run(data, model, tmp_path_factory):
    return demo.fit(model, data, out=tmp_path_factory.mktemp("encoding") / "run", epochs=1, batch_size=32, k=None, **QUIET)


def positions(data) -> np.ndarray:
    return np.arange(270, 290)


def scores(model, run, other):
    return next(catalogue_scores(model, run.params, other, positions(other), **QUIET))


def raw(data) -> dict[str, list[int]]:
    return {"item": data.items.raw[:2].tolist(), "category": [1, 2]}


def pipeline(model, data) -> Pipeline:
    source = sampled_negatives(data, sampler=NegativeSampler(counts_before(data, 2**40)), negatives=3)
    return Pipeline(dataset=data, positions=positions(data), candidates=source, config=model.config, batch_size=4)


async def engine(run, index):
    async with aif.AsyncPreRanker(aif.Trained(run.model, run.params), index, features=lambda request: None):
        pass


def of_another_encoder(run, other) -> ItemIndex:
    """An index by a model that knows of no encoder."""
    model = aif.build(run.config.with_encoding(""))
    return ItemIndex.build(aif.Trained(model, run.params, other.encoder), other.catalogue, **QUIET)


DOORS = {
    "Run.index": lambda run, model, other, at: run.index(other.catalogue, **QUIET),
    "ItemIndex.build": lambda run, model, other, at: ItemIndex.build(
        aif.Trained(run.model, run.params), other.catalogue, **QUIET
    ),
    "ItemIndex.build encoder": lambda run, model, other, at: ItemIndex.build(
        aif.Trained(run.model, run.params, other.encoder), other.catalogue, **QUIET
    ),
    "ItemIndex.build features": lambda run, model, other, at: ItemIndex.build(
        aif.Trained(run.model, run.params), [([1, 2], other.encoder.items(raw(other))[1])], **QUIET
    ),
    "ItemIndex.upsert": lambda run, model, other, at: run.index(read(100).catalogue, **QUIET).upsert(
        *other.encoder.items(raw(other))
    ),
    "ItemIndex.load": lambda run, model, other, at: (
        of_another_encoder(run, other).save(at / "index"),
        ItemIndex.load(at / "index", aif.Trained(run.model, run.params)),
    ),
    "AsyncPreRanker": lambda run, model, other, at: asyncio.run(engine(run, of_another_encoder(run, other))),
    "Run.evaluate": lambda run, model, other, at: run.evaluate(other, **QUIET),
    "Run.calibrate": lambda run, model, other, at: run.calibrate(other, **QUIET),
    "Run.with_svd": lambda run, model, other, at: run.with_svd(other),
    "Run.with_popularity_correction": lambda run, model, other, at: run.with_popularity_correction(other),
    "train.evaluate": lambda run, model, other, at: train.evaluate(run.model, run.params, other, positions(other), **QUIET),
    "train.evaluate, as before fit": lambda run, model, other, at: train.evaluate(
        model, run.params, other, positions(other), **QUIET
    ),
    "train.evaluate, loaded": lambda run, model, other, at: train.evaluate(
        aif.Run.load(run.folder).model, run.params, other, positions(other), **QUIET
    ),
    "train.evaluate, a checkpoint's": lambda run, model, other, at: (
        run.save(at / "saved"),
        train.evaluate(aif.build(aif.checkpoint.load(at / "saved").config), run.params, other, positions(other), **QUIET),
    ),
    "scores of the catalogue": lambda run, model, other, at: scores(run.model, run, other),
    "rows of the catalogue": lambda run, model, other, at: item_rows(run.model, run.params, other.catalogue, **QUIET),
    "init": lambda run, model, other, at: model.init(jax.random.key(0), other.catalogue),
    "fit_tables": lambda run, model, other, at: aif.fit_tables(run.config, other.catalogue),
    "fit": lambda run, model, other, at: demo.fit(model, other, out=at / "fit", epochs=1, batch_size=32, **QUIET),
    "Pipeline": lambda run, model, other, at: pipeline(model, other),
    "export.save": lambda run, model, other, at: export.save(at / "out", aif.Trained(run.model, run.params, other.encoder)),
    "checkpoint.save": lambda run, model, other, at: aif.checkpoint.save(
        at / "out", aif.Trained(run.model, run.params, other.encoder)
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_what_another_encoder_made(door, run, model, other, tmp_path):
    with pytest.raises(EncodingMismatch) as caught:
        DOORS[door](run, model, other, tmp_path)
    assert (caught.value.expected, caught.value.got) == (run.encoder.version, other.encoder.version)
    assert "read with aif.read(..., encoder=run.encoder)" in str(caught.value)
    assert not {"fit", "out"} & {path.name for path in tmp_path.iterdir()}


def test_newer_data_read_with_the_encoder_are_taken(run, data):
    rows = np.arange(len(data.log))[: len(data.log) // 2]
    users, items = data.users.raw[data.log.user[rows] - 1], data.items.raw[data.log.item[rows] - 1]
    events = {"user": users, "item": items, "time": data.log.time[rows]}
    items = {"item": data.items.raw, "category": data.items.raw % 5}
    newer = aif.read(events, items=items, columns=aif.Columns(), encoder=run.encoder)
    assert newer.encoding == newer.catalogue.encoding == newer.schema.encoding == run.encoder.version
    assert len(run.index(newer.catalogue, **QUIET)) == ITEMS
    assert train.evaluate(run.model, run.params, newer, np.arange(100, 120), k=None, **QUIET).requests == 20


def test_data_without_an_encoder_have_nothing_to_compare(run, data, other):
    bare = dataclasses.replace(other.schema, encoding="")
    made = dataclasses.replace(other, encoder=None, schema=bare, catalogue=dataclasses.replace(other.catalogue, schema=bare))
    assert made.encoding == made.catalogue.encoding == ""
    assert made.user_features([200], length=4).encoding == ""
    assert len(run.index(made.catalogue, **QUIET)) == ITEMS
    assert train.evaluate(run.model, run.params, made, positions(made), k=None, **QUIET).requests == 20


def test_what_an_encoder_made_stays_its_own(data, other):
    """Without the encoder, in a copy, under another schema's name."""
    assert dataclasses.replace(data, encoder=None).encoding == data.encoder.version
    with pytest.raises(EncodingMismatch, match="Dataset.catalogue: expected the encoding"):
        dataclasses.replace(data, catalogue=dataclasses.replace(data.catalogue, schema=other.schema))
    assert data.schema == other.schema and data.encoding != other.encoding
    assert "encoding" not in data.schema.to_json()
    with pytest.raises(ValueError, match="schema: expected a record that `to_json` made, got one with an encoding"):
        aif.Schema.from_json(data.schema.to_json() | {"encoding": "x"})


def test_a_calibration_whose_result_is_thrown_away_changes_nothing(run, data):
    def folder():
        return {path: path.read_bytes() for path in sorted(run.folder.rglob("*")) if path.is_file()}

    before, loaded = folder(), aif.Run.load(run.folder)
    calibrated = run.calibrate(data, **QUIET)
    assert "calibration" in calibrated.params["fitted"]
    assert folder() == before
    jax.tree.map(np.testing.assert_array_equal, aif.Run.load(run.folder).params, loaded.params)
