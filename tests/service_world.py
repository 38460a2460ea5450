"""Exports to serve, and services on loopback that tests call from outside their event loop."""

import asyncio
import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import shutil
import socket
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq

import aif_jax as aif
from aif_jax.service.core import Service
from aif_jax.service.models import Models
from aif_jax.service.process import Listening, listening
from tests import demo
from tests.client import Client

ITEMS = 40
IDS = 17 + 1000 * np.arange(ITEMS)
SERVING = aif.ServingConfig(buckets=(16, 64), max_k=8, max_pending=16)
NOW = 1_700_000_900
EVENTS = {"item": [17, 1017], "time": [1_700_000_000, 1_700_000_050]}
ANN = {"user": "ann", "record": {}, "events": EVENTS, "now": NOW}
"""A user with what a call brings of her."""


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@dataclasses.dataclass(frozen=True)
class Exports:
    """Two versions of a model, exported into one folder as "one" and "two", and what they should answer."""

    root: Path
    model: aif.PreRanker
    params: dict[str, Any]  # by folder
    index: dict[str, aif.ItemIndex]
    digests: dict[str, str]
    encoder: aif.Encoder
    catalogue: aif.Catalogue

    def copied(self, folder: Path) -> "Exports":
        """Copies both versions to a folder that a test may change."""
        for name in ("one", "two"):
            shutil.copytree(self.root / name, folder / name)
        return self

    def logits(self, folder: str, events: Any = EVENTS, *, ids: Any = IDS, user: str = "ann") -> np.ndarray:
        """What the model says, computed without a service."""
        features = self.encoder.with_length(self.model.config.history_length).user({"user": user}, events, NOW)
        rows, _ = self.index[folder].take(ids)
        state = jax.jit(self.model.user)(self.params[folder], features)
        return np.asarray(jax.jit(self.model.interaction)(self.params[folder], state, rows))


@functools.cache
def exports(kind: str = "integers") -> "Exports":
    """Made once in a process; nobody changes the folders."""
    ids = [f"item {number}" for number in IDS] if kind == "strings" else IDS
    items = {"item": ids, "category": ["tea", "cup", "pot", "tin"] * (ITEMS // 4), "bid": np.linspace(1, 2, ITEMS)}
    times = [1_699_000_000 + 100 * n for n in range(12)]
    events = {"user": ["ann", "bob", "cem"] * 4, "item": [ids[n] for n in range(12)], "time": times}
    data = aif.read(events, items=items, columns=aif.Columns(user_id=True, side=("bid",)))
    config = aif.presets.two_tower(data.schema, width=8, short_length=4, long_length=8, towers=(8,), sequence=False)
    if kind == "objectives":
        config = config.replace(head=aif.heads.Mlp((8,)), objectives=("click", "like"))
    model = aif.build(config)
    root, params, index, digests = Path(tempfile.mkdtemp(prefix="aif_jax-exports-")), {}, {}, {}
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for seed, folder in enumerate(("one", "two")):
        params[folder] = demo.init(model, seed, items=data.catalogue)
        trained = aif.Trained(model, params[folder], data.encoder)
        index[folder] = aif.ItemIndex.build(trained, [items], batch_size=64, progress=False)
        digests[folder] = aif.export.save(root / folder, trained, index[folder], platforms=("cpu",))
    return Exports(root, model, params, index, digests, data.encoder, data.catalogue)


class Slow:
    """A feature source that never answers; lists the users of calls that began, and of those that were cancelled."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.cancelled: list[Any] = []

    async def get(self, user: Any) -> None:
        self.started.append(user)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.append(user)
            raise


def read_log(folder: Path) -> list[Any]:
    """The records of a request log, file by file."""
    return [types.SimpleNamespace(**row) for row in pq.read_table(folder).to_pylist()]


def connected(address: str, said: bytes = b"") -> socket.socket:
    """A connection to an HTTP address that has sent some bytes."""
    host, port = address.removeprefix("http://").split(":")
    caller = socket.create_connection((host, int(port)), timeout=60)
    try:
        caller.sendall(said)
    except OSError:
        caller.close()
        raise
    return caller


class Running:
    """A service on loopback, in a thread with its event loop."""

    def __init__(self, service: Service, addresses: dict[str, str], loop: asyncio.AbstractEventLoop, token: str | None):
        self.service, self.addresses, self.loop, self._token = service, addresses, loop, token

    def client(self, **options: Any) -> Client:
        """A client of the HTTP address."""
        return Client(self.addresses["http"], **{"token": self._token, **options})

    def connect(self, said: bytes = b"") -> socket.socket:
        """As `connected` to the HTTP address."""
        return connected(self.addresses["http"], said)

    def call(self, function: Any) -> Any:
        """Runs a function, async or not, on the loop of the service."""

        async def run() -> Any:
            result = function()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(60)


@contextlib.contextmanager
def running(
    root: Path, *, where: Listening | None = None, token: str | None = None, observers: tuple[Any, ...] = (), **options: Any
) -> Iterator[Running]:
    """Serves a folder until the end of the block; options as for `Models`."""
    where, ready = where or Listening(port=0), concurrent.futures.Future[tuple[Running, asyncio.Event]]()

    async def serve() -> None:
        models = Models(root, **{"config": SERVING, "poll": 0.05, **options})
        service, loop, stop = Service(models, observers=observers), asyncio.get_running_loop(), asyncio.Event()
        async with service, listening(service, where, token) as addresses:
            ready.set_result((Running(service, addresses, loop, token), stop))
            await stop.wait()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        serving = pool.submit(asyncio.run, serve())
        serving.add_done_callback(lambda ended: ready.done() or ready.set_exception(ended.exception()))
        made, stop = ready.result(120)
        try:
            yield made
        finally:
            with contextlib.suppress(RuntimeError):  # it has ended by itself, and the result says why
                made.loop.call_soon_threadsafe(stop.set)
        serving.result(60)
