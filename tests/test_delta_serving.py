"""Deltas under load: an engine and a service process take twenty of them while they answer, none failed and none mixed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import export
from aif_jax.connectors import SnapshotStore
from aif_jax.export import Delta, MovedRows
from aif_jax.service.client import Client
from aif_jax.service.models import DELTAS, Mirror, Nearline
from aif_jax.serving import AsyncPreRanker, ServingConfig
from aif_jax.store.trained import Trained
from aif_jax.train.fit import init_params
from aif_jax.user_table import UserTable
from tests import refresh_world as world
from tests.beside import meanwhile
from tests.service_world import running, until
from tests.test_delta import Start
from tests.test_delta_admission import admitted, base_of
from tests.test_service_process import serving

PUBLISHES, CALLERS = 20, 4
NOW = world.START + 6 * world.DAY
USERS = list(range(12))


class Chain:
    """An export of a small model that streams, deltas that build on it, and what each version must answer.

    Six items have no row at first; every third delta admits one.
    """

    def __init__(self, folder: Path, *, count: int = PUBLISHES):
        self.data, self.new = base_of(content=False, rows=36), [130, 131, 132, 133, 134, 135]
        sizes: dict[str, Any] = dict(width=8, towers=(8,), short_length=4, long_length=8)
        model = aif.build(aif.presets.streaming(self.data.schema, **sizes))
        self.model, self.joint = model, jax.jit(model.joint)
        self.base = Trained(model, init_params(model, self.data, seed=0), self.data.encoder)
        self.index = aif.ItemIndex.build(self.base, world.items(5), progress=False)
        self.table = UserTable.build(self.base, self.data, clock=None, progress=False)
        self.export = folder / "export"
        export.save(self.export, self.base, self.index, platforms=("cpu",), stablehlo=False)
        self.table.save(self.export / "users")
        self.ids = np.array(world.items(5)["item"])
        self.deltas: list[Delta] = []
        self.encoders: dict[str, aif.Encoder] = {}
        self.expected: dict[str, dict[int, np.ndarray]] = {}
        rng, trained, data = np.random.default_rng(0), self.base, self.data
        self._expect(trained)
        for number in range(1, count + 1):
            table = np.asarray(trained.params["embedding"]["item"])
            at = 1 + np.sort(rng.choice(len(table) - 1, 8, replace=False)).astype(np.int32)
            rows = {"item": MovedRows(at, table[at] + rng.normal(size=table[at].shape).astype(np.float32))}
            admits, new = number % 3 == 0 and number // 3 <= len(self.new), None
            if admits:
                new, data = admitted(Start(data, trained, self.index, self.table), [self.new[number // 3 - 1]])
            self.deltas.append(Delta.make(trained, rows, data.catalogue, number=number, events=data, admitted=new))
            trained = self.deltas[-1].trained(trained)
            self._expect(trained)

    def events(self, user: int) -> dict[str, Any]:
        """Raw events of a user, two of them with items that have no row at first."""
        rng = np.random.default_rng(user)
        mine = rng.permutation(np.append(rng.choice(self.ids[: -len(self.new)], 4), rng.choice(self.new, 2)))
        return {"item": mine.tolist(), "time": [NOW - 1000 * (n + 1) for n in range(6)]}

    def features(self, user: int, version: str) -> Any:
        """The same, encoded for a version."""
        encode = self.encoders[version].with_length(self.model.config.history_length)
        return encode.user({"user": user}, self.events(user), NOW)

    def _expect(self, trained: Trained) -> None:
        """What `joint` says of all items, for each user: the model as a full rebuild has it."""
        version, encoder = trained.version, trained.encoder
        self.encoders[version] = encoder
        items = dataclasses.replace(encoder.items(world.items(5))[1], encoding="")
        features = {user: dataclasses.replace(self.features(user, version), encoding="") for user in USERS}
        self.expected[version] = {user: np.asarray(self.joint(trained.params, features[user], items)) for user in USERS}

    def check(self, version: str, user: int, logits: np.ndarray) -> bool:
        """Whether an answer is that of one version: close to it, and further from all others."""
        gaps = {name: float(np.abs(of[user] - logits).max()) for name, of in self.expected.items()}
        return gaps[version] < 1e-4 and min(gap for name, gap in gaps.items() if name != version) > 1e-3


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def test_an_engine_takes_deltas_under_load(chain):
    answers: list[tuple[int, Any]] = []

    async def call(engine: AsyncPreRanker, user: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            found = await engine.score(user, chain.ids)
            answers.append((user, found))

    async def run() -> None:
        async def features(request: Any) -> Any:
            await asyncio.sleep(0.002)  # so that requests begin before a publish and end after it
            return chain.features(request.user, request.version)

        config = ServingConfig(buckets=(64,), max_k=8)
        engine = AsyncPreRanker(chain.base, chain.index, features=features, config=config)
        async with engine:
            stop = asyncio.Event()
            calls = [asyncio.create_task(call(engine, user, stop)) for user in USERS[:CALLERS]]
            compiled = compiled_in(engine)
            applied: Any = (chain.base, chain.index, None)
            for delta in chain.deltas:
                seen = len(answers)
                applied = delta.apply(*applied[:2])
                assert await engine.publish(applied.trained, applied.item_index) == delta.version
                while not any(found.version == delta.version for _, found in answers[seen:]):
                    await asyncio.sleep(0.001)
            stop.set()
            await asyncio.gather(*calls)
            assert engine.metrics()["counters"]["publishes"] == PUBLISHES
            assert compiled_in(engine) == compiled, "an encoder that admits items changes no shape"

    asyncio.run(run())
    assert not any(found.degraded for _, found in answers)
    assert all(chain.check(found.version, user, found.logits) for user, found in answers)
    assert {found.version for _, found in answers} >= {delta.version for delta in chain.deltas[:-1]}
    assert len({encoder.version for encoder in chain.encoders.values()}) == 1 + len(chain.new)


def compiled_in(engine: AsyncPreRanker) -> dict[str, int]:
    """How many functions an engine has compiled, by kind."""
    return {name: count for name, count in engine.metrics()["counters"].items() if name.startswith("compiled_")}


def test_a_service_process_takes_deltas_under_load(chain, tmp_path):
    """Callers bring events, or an id alone, whose row of the user table moves with the items."""
    store = SnapshotStore(tmp_path / "store")
    store.publish(chain.export)
    url, here, answers = f"file://{tmp_path / 'store'}", tmp_path / "here", []

    def calls(client: Client, place: int) -> Iterator[None]:
        for number in itertools.count(place, CALLERS + 1):
            user, stored = USERS[number % len(USERS)], number % 2 == 1
            brought = {} if stored else {"record": {"user": user}, "events": chain.events(user), "now": NOW}
            answers.append((user, stored, client.score(user=user, candidates=chain.ids.tolist(), **brought)))
            yield

    def answers_of(version: str) -> bool:
        return any(answer["version"] == version for _, _, answer in answers[-50:])

    words = (url, "--mirror", here, "--user-table", here, "--poll", 0.05, "--keep", 3)
    with serving(*words) as (process, [addresses]), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(addresses["http"])) for _ in range(CALLERS)]
        with meanwhile(*(calls(client, place).__next__ for place, client in enumerate(clients))) as failed:
            until(lambda: answers_of(chain.base.version) or failed(), 120)
            deltas = store.below(DELTAS, keep=100)
            for delta in chain.deltas:
                delta.save(tmp_path / str(delta.number))
                deltas.publish(tmp_path / str(delta.number))
                until(lambda version=delta.version: answers_of(version) or failed(), 120)
        text = clients[0].request("GET", "/metrics")[2].decode()
    assert process.returncode == 0
    assert {answer["version"] for _, _, answer in answers} == {chain.base.version} | {d.version for d in chain.deltas}
    assert not [answer["reason"] for _, _, answer in answers if answer["degraded"]]
    brought = [(user, answer) for user, stored, answer in answers if not stored]
    assert len(brought) > PUBLISHES and all(chain.check(a["version"], user, np.asarray(a["logits"])) for user, a in brought)
    assert f'version="{chain.deltas[-1].version[:12]}' in text


def test_a_service_that_starts_later_is_at_the_end_of_the_chain(chain, tmp_path):
    """Rows of users too; a delta of another chain, a repeated and a torn one leave what serves."""
    store, here = _published(chain, tmp_path, 3), tmp_path / "here"
    deltas = store.below(DELTAS, keep=100)
    with Mirror(store, here, poll=0.05), running(here, nearline=_users(here), keep=2) as service, service.client() as client:
        wanted = chain.deltas[2].version
        assert _version(client, wanted) == wanted
        models = service.service.models
        status = models.status()[0]
        assert status["deltas"] == 3 and status["user_rows"] and len(models.held) == 2
        applied: Any = (chain.base, chain.index, chain.table)
        for delta in chain.deltas[:3]:
            applied = delta.apply(*applied)
        served = models.held[0].users.table
        assert all(served.rows.get([u]).words.tobytes() == applied.user_table.rows.get([u]).words.tobytes() for u in USERS)
        deltas.publish(tmp_path / "2")  # again
        chain.deltas[9].save(tmp_path / "far")
        deltas.publish(tmp_path / "far")  # what it builds on is not there
        assert _version(client, wanted, same=True) == wanted and models.problem is None
        table = np.asarray(chain.base.params["embedding"]["item"])
        rows = {"item": MovedRows(np.array([3], np.int32), table[[3]] + 1)}
        other = Delta.make(chain.base, rows, chain.data.catalogue, events=chain.data)
        other.save(tmp_path / "other")
        deltas.publish(tmp_path / "other")  # another chain on the export: the one before is taken back
        wanted = other.version
        assert _version(client, wanted) == wanted and models.status()[0]["deltas"] == 1 and len(models.held) == 2
        (tmp_path / "torn").mkdir()
        (tmp_path / "torn" / "manifest.json").write_text(json.dumps({"format": "other"}))
        deltas.publish(tmp_path / "torn")
        until(lambda: models.problem is not None)
        assert "expected the format 'aif_jax.delta/1', got 'other'; publish it again" in models.problem
        assert _version(client, wanted, same=True) == wanted


def test_a_service_of_one_named_version_takes_deltas_on_it(chain, tmp_path):
    """`serve --version NAME`: another export of the store is left alone."""
    store, here = SnapshotStore(tmp_path / "store"), tmp_path / "here"
    name, deltas = store.publish(chain.export), store.below(DELTAS, keep=100)
    with Mirror(store, here, poll=0.05), running(here, only=name) as service, service.client() as client:
        assert _version(client, chain.base.version, same=True) == chain.base.version
        for delta in chain.deltas[:2]:
            delta.save(tmp_path / str(delta.number))
            deltas.publish(tmp_path / str(delta.number))
            assert _version(client, delta.version) == delta.version
        assert service.service.models.status()[0]["deltas"] == 2


def test_an_index_of_a_nearline_job_and_a_delta_do_not_go_together(chain, tmp_path):
    store, here = _published(chain, tmp_path, 1), tmp_path / "here"
    chain.index.save(tmp_path / "index")
    nearline = Nearline(index=tmp_path / "index")
    with Mirror(store, here), running(here, nearline=nearline) as service, service.client() as client:
        assert _version(client, chain.base.version, same=True) == chain.base.version
        expected = "expected the index of the export under a delta, got that of a nearline job; publish a full refresh"
        assert expected in service.service.models.problem


def test_rows_of_a_followers_users_and_a_delta_do_not_go_together(chain, tmp_path):
    """The follower goes on writing rows of the version of the export: with a delta they would freeze."""
    store, here = _published(chain, tmp_path, 1), tmp_path / "here"
    with Mirror(store, tmp_path / "bare"):
        pass
    shutil.rmtree(next((tmp_path / "bare").glob("0*")) / "users")
    chain.table.save(tmp_path / "users")
    with running(tmp_path / "bare", nearline=_users(tmp_path / "users")) as service, service.client() as client:
        assert _version(client, chain.base.version, same=True) == chain.base.version
        expected = "expected the users' rows of the export under a delta, got that of a nearline job; publish a full refresh"
        assert expected in service.service.models.problem and "--user-table" in service.service.models.problem
    with Mirror(store, here), running(here, nearline=_users(here)) as service, service.client() as client:
        assert _version(client, chain.deltas[0].version) == chain.deltas[0].version


def _published(chain: Chain, root: Path, count: int) -> SnapshotStore:
    """A store with the export and the first deltas."""
    store = SnapshotStore(root / "store")
    store.publish(chain.export)
    for delta in chain.deltas[:count]:
        delta.save(root / str(delta.number))
        store.below(DELTAS, keep=100).publish(root / str(delta.number))
    return store


def _folder(chain: Chain, root: Path, count: int, *, line: str = "export") -> Path:
    """A served folder with the export and the first deltas."""
    shutil.copytree(chain.export, root / "export")
    (root / "current").write_text(f"{line}\n")
    for delta in chain.deltas[:count]:
        delta.save(root / DELTAS / f"{delta.number:03d}")
    return root


def test_the_export_before_stays_in_memory_through_deltas(chain, tmp_path):
    """`watch` compares with it however many deltas follow the new export."""
    root = _folder(chain, tmp_path, 0)
    other = chain.base.replace(params=init_params(chain.model, chain.data, seed=1))
    index = aif.ItemIndex.build(other, chain.data.catalogue, progress=False)
    export.save(root / "other", other, index, platforms=("cpu",), stablehlo=False)
    (root / "current").write_text("other\n")
    with running(root, keep=2) as service, service.client() as client:
        (root / "current").write_text("export\n")
        assert _version(client, chain.base.version) == chain.base.version
        for delta in chain.deltas[:3]:
            delta.save(root / DELTAS / f"{delta.number:03d}")
            assert _version(client, delta.version) == delta.version
        held = [served.version for served in service.service.models.held]
        assert held == [chain.deltas[2].version, chain.deltas[1].version, other.version]


def test_a_service_goes_as_far_as_the_deltas_can_be_applied(chain, tmp_path):
    root = _folder(chain, tmp_path, 3)
    (file,) = (root / DELTAS / "003").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with running(root) as service, service.client() as client:
        assert _version(client, chain.deltas[1].version, same=True) == chain.deltas[1].version
        assert "003" in service.service.models.problem and service.service.models.status()[0]["deltas"] == 2


def test_a_version_stays_when_the_first_deltas_of_its_chain_are_gone(chain, tmp_path):
    root = _folder(chain, tmp_path, 2)
    with running(root) as service, service.client() as client:
        assert _version(client, chain.deltas[1].version) == chain.deltas[1].version
        shutil.rmtree(root / DELTAS / "001")
        until(lambda: service.service.models.problem is not None)
        assert f"expected the first delta under {chain.deltas[1].version[:12]}, got none" in service.service.models.problem
        chain.deltas[2].save(root / DELTAS / "003")
        assert _version(client, chain.deltas[2].version) == chain.deltas[2].version


def test_a_pinned_export_takes_no_deltas(chain, tmp_path):
    digest = hashlib.sha256((chain.export / "manifest.json").read_bytes()).hexdigest()
    root = _folder(chain, tmp_path, 2, line=f"export sha256={digest}")
    with running(root) as service, service.client() as client:
        assert _version(client, chain.base.version, same=True) == chain.base.version
        assert service.service.models.problem is None


def _users(folder: Path) -> Any:
    return Nearline(users=folder)


def _version(client: Client, wanted: str, *, same: bool = False, seconds: float = 60.0) -> str:
    """The version that answers, once it is the wanted one; with `same` after a few looks of the service at its folder."""
    end, found = time.monotonic() + (0.5 if same else seconds), ""
    while time.monotonic() < end and (same or found != wanted):
        with contextlib.suppress(OSError):
            found = client.score(user=1, candidates=[101, 102])["version"] if not same else _brought(client)["version"]
        time.sleep(0.02)
    return found


def _brought(client: Client) -> dict[str, Any]:
    events = {"item": [101], "time": [NOW - 5]}
    return client.score(user=1, record={"user": 1}, events=events, now=NOW, candidates=[101, 102])
