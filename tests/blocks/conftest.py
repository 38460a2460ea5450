"""Fixtures that several blocks' tests use."""

import pytest

import aif_jax as aif
from aif_jax.train.tasks import NextItem
from experiments.datasets.synthetic import synthetic_world
from tests import demo
from tests.test_sparse import SMALL


@pytest.fixture(scope="package")
def data() -> aif.Dataset:
    return synthetic_world(0, users=20, items=90, topics=12, categories=8, events_per_user=30, lag=8, content_dim=12).dataset


@pytest.fixture(scope="package")
def run(data) -> aif.Run:
    """A short training, for blocks that are added after it."""
    model = aif.build(demo.config(schema=data.schema, **SMALL))
    config, task = aif.FitConfig(batch_size=64, requests=20, k=10), NextItem(negatives=3, evaluated=9)
    return aif.fit(model, data, config, task=task, progress=False)
