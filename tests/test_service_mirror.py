"""A service that follows a snapshot store: versions are fetched, verified, served; what breaks leaves the version before."""

import dataclasses
import os
import re
import shutil
import time

import numpy as np
import pytest

from aif_jax import Trained
from aif_jax.blocks import popularity_offset, with_item_offset
from aif_jax.connectors import SnapshotStore
from aif_jax.export import save
from aif_jax.index import ItemIndex
from aif_jax.model import build
from aif_jax.service.models import Mirror
from tests.service_world import ANN, IDS, SERVING, exports, running, until


def version_after(client, before: str, seconds: float = 60.0) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        version = client.rank(**ANN, candidates=IDS, k=3)["version"]
        if version != before:
            return version
        time.sleep(0.02)
    raise AssertionError(f"no other version within {seconds} s")


def test_a_service_follows_a_store(open_store, tmp_path, caplog):
    made, store, here, written = exports(), open_store(), tmp_path / "here", time.time() - 1000
    with pytest.raises(FileNotFoundError, match="expected a store with a current snapshot, got none"):
        Mirror(store, here).update()
    os.utime(shutil.copytree(made.root / "one", tmp_path / "one") / "manifest.json", (written, written))
    first = store.publish(tmp_path / "one")
    with Mirror(store, here, keep=2, poll=0.05) as mirror, running(here) as service, service.client() as client:
        one = client.rank(**ANN, candidates=IDS, k=3)
        assert one["version"] == made.index["one"].version
        assert 1000 <= service.service.models.held[0].age < 1100  # since the export was written
        store.publish(made.root / "two")
        assert version_after(client, one["version"]) == made.index["two"].version
        store.publish(made.root / "one")
        assert version_after(client, made.index["two"].version) == one["version"]
        np.testing.assert_array_equal(client.rank(**ANN, candidates=IDS, k=3)["ids"], one["ids"])
        until(lambda: not (here / first).exists())  # the mirror removes it after the service has changed over
        assert len(store.names_in(here)) == 2
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "rows").write_text("no export")
        store.publish(tmp_path / "broken")
        until(lambda: mirror.failures > 2)
        assert client.rank(**ANN, candidates=IDS, k=3)["version"] == one["version"]
        assert "not fetched, the versions before go on" in service.service.models.problem  # also in other processes
        assert re.search(r"^aif_problem\S* 1", client.request("GET", "/metrics")[2].decode(), re.M)
        assert caplog.text.count("not fetched") == 1  # not again at each look
        store.publish(made.root / "two")
        until(lambda: service.service.models.problem is None)


def test_a_service_ranks_by_the_orders_and_the_offset_of_its_export(tmp_path):
    """The export's orders are the service's, next to those that the operator gives."""
    made, counts = exports(), np.arange(len(IDS) + 1)
    params, config = with_item_offset(made.params["one"], popularity_offset(counts), config=made.model.config)
    trained = Trained(build(config), params, made.encoder)
    index = ItemIndex.build(trained, made.catalogue, batch_size=64, progress=False)
    orders = {"value": lambda p, bid: p[""] * bid * bid}
    save(tmp_path / "export", trained, index, platforms=("cpu",), orders=orders)
    serving = dataclasses.replace(SERVING, orders={"cheap": lambda p, bid: p[""] / (1 + bid)})
    with running(tmp_path / "export", config=serving) as service, service.client() as client:
        scores = client.score(**ANN, candidates=IDS)["logits"]
        rows = np.asarray(made.encoder.vocabularies["item"].encode(np.asarray(IDS)))
        np.testing.assert_allclose(scores, made.logits("one") + popularity_offset(counts)[rows], rtol=1e-5, atol=1e-4)
        probability, bid = 1 / (1 + np.exp(-scores)), np.linspace(1, 2, len(IDS))
        for order, value in (("value", probability * bid**2), ("cheap", probability / (1 + bid)), ("bid", probability * bid)):
            best = client.rank(**ANN, candidates=IDS, k=4, order=order)
            np.testing.assert_allclose(best["scores"], np.sort(value)[::-1][:4], rtol=1e-4)
        assert (
            client.rank(**ANN, candidates=IDS, k=4)["scores"].tolist()
            == client.rank(**ANN, candidates=IDS, k=4)["logits"].tolist()
        )


def test_a_restart_serves_the_mirror_while_the_store_is_away(tmp_path):
    store, here = SnapshotStore(tmp_path / "store"), tmp_path / "here"
    name = store.publish(exports().root / "one")
    Mirror(store, here).update()
    shutil.move(tmp_path / "store", tmp_path / "away")
    with Mirror(store, here, poll=60) as mirror:
        assert mirror.failures == 1 and (here / "current").read_text() == f"{name}\n"
    with pytest.raises(FileNotFoundError, match="expected a store with a current snapshot"), Mirror(store, tmp_path / "new"):
        pass


def test_a_mirror_of_one_version_fetches_and_keeps_it(tmp_path):
    store, here = SnapshotStore(tmp_path / "store", keep=9), tmp_path / "here"
    first = store.publish(exports().root / "one")
    store.publish(exports().root / "two")
    with Mirror(store, here, keep=1, poll=60, only=first) as mirror:  # on a machine that has nothing yet
        for _ in range(3):
            store.publish(exports().root / "two")
            assert mirror.update() == first
        assert store.names_in(here) == [first]
    with pytest.raises(ValueError, match="expected the name of a snapshot"):
        Mirror(store, tmp_path / "new", only="tuesday").update()


def test_a_mirror_names_what_it_cannot_do(tmp_path):
    store = SnapshotStore(tmp_path / "store")
    for options, message in (({"keep": 0}, "keep: expected at least 1"), ({"poll": 0}, "poll: expected more than 0 seconds")):
        with pytest.raises(ValueError, match=message):
            Mirror(store, tmp_path, **options)
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
