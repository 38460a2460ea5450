"""The small shop whose fifth day was refreshed, with a user table, and whose sixth comes as a stream."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import aif_jax as aif
from aif_jax import export
from aif_jax.connectors import SnapshotStore, encode
from aif_jax.encoding.capacity import Capacity
from aif_jax.export import Delta
from aif_jax.export.delta import Chain
from aif_jax.readers import admit
from aif_jax.refreshing.continuous import FORMAT, name_of
from aif_jax.refreshing.run import KEPT, USERS
from aif_jax.store import sealed
from aif_jax.train.fit import init_params
from aif_jax.train.tasks import NextItem
from aif_jax.user_table import UserTable
from tests import refresh_world as world

GATE = world.GATE
OPTIONS: dict[str, Any] = dict(
    every=0.0, max_messages=4, batch_size=32, learning_rate=0.02, requests=40, gate=GATE, progress=False
)  # fmt: skip
A_MESSAGE = 25


def export_of(
    folder: Path, *, seed: int = 0, until: int = world.START + 4 * world.DAY + 50_000, rows: int | None = None
) -> Path:
    """An export as `refresh` publishes it, of an untrained model whose users' rows hold sums of item embeddings.

    With `rows` the item vocabulary has that size, and lacks the items that came after the fourth day.
    """
    data = world.data(5)
    if rows is not None:
        encoder, _ = admit(data.encoder, world.events(4), capacity={"item": Capacity(rows=rows)}, fresh=True)
        data = aif.read(world.events(5), items=world.items(5), encoder=encoder, unknown="skip", progress=False)
    config = aif.presets.two_tower(data.schema, width=4, towers=(4,), head=(4,), short_length=4, long_length=8)
    model = aif.build(config.replace(blocks=(aif.blocks.DecayedMemory(width=4, dot_product=True),)))
    trained = aif.Trained(model, init_params(model, data, seed=seed), data.encoder)
    export.save(
        folder, trained, aif.ItemIndex.build(trained, world.items(5), progress=False), platforms=("cpu",), stablehlo=False
    )
    UserTable.build(trained, data, clock=None, progress=False).save(folder / USERS)
    record = {"until": until, "newest": int(data.log.time.max())}
    record |= {"task": {"name": "NextItem", **dataclasses.asdict(NextItem(negatives=3))}}
    (folder / KEPT).write_text(json.dumps(record))
    return folder


def until(store: Path) -> int:
    """Where the training of the published model ended."""
    name = SnapshotStore(store).current()
    return json.loads((store / str(name) / KEPT).read_text())["until"]


def applied_to(store: Path, here: Path) -> Any:
    """Model, index and user table at the end of the store's chain, as a service has them; deltas are fetched into `here`."""
    folder, deltas = store / str(SnapshotStore(store).current()), SnapshotStore(store / "deltas")
    root = export.restore(folder)
    here.mkdir(exist_ok=True)
    for name in deltas.names():
        deltas.fetch(here, name)
    parts: Any = (root.trained, root.index, UserTable.load(folder / USERS, root.trained, clock=None))
    for path in Chain(here).on(root.trained.version).values():
        parts = Delta.load(path).apply(*parts)
    return parts


def log(days: int = 6) -> dict[str, np.ndarray]:
    """All events, in the order of time."""
    events = world.events(days)
    order = np.argsort(events["time"], kind="stable")
    return {name: column[order] for name, column in events.items()}


def files() -> dict[str, np.ndarray]:
    """The events that the refresh read: they end a while after the training did."""
    return log(5)


def messages(first: int) -> list[bytes]:
    """The events from a moment on, some to a message."""
    events = log()
    at = np.flatnonzero(events["time"] >= first)
    parts = [at[start : start + A_MESSAGE] for start in range(0, len(at), A_MESSAGE)]
    return [encode({name: column[part] for name, column in events.items()}) for part in parts]


def trained_on(job: Path) -> list[tuple[int, int, int]]:
    """(user row, item row, time) of each sample that the sealed micro-batches in a job's folder trained on, in their order."""
    parts: dict[str, list[np.ndarray]] = {"user": [], "item": [], "time": []}
    samples = []
    for batch in batches(job):
        for name, part in parts.items():
            part.append(batch["arrived"][name])
        user, item, time = (np.concatenate(part) for part in parts.values())
        samples += [(int(user[at]), int(item[at]), int(time[at])) for at in batch["used"]]
    return samples


def batches(job: Path) -> Iterator[dict[str, Any]]:
    """What the sealed micro-batches in a job's folder hold, in their order."""
    number = 1
    while (folder := job / name_of(number) / "events").is_dir():
        yield sealed.read(folder, format=FORMAT)
        number += 1


def arrived(job: Path) -> np.ndarray:
    """Times of the events that came; each second has one."""
    return np.concatenate([batch["arrived"]["time"] for batch in batches(job)])
