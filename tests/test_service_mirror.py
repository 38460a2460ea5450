"""A service that follows a snapshot store: versions are fetched, verified, served; what breaks leaves the version before."""

import dataclasses
import os
import re
import shutil
import time

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.blocks import ItemOffset, popularity_offset, with_table
from aif_jax.connectors import SnapshotStore
from aif_jax.export import save
from aif_jax.service.current import mirror
from tests.refusals import refused
from tests.service_world import ANN, IDS, SERVING, exports, running, until

pytestmark = pytest.mark.lane("standing")


def test_a_service_follows_a_store(open_store, tmp_path, caplog):
    made, store, here, written = exports(), open_store(), tmp_path / "here", time.time() - 1000
    refused(FileNotFoundError, "expected a store with a current snapshot, got none", mirror, store, here)
    os.utime(shutil.copytree(made.root / "one", tmp_path / "one") / "manifest.json", (written, written))
    first = store.publish(tmp_path / "one")
    with running(here, store=store) as service, service.client() as client:
        models, one = service.service.models, client.rank(**ANN, candidates=IDS, k=3)
        assert one["version"] == made.index["one"].version
        assert 1000 <= time.time() - models.held[0].exported < 1100  # since the export was written
        store.publish(made.root / "two")
        until(lambda: client.rank(**ANN, candidates=IDS, k=3)["version"] == made.index["two"].version)
        store.publish(made.root / "one")
        until(lambda: client.rank(**ANN, candidates=IDS, k=3)["version"] == one["version"])
        np.testing.assert_array_equal(client.rank(**ANN, candidates=IDS, k=3)["ids"], one["ids"])
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "rows").write_text("no export")
        store.publish(tmp_path / "broken")
        until(lambda: models.failures > 2)
        assert client.rank(**ANN, candidates=IDS, k=3)["version"] == one["version"]
        assert "expected an exported folder" in models.problem
        assert re.search(r"^aif_problem\S* 1", client.request("GET", "/metrics")[2].decode(), re.M)
        assert 1 < caplog.text.count("not taken over") <= models.failures < 10  # less and less often, not at each look
        store.publish(made.root / "two")
        until(lambda: models.problem is None)
        until(lambda: not (here / first).exists())  # it goes after the service has changed over
        assert sum(path.is_dir() for path in here.iterdir()) == 3


def test_a_service_ranks_by_the_orders_and_the_offset_of_its_export(tmp_path):
    """The export's orders are the service's, next to those that the operator gives."""
    made, counts = exports(), np.arange(len(IDS) + 1)
    params, config = with_table(made.params["one"], popularity_offset(counts), ItemOffset(), config=made.model.config)
    trained = aif.Trained(aif.build(config), params, made.encoder)
    index = aif.ItemIndex.build(trained, made.catalogue, batch_size=64, progress=False)
    save(tmp_path / "export", trained, index, platforms=("cpu",), orders={"value": lambda p, bid: p[""] * bid * bid})
    serving = dataclasses.replace(SERVING, orders={"cheap": lambda p, bid: p[""] / (1 + bid)})
    with running(tmp_path / "export", config=serving) as service, service.client() as client:
        scores = client.score(**ANN, candidates=IDS)["logits"]
        rows = np.asarray(made.encoder.vocabularies["item"].encode(np.asarray(IDS)))
        np.testing.assert_allclose(scores, made.logits("one") + popularity_offset(counts)[rows], rtol=1e-5, atol=1e-4)
        probability, bid = 1 / (1 + np.exp(-scores)), np.linspace(1, 2, len(IDS))
        for order, value in (("value", probability * bid**2), ("cheap", probability / (1 + bid)), ("bid", probability * bid)):
            best = client.rank(**ANN, candidates=IDS, k=4, order=order)
            np.testing.assert_allclose(best["scores"], np.sort(value)[::-1][:4], rtol=1e-4)
        usual = client.rank(**ANN, candidates=IDS, k=4)
        assert usual["scores"].tolist() == usual["logits"].tolist()


def test_a_restart_serves_what_was_fetched_while_the_store_is_away(tmp_path):
    store, here = SnapshotStore(tmp_path / "store"), tmp_path / "here"
    store.publish(exports().root / "one")
    name = mirror(store, here)
    shutil.move(tmp_path / "store", tmp_path / "away")
    with running(here, store=store) as service:
        until(lambda: service.service.models.problem)
        assert (here / "current").read_text() == f"{name}\n"
    refused(FileNotFoundError, "expected a store with a current snapshot", running(tmp_path / "new", store=store).__enter__)
