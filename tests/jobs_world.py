"""A small raw catalogue and event log as Arrow, and a model of them: for tests of jobs and of the engines that run them."""

import atexit
import functools
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
import pyarrow as pa

import aif_jax as aif
from aif_jax import blocks
from tests import demo

ITEMS, USERS = 700, 30
COLUMNS = aif.Columns(
    action="action", actions=(1, 2), item_attributes=("brand",), item_bags=("tags",), item_floats=("price",), side=("bid",)
)


def items(count: int = ITEMS, *, strings: bool = False) -> pa.Table:
    """Raw items: every kind of column."""
    rng, number = np.random.default_rng(0), np.arange(count)
    ids = [f"sku-{n}" for n in number] if strings else number * 7 + 3
    return pa.table(
        {
            "item": ids,
            "category": [f"c{n % 5}" for n in number],
            "brand": [None if n % 11 == 0 else f"b{n % 13}" for n in number],
            "tags": [[f"t{k}" for k in range(n % 4)] for n in number],
            "price": rng.normal(size=count),
            "bid": rng.uniform(1, 2, count),
        }
    )


def events(*, strings: bool = False) -> pa.Table:
    """Raw events of users, ordered by user and then at random; between 1 and 300 of each."""
    rng = np.random.default_rng(1)
    counts = np.append([1, 2, 16, 17, 300], rng.integers(1, 40, USERS - 5))
    user = np.repeat(np.sort(rng.choice(10**6, USERS, replace=False)), counts)
    chosen = rng.integers(0, ITEMS, len(user))
    return pa.table(
        {
            "user": user,
            "item": [f"sku-{n}" for n in chosen] if strings else chosen * 7 + 3,
            "action": rng.integers(1, 3, len(user)),
            "time": 1_700_000_000 + rng.integers(0, 10**6, len(user)),
        }
    )


@functools.cache
def data(*, strings: bool = False) -> aif.Dataset:
    """The log and the catalogue with their encoder."""
    return aif.read(events(strings=strings), items=items(strings=strings), columns=COLUMNS)


@functools.cache
def trained(*, strings: bool = False) -> aif.Trained:
    """A model with wide vectors and signatures, its parameters as NumPy arrays, and the encoder of the data."""
    layers = (blocks.LinearMemory(width=8, dot_product=True), blocks.Sim("category", slots=3, length=3), blocks.DotProduct())
    sizes: dict[str, Any] = dict(width=16, short_length=4, long_length=16, towers=(16,), head=aif.heads.Mlp((8,)))
    made = aif.build(aif.Config(schema=data(strings=strings).schema, blocks=layers, **sizes))
    params = jax.tree.map(np.asarray, demo.init(made, items=data(strings=strings).catalogue))
    return aif.Trained(made, params, data(strings=strings).encoder)


@functools.cache
def folder(*, strings: bool = False) -> str:
    """That model as a checkpoint, of this process alone."""
    root = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, root)
    aif.checkpoint.save(f"{root}/model", trained(strings=strings))
    return f"{root}/model"


def job(*, strings: bool = False, **options: Any) -> aif.engines.ItemJob:
    """The catalogue job, with batches that the catalogue does not fill."""
    return aif.engines.ItemJob(folder(strings=strings), **{"batch_size": 64} | options)


def built(*, strings: bool = False, **options: Any) -> aif.ItemIndex:
    """The index as one process builds it."""
    batches, given = items(strings=strings).to_batches(), {"batch_size": 64, "progress": False} | options
    return aif.ItemIndex.build(trained(strings=strings), batches, **given)


def merged(parts: Any, *, strings: bool = False, **options: Any) -> aif.ItemIndex:
    """The index of encoded parts."""
    return aif.ItemIndex.from_parts(trained(strings=strings), parts, progress=False, **options)


def same(a: aif.ItemIndex, b: aif.ItemIndex) -> bool:
    """Whether two indexes hold the same ids and rows, bit for bit."""
    return demo.same(a.stored(), b.stored()) and (a.version, a.storage, a.kind) == (b.version, b.storage, b.kind)
