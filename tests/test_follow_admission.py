"""`follow` with new items: they get free rows after some events, by deltas that equal a full rebuild, or wait."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.connectors import MemoryStream, SnapshotStore, encode
from aif_jax.export import restore
from aif_jax.refreshing import follow
from tests import follow_world as world
from tests import refresh_world as shop
from tests.test_delta import check
from tests.test_follow import stream_of

pytestmark = pytest.mark.usefixtures("light_compilation")
LATER = 999
"""An item that no file has when the chain begins."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[int, Path]:
    """Stores whose exports have item vocabularies of 36 and of 31 rows; 30 are taken."""
    made = {}
    for rows in (37, 31):
        folder = tmp_path_factory.mktemp(f"rows{rows}")
        SnapshotStore(folder / "store").publish(world.export_of(folder / "export", rows=rows))
        made[rows] = folder / "store"
    return made


@pytest.fixture
def store(stores, tmp_path) -> Path:
    shutil.copytree(stores[37], tmp_path / "store")
    return tmp_path / "store"


def items(*, later: bool) -> dict[str, list[Any]]:
    more = {"item": LATER, "category": "category 1", "brand": "brand 1"}
    return {name: [*column, more[name]] if later else column for name, column in shop.items(5).items()}


def stream(store: Path, *, after: int = 0) -> MemoryStream:
    """The events after the export's training; `after` some messages come those of the later item."""
    messages = world.messages(world.until(store) - 20_000)
    return stream_of([*messages[:after], encode(of_later(store)), *messages[after:]] if after else messages)


def of_later(store: Path) -> dict[str, np.ndarray]:
    """Events of the later item, each in a second without another event."""
    free = np.setdiff1d(np.arange(world.until(store), world.until(store) + 40_000), world.log()["time"])
    return {"user": np.arange(20), "item": np.full(20, LATER), "time": free[:: len(free) // 20][:20]}


def run(store: Path, values: MemoryStream, **changes: Any) -> Any:
    options = {"items": items(later=False), "batches": 3, "admit_after": 3} | changes
    return follow(values, world.files(), out=store, **(world.OPTIONS | options))


def check_rebuilt(store: Path, here: Path, job: Path, catalogue: Any, more: Any = None) -> Any:
    """Raises unless what is behind the deltas equals a full rebuild under the new encoder; the model."""
    parts, events = world.applied_to(store, here), world.log()
    some = np.isin(events["time"], np.append(world.files()["time"], world.arrived(job)))
    events = {name: np.append(column[some], [] if more is None else more[name]).astype(int) for name, column in events.items()}
    data = aif.read(events, items=catalogue, encoder=parts.trained.encoder, unknown="skip", progress=False)
    check(parts, data, catalogue=catalogue)
    fields = np.asarray(parts.trained.params["fitted"]["fields"]["category"])
    assert np.array_equal(fields, data.catalogue.ids["category"])
    return parts.trained


def test_items_get_rows_by_deltas_that_equal_a_full_rebuild(store, tmp_path):
    made = run(store, stream(store))
    assert made.published == 3 and made.admitted == 6
    trained = check_rebuilt(store, tmp_path / "here", tmp_path / "store.follow" / "job", shop.items(5))
    root = restore(store / SnapshotStore(store).current()).trained
    assert trained.version == made.version and trained.encoding != root.encoding
    rows = trained.encoder.vocabularies["item"].encode(np.arange(130, 136))
    assert sorted(rows) == list(range(31, 37)) and root.encoder.vocabularies["item"].encode([130]).tolist() == [0]
    table = np.asarray(trained.params["embedding"]["item"])
    assert (table[rows] != np.asarray(root.params["embedding"]["item"])[rows]).any(axis=1).all(), "trained on"
    trained_on = world.trained_on(tmp_path / "store.follow" / "job")
    assert any(code > len(table) - 1 for _, code, _ in trained_on) and len(set(trained_on)) == len(trained_on) == made.trained


def test_a_chain_with_new_items_goes_on_as_if_it_had_not_ended(store, tmp_path):
    """An item that no file had waits for the items file; codes of another process do not matter."""
    whole = run(store, stream(store, after=3), items=items(later=True))
    assert whole.admitted == 7
    shutil.rmtree(store / "deltas")
    first = run(store, stream(store, after=3), batches=1, work=tmp_path / "parts", items=items(later=True))
    parts = run(store, stream(store, after=3), batches=2, work=tmp_path / "parts", items=items(later=True))
    assert (parts.version, parts.admitted, parts.trained) == (whole.version, 7, whole.trained) and first.admitted > 0
    shutil.rmtree(store / "deltas")
    early = run(store, stream(store, after=3), batches=2, work=tmp_path / "waits")
    late = run(store, stream(store, after=3), batches=1, work=tmp_path / "waits", items=items(later=True))
    assert early.admitted == 6 and late.admitted == 7
    job, later = tmp_path / "waits" / "job", of_later(store)
    trained = check_rebuilt(store, tmp_path / "here", job, items(later=True), later)
    assert trained.encoder.vocabularies["item"].encode([LATER])[0] > 0
    assert not restore(store / SnapshotStore(store).current()).index.lookup([LATER])[1].any()


def test_items_wait_where_no_row_is_free(stores, tmp_path, capsys):
    shutil.copytree(stores[31], tmp_path / "store")
    made = run(tmp_path / "store", stream(tmp_path / "store"), batches=2, progress=True)
    assert made.published >= 1 and made.admitted == 1
    said = capsys.readouterr().err
    assert "no row is free for 5 of 6 new items; they stay unknown until the next full refresh" in said
    check_rebuilt(tmp_path / "store", tmp_path / "here", tmp_path / "store.follow" / "job", shop.items(5))


def test_items_with_too_few_events_wait(store):
    assert run(store, stream(store), batches=1, admit_after=10_000).admitted == 0


def test_what_cannot_admit_items_is_named(store, tmp_path):
    SnapshotStore(tmp_path / "growing").publish(world.export_of(tmp_path / "export"))
    for where, changes, message in (
        (tmp_path / "growing", {}, "admit_after: expected a model with an item vocabulary of fixed size, got one that grows"),
        (store, {"admit_after": 0}, "admit_after: expected at least 1 event, got 0"),
        (store, {"items": None}, "admit_after: expected events and items as files or tables, got a Dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            run(where, stream(store), **changes)
