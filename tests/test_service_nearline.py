"""What nearline jobs write between two exports: rows of users, newer indexes, and how old each may be."""

from __future__ import annotations

import dataclasses
import os
import re
import time

import numpy as np
import pytest

from aif_jax import Trained
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.service.client import ServiceError
from aif_jax.service.core import Policy
from aif_jax.service.models import Nearline, newer, newest
from aif_jax.store.snapshots import snapshots
from aif_jax.user_table import RemoteRows, UserTable, UserTableWriter
from tests.service_world import ANN, EVENTS, IDS, SERVING, exports, running, until
from tests.test_user_table import server  # noqa: F401

ROWS = dataclasses.replace(SERVING, since_lengths=(4,))


def rows_of(folder: str = "one", **options) -> UserTable:
    """A table with the events of one user."""
    world = exports()
    table = UserTable(Trained(world.model, world.params[folder], world.encoder), batch_size=8, **options)
    table.update({"user": ["ann"] * 2} | EVENTS, position=7)
    return table


def remote_rows_of(client, prefix: str) -> tuple[UserTable, str]:
    """The same table with its rows in a server, without an event, and its URL."""
    table = rows_of()
    table.rows = RemoteRows(client, version=table.version, width=table.row_bytes // 4, prefix=prefix)
    return table, f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"


def near(scores, expected) -> None:
    """The same up to what ages as float32 lose over years."""
    np.testing.assert_allclose(scores["logits"], expected["logits"], atol=2e-3)


def test_rows_of_users_answer_calls_by_the_id_alone(tmp_path):
    directory = tmp_path / "users"
    with UserTableWriter.start(directory, rows_of(), positions={0: 7}, every_updates=1) as writer:
        with (
            running(exports().root / "one", config=ROWS, nearline=Nearline(users=directory)) as service,
            service.client() as client,
        ):
            now = int(time.time())
            whole = client.score(**ANN | {"now": now}, candidates=IDS)
            answer = client.score(user="ann", candidates=IDS)
            near(answer, whole)
            assert not answer["degraded"] and answer["stages"]["features"] > 0
            early = 1_700_000_060  # right after her events
            near(client.score(user="ann", candidates=IDS, now=early), client.score(**ANN | {"now": early}, candidates=IDS))
            with pytest.raises(ServiceError, match="now: expected"):
                client.score(user="ann", candidates=IDS, now="soon")
            new = client.score(user="who", candidates=IDS)  # without a row: a user without events
            near(new, client.score(user="who", record={"user": "who"}, events={}, candidates=IDS, now=now))
            assert not new["degraded"] and np.abs(new["logits"] - answer["logits"]).max() > 0.05
            explained = client.post("/v1/explain", {"user": "ann", "candidates": IDS, "k": 3})
            assert set(explained["contributions"]) == {"dot_product"} and len(explained["ids"]) == 3
            row, age = explained["row"], now - EVENTS["time"][-1]
            assert (row["events"], row["since"]) == (2, 0) and 0 <= row["last_event"] - age < 60
            explained = client.post("/v1/explain", {"user": "who", "candidates": IDS, "k": 3})
            assert explained["row"] == {"events": 0, "since": 0, "last_event": None}
            metrics = client.request("GET", "/metrics")[2].decode()
            assert "aif_user_table_position{" in metrics and 'partition="0"' in metrics

            writer.update({"user": ["who"] * 2} | EVENTS, position=8)
            until(lambda: service.service.models.held[0].table_from.positions == {0: 8})
            near(
                client.score(user="who", candidates=IDS),
                client.score(**ANN | {"user": "who", "record": {"user": "who"}, "now": now}, candidates=IDS),
            )


def test_events_of_the_source_come_on_top_of_the_row(tmp_path):
    from aif_jax.connectors import Record

    class Source:
        async def get(self, user):
            return Record({"user": user}, {"item": [2017], "time": [1_700_000_070]})

    table = rows_of()
    table.save(tmp_path / "users")
    nearline = Nearline(users=tmp_path / "users")
    with (
        running(exports().root / "one", config=ROWS, nearline=nearline, source=Source()) as service,
        service.client() as client,
    ):
        all_three = {"item": [*EVENTS["item"], 2017], "time": [*EVENTS["time"], 1_700_000_070]}
        expected = client.score(**ANN | {"events": all_three, "now": int(time.time())}, candidates=IDS)
        near(client.score(user="ann", candidates=IDS), expected)
        assert np.abs(expected["logits"] - client.score(**ANN, candidates=IDS)["logits"]).max() > 0.02


def test_rows_in_a_server(server):  # noqa: F811
    table, url = remote_rows_of(server, "shop")
    table.update({"user": ["ann"] * 2} | EVENTS, position=7)
    nearline = Nearline(users=url, prefix="shop")
    with running(exports().root / "one", config=ROWS, nearline=nearline) as service, service.client() as client:
        near(client.score(user="ann", candidates=IDS), client.score(**ANN | {"now": int(time.time())}, candidates=IDS))
        server.set(table.rows.key("bob"), b"torn")
        torn = client.score(user="bob", candidates=IDS)
        assert torn["degraded"] and "expected a row of" in torn["reason"]


def test_rows_in_a_server_have_an_age(server):  # noqa: F811
    table, url = remote_rows_of(server, "aif")
    server.delete(table.rows.key("ann"), table.rows.key("ann").replace("s:ann", "progress"))
    nearline, policy = Nearline(users=url), Policy(max_user_age=900)
    with running(exports().root / "one", config=ROWS, nearline=nearline, policy=policy) as service, service.client() as client:
        served = service.service.models.held[0]
        answer = client.rank(user="ann", candidates=IDS, k=3)
        assert answer["degraded"] and answer["reason"] == "the rows of users are of unknown age, expected at most 900 s"
        table.update({"user": ["ann"] * 2} | EVENTS, position=7, partition=1)
        until(lambda: served.user_table_age < 60)
        assert not client.rank(user="ann", candidates=IDS, k=3)["degraded"] and served.table_from.positions == {1: 7}
        metrics = client.request("GET", "/metrics")[2].decode()
        assert "aif_user_table_age_seconds{" in metrics and 'partition="1"' in metrics
        # a partition whose writer is gone: its users' rows are old, however new those of the others are
        server.hset(table.rows.key("ann").replace("s:ann", "progress"), "0", f"3 {time.time() - 1000}")
        until(lambda: served.table_from.positions == {0: 3, 1: 7})
        assert "the rows of users are 100" in client.rank(user="ann", candidates=IDS, k=3)["reason"]


def test_a_version_without_its_rows_is_not_published(tmp_path):
    exports().copied(tmp_path)
    rows_of("one").save(tmp_path / "users" / "one")
    (tmp_path / "current").write_text("one\n")
    with running(tmp_path, config=ROWS, nearline=Nearline(users=tmp_path / "users")) as service, service.client() as client:
        (tmp_path / "current").write_text("two\n")
        until(lambda: service.service.models.problem)
        assert "expected snapshots of two" in service.service.models.problem
        assert client.score(user="ann", candidates=IDS)["version"] == exports().index["one"].version
        rows_of("two").save(tmp_path / "users" / "two")
        until(lambda: client.score(user="ann", candidates=IDS)["version"] == exports().index["two"].version)
        assert not client.score(user="ann", candidates=IDS)["degraded"]


def test_a_newer_index_is_taken_over(tmp_path):
    world, directory = exports(), tmp_path / "index"
    world.index["one"].save(tmp_path / "first")
    index = ItemIndex.load(tmp_path / "first", world.index["one"].trained)
    ids, features = world.encoder.items({"item": [99], "category": ["tea"], "bid": [1.5]})
    with running(world.root / "one", nearline=Nearline(index=directory)) as service, service.client() as client:
        assert service.service.models.problem is None  # the job has written nothing yet
        assert client.score(**ANN, candidates=np.array([99]))["mask"].tolist() == [False]
        with IndexWriter.start(directory, index) as writer:
            writer.upsert(ids, features, position=41)
        until(lambda: client.score(**ANN, candidates=np.array([99]))["mask"].all())
        metrics = client.request("GET", "/metrics")[2].decode()
        line = next(line for line in metrics.splitlines() if line.startswith("aif_index_position{"))
        assert 'partition="0"' in line and line.endswith(" 41.0") and service.service.models.problem is None


def test_a_newer_index_is_no_older_though_its_writers_clock_was_set_back(tmp_path):
    world, directory = exports(), tmp_path / "index"
    world.index["one"].save(tmp_path / "first")
    index = ItemIndex.load(tmp_path / "first", world.index["one"].trained)
    with IndexWriter.start(directory, index) as writer:
        _, first = newer(ItemIndex, directory, "", None, index.trained)
        writer.delete([99], position=1)
        writer.snapshot()
        late = first.seconds - 3600
        os.utime(snapshots(directory)[-1] / "manifest.json", (late, late))
        _, second = newer(ItemIndex, directory, "", first, index.trained)
    assert second.positions == {0: 1} and second.seconds == first.seconds


def test_a_problem_at_the_start_is_forgotten_once_it_is_over(tmp_path, monkeypatch):
    exports().index["one"].save(tmp_path / "index")

    def late(*arguments):
        monkeypatch.undo()
        raise FileNotFoundError("comes a moment later")

    monkeypatch.setattr("aif_jax.service.models.newer", late)
    with running(exports().root / "one", nearline=Nearline(index=tmp_path / "index")) as service:
        until(lambda: service.service.models.held[0].index_from is not None and service.service.models.problem is None)
        assert service.service.models.failures == 1


def test_what_fails_delays_nothing_else(tmp_path, monkeypatch):
    """A torn index of the job: `current` and the users' rows of another export are taken over at the next look."""
    exports().copied(tmp_path)
    for name in ("one", "two"):
        rows_of(name).save(tmp_path / "users" / name / "000001-0000000001")
    exports().index["one"].save(tmp_path / "index" / "one")
    params = next((tmp_path / "index" / "one").glob("*.safetensors"))
    params.write_bytes(params.read_bytes()[:-4])
    (tmp_path / "current").write_text("one\ntwo share=0.5\n")
    monkeypatch.setattr("aif_jax.service.models.LONGEST_WAIT", 3600.0)
    nearline = Nearline(index=tmp_path / "index", users=tmp_path / "users")
    with running(tmp_path, config=ROWS, poll=0.01, nearline=nearline) as service:
        models = service.service.models
        until(lambda: models.failures >= 10)  # 10 s to the next try
        rows_of("two").save(tmp_path / "users" / "two" / "000002-0000000001")
        until(lambda: models.shares[1][1].table_from.path.name.startswith("000002"))
        (tmp_path / "current").write_text("torn share=2\n")
        until(lambda: "a share in [0, 1]" in models.problem)
        (tmp_path / "current").write_text("two\n")
        until(lambda: [served.entry.folder for _, served in models.shares] == ["two"])
        assert models.failures < 20


@pytest.mark.parametrize("part", ["index", "users"])
def test_what_is_too_old_is_marked_or_refused(tmp_path, part):
    table, world = rows_of(), exports()
    table.save(tmp_path / "users")
    world.index["one"].save(tmp_path / "index")
    for name in ("users", "index"):
        written = time.time() - (1000 if name == part else 0)
        os.utime(tmp_path / name / "manifest.json", (written, written))
    nearline = Nearline(users=tmp_path / "users", index=tmp_path / "index")
    policy = Policy(max_index_age=900, max_user_age=900)
    words = {"index": "index is", "users": "rows of users are"}[part]
    with running(world.root / "one", config=ROWS, policy=policy, nearline=nearline) as service, service.client() as client:
        answer = client.rank(user="ann", candidates=IDS, k=3)
        assert answer["degraded"] and re.search(rf"the {words} 1\d+ s old, more than 900 s", answer["reason"])
        assert client.request("GET", "/health/ready")[0] == 503
        service.service.policy = dataclasses.replace(policy, when_stale="refuse")
        with pytest.raises(ServiceError) as error:
            client.rank(user="ann", candidates=IDS, k=3)
        assert (error.value.code, error.value.status) == ("UNAVAILABLE", 503)
        metrics = client.request("GET", "/metrics")[2].decode()
        assert "aif_index_age_seconds{" in metrics and "aif_user_table_age_seconds{" in metrics


def test_snapshots_are_found_by_export_or_for_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected snapshots of monday or of every version"):
        newest(tmp_path, "monday")
