"""A service that follows a snapshot store: versions are fetched, verified, served; what breaks leaves the version before."""

from __future__ import annotations

import dataclasses
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
from aif_jax.service.exports import Mirror
from tests import servers
from tests.service_world import EVENTS, IDS, NOW, SERVING, exports, running

ANN = {"user": "ann", "record": {"user": "ann"}, "events": EVENTS, "now": NOW}


@pytest.fixture(scope="module")
def bucket():
    """Options of an S3 server."""
    with servers.s3() as options:
        yield options


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path):
    if request.param == "disk":
        return SnapshotStore(tmp_path / "store")
    return SnapshotStore(f"s3://bucket/{tmp_path.name}", **request.getfixturevalue("bucket"))


def version_after(client, before: str, seconds: float = 60.0) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        version = client.rank(**ANN, candidates=IDS, k=3)["version"]
        if version != before:
            return version
        time.sleep(0.02)
    raise AssertionError(f"no other version within {seconds} s")


def test_a_service_follows_a_store(store, tmp_path):
    made, here = exports(), tmp_path / "here"
    with pytest.raises(FileNotFoundError, match="expected a store with a current snapshot, got none"):
        Mirror(store, here).update()
    first = store.publish(made.root / "one")
    with Mirror(store, here, keep=2, poll=0.05) as mirror, running(here) as service, service.client() as client:
        one = client.rank(**ANN, candidates=IDS, k=3)
        assert one["version"] == made.index["one"].version
        store.publish(made.root / "two")
        assert version_after(client, one["version"]) == made.index["two"].version
        store.publish(made.root / "one")
        assert version_after(client, made.index["two"].version) == one["version"]
        np.testing.assert_array_equal(client.rank(**ANN, candidates=IDS, k=3)["ids"], one["ids"])
        end = time.monotonic() + 30
        while (here / first).exists() and time.monotonic() < end:  # the mirror removes it after the service has changed over
            time.sleep(0.02)
        assert len(store.names_in(here)) == 2 and not (here / first).exists()
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "rows").write_text("no export")
        store.publish(tmp_path / "broken")
        end = time.monotonic() + 30
        while not mirror.failures and time.monotonic() < end:
            time.sleep(0.02)
        assert mirror.failures and client.rank(**ANN, candidates=IDS, k=3)["version"] == one["version"]


def test_a_service_ranks_by_the_score_expressions_of_its_export(tmp_path):
    """The export's orders are the service's, next to those that the operator gives."""
    made = exports()
    model, params = made.model, made.params["one"]
    save(
        tmp_path / "export", Trained(model, params, made.encoder), made.index["one"], platforms=("cpu",), stablehlo=False,
        orders={"value": "p * bid * bid"},
    )  # fmt: skip
    config = dataclasses.replace(SERVING, orders={"cheap": "p / (1 + bid)"})
    with running(tmp_path / "export", config=config) as service, service.client() as client:
        scores = client.score(**ANN, candidates=IDS)["logits"]
        probability, bid = 1 / (1 + np.exp(-scores)), np.linspace(1, 2, len(IDS))
        for order, value in (("value", probability * bid**2), ("cheap", probability / (1 + bid)), ("bid", probability * bid)):
            best = client.rank(**ANN, candidates=IDS, k=4, order=order)
            np.testing.assert_allclose(best["scores"], np.sort(value)[::-1][:4], rtol=1e-4)
        assert (
            client.rank(**ANN, candidates=IDS, k=4)["scores"].tolist()
            == client.rank(**ANN, candidates=IDS, k=4)["logits"].tolist()
        )


def test_an_offset_of_items_is_served(tmp_path):
    made = exports()
    counts = np.arange(len(IDS) + 1)
    params, config = with_item_offset(made.params["one"], popularity_offset(counts), config=made.model.config)
    model = build(config)
    trained = Trained(model, params, made.encoder)
    index = ItemIndex.build(trained, made.catalogue, batch_size=64, progress=False)
    save(tmp_path / "export", trained, index, platforms=("cpu",), stablehlo=False)
    with running(made.root / "one") as service, service.client() as client:
        before = client.score(**ANN, candidates=IDS)["logits"]
    with running(tmp_path / "export") as service, service.client() as client:
        after = client.score(**ANN, candidates=IDS)["logits"]
    rows = np.asarray(made.encoder.vocabularies["item"].encode(np.asarray(IDS)))
    np.testing.assert_allclose(after, before + popularity_offset(counts)[rows], rtol=1e-5, atol=1e-4)


def test_a_mirror_names_what_it_cannot_do(tmp_path):
    store = SnapshotStore(tmp_path / "store")
    for options, message in (({"keep": 0}, "keep: expected at least 1"), ({"poll": 0}, "poll: expected more than 0 seconds")):
        with pytest.raises(ValueError, match=message):
            Mirror(store, tmp_path, **options)
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
