"""A model, and request logs of what it served, made without a service."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import aif_jax as aif
from aif_jax.data.cascade import names_of
from aif_jax.service import tensors
from aif_jax.service.log import LogRecord, log_schema
from tests import demo

NOW = 1_700_000_000
ITEMS = [10 * number for number in range(1, 31)]
COLUMNS = aif.Columns(user_id=True, action="event", actions=("view", "buy"))
TABLE = {"item": ITEMS, "category": ["tea", "cup", "pot"] * 10}


@functools.cache
def world(objectives: tuple[str, ...] = (), *, text: bool = False) -> tuple[aif.Trained, aif.Dataset]:
    """A small model with its encoder, and data that the encoder reads; item ids are numbers or their text."""
    rng = np.random.default_rng(0)
    count, kind = 240, str if text else int
    events = {
        "user": [f"user {at % 12}" for at in range(count)], "item": list(map(kind, rng.choice(ITEMS, count))),
        "time": (NOW - 90_000 + 300 * np.arange(count)).tolist(), "event": ["view", "view", "buy"] * (count // 3),
    }  # fmt: skip
    data = aif.read(events, items=TABLE | {"item": list(map(kind, ITEMS))}, columns=COLUMNS, progress=False)
    config = aif.presets.two_tower(data.schema, width=8, short_length=4, long_length=8, towers=(8,), sequence=False)
    model = aif.build(config.replace(head=(8,), objectives=objectives) if objectives else config)
    encoder = data.encoder.with_length(config.history_length)
    return aif.Trained(model, demo.init(model, items=data.catalogue), encoder), data


def features_of(trained: aif.Trained, user: Any, place: int, now: int) -> aif.UserFeatures:
    """Features of one request, as a service encodes them."""
    rng = np.random.default_rng(place)
    count = int(rng.integers(0, 12))
    ages = np.sort(rng.integers(0, 9000, count))[::-1]
    items, actions = rng.choice([*ITEMS, 999], count), rng.choice(["view", "buy"], count)
    items = items.astype(str) if trained.encoder.vocabularies["item"].kind == "strings" else items
    events = {"item": items.tolist(), "time": (now - 1 - ages).tolist(), "event": actions.tolist()}
    return trained.encoder.user({"user": user} if user is not None else None, events, now)


@functools.cache
def scorer(trained: aif.Trained) -> Any:
    return jax.jit(trained.model.joint)


def record(trained: aif.Trained, data: aif.Dataset, place: int, *, k: int = 4, **changes: Any) -> LogRecord:
    """A ranking of ten candidates; `place` seeds everything and is its minute."""
    rng, user = np.random.default_rng(1000 + place), f"user {place % 7}"
    now, candidates = NOW + 60 * place, rng.choice(ITEMS, 10, replace=False)
    features = features_of(trained, user, place, now)
    texts = data.items.kind == "strings"
    candidates = candidates.astype(str) if texts else candidates
    items = data.catalogue.features(trained.encoder.vocabularies["item"].encode(candidates))
    logits = np.asarray(scorer(trained)(trained.params, features, items)).reshape(10, -1)
    best = np.argsort(-logits[:, 0], kind="stable")[:k]
    made = LogRecord(
        id=f"request {place}", time=now + 0.25, method="rank", version=trained.version, user=json.dumps(user), k=k,
        order="logit", candidates=None if texts else candidates.tolist(), bids=None,
        candidate_texts=candidates.tolist() if texts else None, ids=None if texts else candidates[best].tolist(),
        id_texts=candidates[best].tolist() if texts else None,
        logits=logits[best].ravel().tolist(), degraded=False, reason=None, stages="{}", encoding=trained.encoder.version,
        features=tensors.pack(names_of(features)), raw=None,
    )  # fmt: skip
    return made._replace(**changes)


def write_log(folder: Path, records: list[LogRecord], number: int = 0) -> Path:
    """One file of a request log."""
    folder.mkdir(exist_ok=True)
    columns = {field: [getattr(each, field) for each in records] for field in LogRecord._fields}
    pq.write_table(pa.table(columns, schema=log_schema()), folder / f"requests-{number:020d}-1-{number:08d}.parquet")
    return folder


def outcomes(*rows: tuple[str, int, int, str]) -> dict[str, list[Any]]:
    """Columns of (request, item, second, outcome)."""
    return {name: [row[at] for row in rows] for at, name in enumerate(("request", "item", "time", "outcome"))}


def write_large(folder: Path, *, requests: int, users: int, rows: int = 4096) -> None:
    """A log of many requests that repeat a few, a click on each in another order, and the encoder, for a child process."""
    trained, data = world()
    some = [record(trained, data, place) for place in range(64)]
    (folder / "log").mkdir(parents=True)
    (folder / "encoder.json").write_text(json.dumps(trained.encoder.to_record()))
    np.savez(folder / "encoder.npz", **trained.encoder.to_arrays())
    for number, start in enumerate(range(0, requests, rows)):
        at = range(start, min(start + rows, requests))
        records = [
            some[place % 64]._replace(id=f"request {place}", time=NOW + place, user=str((place * 7919) % users)) for place in at
        ]
        write_log(folder / "log", records, number)
    place = np.random.default_rng(0).permutation(requests)
    item = [some[at % 64].ids[0] for at in place.tolist()]
    table = {"request": [f"request {at}" for at in place.tolist()], "item": item, "time": NOW + place + 30}
    pq.write_table(pa.table(table | {"outcome": ["click"] * requests}), folder / "outcomes.parquet")
