"""What the job of the index writes between two exports: newer indexes."""

import asyncio
import os
import shutil
import threading

import numpy as np
import pytest

from aif_jax.index import IndexWriter
from aif_jax.index.writer import snapshots
from aif_jax.readers import encode_items
from aif_jax.service.core import Service
from aif_jax.service.http import service_text
from aif_jax.service.models import LoadedModel, Models, newer, newest
from tests.refusals import refused_later
from tests.service_world import ANN, SERVING, exports, running, until

pytestmark = pytest.mark.lane("standing")


def test_a_newer_index_is_taken_over(tmp_path):
    world, directory = exports(), tmp_path / "index"
    ids, features = encode_items({"item": [99], "category": ["tea"], "bid": [1.5]}, world.encoder)
    with running(world.root / "one", index=directory) as service, service.client() as client:
        assert service.service.models.problem is None  # the job has written nothing yet
        assert client.score(**ANN, candidates=np.array([99]))["mask"].tolist() == [False]
        with IndexWriter.start(directory, world.index["one"]) as writer:
            writer.upsert(ids, features, position=41)
        until(lambda: client.score(**ANN, candidates=np.array([99]))["mask"].all())
        metrics = client.request("GET", "/metrics")[2].decode()
        line = next(line for line in metrics.splitlines() if line.startswith("aif_index_position{"))
        assert 'partition="0"' in line and line.endswith(" 41.0") and service.service.models.problem is None


def test_a_newer_index_is_no_older_though_its_writers_clock_was_set_back(tmp_path):
    world, directory = exports(), tmp_path / "index"
    index = world.index["one"]
    with IndexWriter.start(directory, index) as writer:
        _, first = newer(directory, "", None, index.trained)
        writer.delete([99], position=1)
        writer.snapshot()
        late = first.seconds - 3600
        os.utime(snapshots(directory)[-1] / "manifest.json", (late, late))
        _, second = newer(directory, "", first, index.trained)
    assert second.positions == {0: 1} and second.seconds == first.seconds


def test_a_problem_at_the_start_is_forgotten_once_it_is_over(tmp_path, monkeypatch, caplog):
    exports().index["one"].save(tmp_path / "index")

    def late(*arguments):
        monkeypatch.undo()
        raise FileNotFoundError("comes a moment later")

    monkeypatch.setattr("aif_jax.service.models.newer", late)
    with running(exports().root / "one", index=tmp_path / "index") as service:
        until(lambda: service.service.models.held[0].index_from is not None and service.service.models.problem is None)
        assert service.service.models.failures == 1 and "got none" not in caplog.text  # there was one


async def test_a_start_that_is_cut_off_leaves_no_thread(tmp_path, monkeypatch):
    cut_off = asyncio.get_running_loop().create_future()
    cut_off.cancel()
    monkeypatch.setattr(LoadedModel, "take_index", lambda *_: cut_off)
    await refused_later(asyncio.CancelledError, "", Models(exports().root / "one", index=tmp_path).start())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("aif-score", "aif-user"))]


async def test_what_fails_is_tried_no_more_often_than_it_is_polled(tmp_path, monkeypatch):
    waits = iter([60.0, 60.0])

    async def sleep(seconds):
        assert seconds == next(waits)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await refused_later(RuntimeError, "StopIteration", Models(tmp_path, poll=60.0)._follow("nothing", None))


def test_what_fails_delays_nothing_else(tmp_path, monkeypatch):
    """A torn index of one export: `current` and the index of another export are taken over at the next look."""
    exports().copied(tmp_path)
    exports().index["one"].save(tmp_path / "index" / "one")
    exports().index["two"].save(tmp_path / "index" / "two" / "0000000001")
    params = next((tmp_path / "index" / "one").glob("*.safetensors"))
    params.write_bytes(params.read_bytes()[:-4])
    (tmp_path / "current").write_text("one\ntwo share=0.5\n")
    monkeypatch.setattr("aif_jax.service.models.MAX_WAIT", 3600.0)
    with running(tmp_path, poll=0.01, index=tmp_path / "index") as service:
        models = service.service.models
        until(lambda: models.failures >= 10)  # 10 s to the next try
        exports().index["two"].save(tmp_path / "index" / "two" / "0000000002")
        until(lambda: models.serving[1].index_from.path.name == "0000000002")
        (tmp_path / "current").write_text("torn share=2\n")
        until(lambda: "a share in [0, 1]" in models.problem)
        (tmp_path / "current").write_text("two\n")
        until(lambda: [served.name for served in models.serving] == ["two"])
        assert models.failures < 20


async def test_a_version_that_comes_back_serves_the_newest_index_and_a_kept_one_has_no_age(tmp_path):
    index, models = exports().copied(tmp_path).index["one"], Models(tmp_path, config=SERVING, poll=60, index=tmp_path / "index")
    (tmp_path / "current").write_text("one\n")
    async with Service(models) as service:
        (tmp_path / "current").write_text("two\n")
        await models._swap()
        ages = [line for line in service_text(service).splitlines() if "_age_seconds{" in line]
        assert len(ages) == 2 and all('folder="two"' in line for line in ages)
        index.save(tmp_path / "index" / "one")
        (tmp_path / "current").write_text("one\n")
        await models._swap()
        assert models.serving[0].index_from is not None


def test_snapshots_are_found_by_export_or_for_all_and_again_where_others_of_their_name_were(tmp_path):
    (index := exports().index["one"]).save(path := tmp_path / "0000000001")
    assert newest(tmp_path / "none", "monday") is None
    assert newest(tmp_path, "monday") == newest(tmp_path, "") == path
    _, before = newer(tmp_path, "", None, index.trained)
    assert newer(tmp_path, "", before, index.trained) is None
    shutil.rmtree(path)
    index.save(path, positions={0: 2})
    assert newer(tmp_path, "", before, index.trained)[1].positions == {0: 2}
