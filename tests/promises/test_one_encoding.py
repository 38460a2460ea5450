"""Promise: what one encoder made never meets a model of another one; every door compares, and says how to go on."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import train
from aif_jax.data.candidates import sampled_negatives
from aif_jax.data.negatives import NegativeSampler, counts_before
from aif_jax.data.pipeline import Pipeline
from aif_jax.readers import encode_items
from aif_jax.train.evaluate import catalogue_scores, item_rows
from tests import demo
from tests.refusals import refused

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


def pipeline(model, data) -> Pipeline:
    source = sampled_negatives(data, sampler=NegativeSampler(counts_before(data, 2**40)), negatives=3)
    return Pipeline(dataset=data, positions=positions(data), source=source, config=model.config, batch_size=4)


async def engine(trained, index):
    async with aif.AsyncPreRanker(trained, index, features=lambda request: None):
        pass


class Met:
    """A model and its run, and data that another encoder made."""

    def __init__(self, run, model, other, at):
        self.run, self.model, self.other, self.at = run, model, other, at
        self.trained = aif.Trained(run.model, run.params)

    def items(self):
        return encode_items({"item": self.other.items.raw[:2].tolist(), "category": [1, 2]}, self.other.encoder)

    def index(self) -> aif.ItemIndex:
        """An index of the other data, by a model that knows of no encoder."""
        model = aif.build(self.run.config.with_encoding(""))
        return aif.ItemIndex.build(aif.Trained(model, self.run.params, self.other.encoder), self.other.catalogue, **QUIET)

    def evaluate(self, model=None):
        return train.evaluate(model or self.run.model, self.run.params, self.other, positions(self.other), **QUIET)

    def scores(self):
        return next(catalogue_scores(self.run.model, self.run.params, self.other, positions(self.other)))

    def of_a_checkpoint(self):
        self.run.save(self.at / "saved")
        return aif.build(aif.checkpoint.load(self.at / "saved").config)


DOORS = {
    "Trained": lambda m: aif.Trained(m.run.model, m.run.params, m.other.encoder),  # so none is built, saved or exported
    "Run.index": lambda m: m.run.index(m.other.catalogue, **QUIET),
    "ItemIndex.build": lambda m: aif.ItemIndex.build(m.trained, m.other.catalogue, **QUIET),
    "ItemIndex.build features": lambda m: aif.ItemIndex.build(m.trained, [([1, 2], m.items()[1])], **QUIET),
    "ItemIndex.upsert": lambda m: m.run.index(read(100).catalogue, **QUIET).upsert(*m.items()),
    "Run.evaluate": lambda m: m.run.evaluate(m.other, **QUIET),
    "Run.calibrate": lambda m: m.run.calibrate(m.other, **QUIET),
    "Run.with_svd": lambda m: m.run.with_svd(m.other),
    "Run.with_popularity_correction": lambda m: m.run.with_popularity_correction(m.other),
    "train.evaluate": lambda m: m.evaluate(),
    "train.evaluate, as before fit": lambda m: m.evaluate(m.model),
    "train.evaluate, loaded": lambda m: m.evaluate(aif.Run.load(m.run.folder).model),
    "train.evaluate, a checkpoint's": lambda m: m.evaluate(m.of_a_checkpoint()),
    "scores of the catalogue": lambda m: m.scores(),
    "rows of the catalogue": lambda m: item_rows(m.run.model, m.run.params, m.other.catalogue),
    "init": lambda m: m.model.init(jax.random.key(0), m.other.catalogue),
    "fit_tables": lambda m: aif.fit_tables(m.run.config, m.other.catalogue),
    "fit": lambda m: demo.fit(m.model, m.other, out=m.at / "fit", epochs=1, batch_size=32, **QUIET),
    "Pipeline": lambda m: pipeline(m.model, m.other),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_what_another_encoder_made(door, run, model, other, tmp_path):
    with pytest.raises(aif.EncodingMismatch) as caught:
        DOORS[door](Met(run, model, other, tmp_path))
    assert (caught.value.expected, caught.value.got) == (run.encoder.version, other.encoder.version)
    assert "read with aif.read(..., encoder=run.encoder)" in str(caught.value)
    assert not (tmp_path / "fit").exists()


def test_an_index_of_another_encoder_is_of_another_version(run, model, other, tmp_path):
    met = Met(run, model, other, tmp_path)
    (index := met.index()).save(tmp_path / "index")
    refused(aif.VersionMismatch, index.version, aif.ItemIndex.load, tmp_path / "index", met.trained)
    refused(aif.VersionMismatch, index.version, lambda: asyncio.run(engine(met.trained, index)))


def test_newer_data_read_with_the_encoder_are_taken(run, data):
    rows = np.arange(len(data.log))[: len(data.log) // 2]
    users, items = data.users.raw[data.log.user[rows] - 1], data.items.raw[data.log.item[rows] - 1]
    events = {"user": users, "item": items, "time": data.log.time[rows]}
    items = {"item": data.items.raw, "category": data.items.raw % 5}
    newer = aif.read(events, items=items, columns=aif.Columns(), encoder=run.encoder)
    assert newer.encoding == newer.catalogue.schema.encoding == newer.schema.encoding == run.encoder.version
    assert len(run.index(newer.catalogue, **QUIET)) == ITEMS
    assert train.evaluate(run.model, run.params, newer, np.arange(100, 120), k=None, **QUIET).requests == 20


def test_data_without_an_encoder_have_nothing_to_compare(run, data, other):
    bare = dataclasses.replace(other.schema, encoding="")
    made = dataclasses.replace(other, encoder=None, catalogue=dataclasses.replace(other.catalogue, schema=bare))
    assert made.encoding == made.catalogue.schema.encoding == ""
    assert made.user_features([200], length=4).encoding == ""
    assert len(run.index(made.catalogue, **QUIET)) == ITEMS
    assert train.evaluate(run.model, run.params, made, positions(made), k=None, **QUIET).requests == 20


def test_what_an_encoder_made_stays_its_own(data, other):
    """Without the encoder, in a copy, under another schema's name."""
    assert dataclasses.replace(data, encoder=None).encoding == data.encoder.version
    with pytest.raises(aif.EncodingMismatch, match="Dataset.catalogue: expected the encoding"):
        dataclasses.replace(data, catalogue=dataclasses.replace(data.catalogue, schema=other.schema))
    assert data.schema == other.schema and data.encoding != other.encoding
    assert "encoding" not in data.schema.to_json()
    refused(ValueError, "made, got one with an encoding", aif.Schema.from_json, data.schema.to_json() | {"encoding": "x"})
