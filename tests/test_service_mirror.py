"""A service that follows a snapshot store: versions are fetched, verified, served; what breaks leaves the version before."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import Trained
from aif_jax.blocks import popularity_offset, with_item_offset
from aif_jax.cli import main
from aif_jax.connectors import SnapshotStore
from aif_jax.export import save
from aif_jax.index import ItemIndex
from aif_jax.jobs import join_outcomes
from aif_jax.model import build
from aif_jax.refreshing import watch
from aif_jax.scores import with_calibration
from aif_jax.service.client import ServiceError
from aif_jax.service.log import RequestLog, read_log
from aif_jax.service.models import Mirror
from tests import demo
from tests.beside import meanwhile
from tests.service_world import ANN, IDS, ITEMS, SERVING, exports, running, until

LONG = {"item": [17, 1017] * 4, "time": [1_700_000_000 + n for n in range(8)]}


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


def test_a_version_that_does_worse_in_service_is_taken_back(tmp_path, capsys):
    """The new version has the vocabulary of another shop, of the same size: it knows nobody's history."""
    made, store = exports(), SnapshotStore(tmp_path / "store")
    ids = np.where(np.arange(ITEMS) < ITEMS // 2, IDS + 1, IDS)  # half of the items are unknown to it, those of the history
    elsewhere = {"item": ids, "category": ["tea", "cup", "pot", "tin"] * (ITEMS // 4), "bid": [1.0] * ITEMS}
    events = {"user": ["ann", "bob", "cem"], "item": ids[:3], "time": [1_699_000_000 + n for n in range(3)]}
    data = aif.read(events, items=elsewhere, columns=made.encoder.columns)
    other = Trained(build(made.model.config.replace(schema=data.schema)), None, data.encoder)
    other = other.replace(params=demo.init(other.model, 0, items=data.catalogue))
    index = ItemIndex.build(other, data.catalogue, batch_size=64, progress=False)
    save(tmp_path / "other", other, index, platforms=("cpu",), stablehlo=False)
    first = store.publish(made.root / "one")
    given = ["--out", store.url, "--every", "0.1", "--requests", "50", "--slowdown", "1000"]
    with Mirror(store, tmp_path / "here", keep=2, poll=0.05), running(tmp_path / "here", keep=2) as service:
        given += ["--service", service.addresses["http"]]
        assert main(["watch", *given]) == 2 and "expected a snapshot to go back to" in capsys.readouterr().err
        with (
            service.client() as client,
            service.client() as asker,
            meanwhile(lambda: client.rank(**ANN | {"events": LONG}, candidates=IDS, k=3), ignoring=(ServiceError,)),
        ):
            (tmp_path / "torn").mkdir()
            shutil.copy(tmp_path / "other" / "manifest.json", tmp_path / "torn")
            store.publish(tmp_path / "torn")
            assert main(["watch", *given, "--minutes", "0.02"]) == 3 and store.current() == first
            assert "the service did not take it over within 0.02 minutes" in capsys.readouterr().out
            second = store.publish(made.root / "two")
            assert main(["watch", *given, "--minutes", "0.05"]) == 0 and store.current() == second
            assert re.search(rf"{second} stays; it had \d+ requests, 50 are needed|{second} stays\n", capsys.readouterr().out)
            store.publish(tmp_path / "other")
            assert main(["watch", *given, "--minutes", "0.5"]) == 3 and store.current() == second
            assert f"is taken back, {second} is current: 100.0% of" in capsys.readouterr().out
            assert version_after(asker, other.version) == made.index["two"].version
    assert main(["watch", *given, "--minutes", "0.001"]) == 1  # nobody answers any more
    assert "Connection refused" in capsys.readouterr().err and store.names()[:2] == [first, second]


def test_a_version_whose_predictions_do_not_come_true_is_taken_back(tmp_path, capsys):
    """Clicks follow the first version. Another one predicts alike and stays; one that predicts far too much is taken back."""
    made, store, samples = exports(), SnapshotStore(tmp_path / "store"), tmp_path / "samples"
    encoder, rng = made.encoder.with_length(made.model.config.history_length), np.random.default_rng(0)

    def publish(name: str, more: float, *, calibration: bool = True) -> str:
        offset = np.full(ITEMS + 1, more + 3, np.float32)  # logits 3 above those of the calibrated probabilities
        params, config = with_item_offset(made.params["one"], offset, config=made.model.config)
        if calibration:
            params = with_calibration(params, {"scale": np.asarray(1, np.float32), "bias": np.asarray(-3, np.float32)})
        trained = Trained(build(config), params, made.encoder)
        index = ItemIndex.build(trained, made.catalogue, batch_size=64, progress=False)
        save(tmp_path / name, trained, index, platforms=("cpu",), stablehlo=False)
        return store.publish(tmp_path / name)

    def served(service, client, version: str) -> None:
        """Forty users rank, and click as the first version predicts; the log is joined with what they did."""
        log = RequestLog(tmp_path / "log" / version)
        service.service.observers.append(log)
        for user in range(40):
            client.rank(**ANN | {"user": f"user {user}", "id": f"{version} {user}"}, candidates=IDS, k=5)
        service.service.observers.remove(log)
        log.close()
        clicks = {"request": [], "item": [], "time": [], "outcome": []}
        for record in read_log(log.folder):
            assert record.version == version
            truth = 1 / (1 + np.exp(-made.logits("one", ids=record.ids)))
            for item in np.array(record.ids)[rng.random(len(truth)) < truth].tolist():
                row = {"request": record.id, "item": item, "time": int(record.time) + 1, "outcome": "click"}
                clicks = {name: [*column, row[name]] for name, column in clicks.items()}
        join_outcomes(
            log.folder, clicks, samples / version, encoder=encoder, windows={"click": 60}, until=int(time.time()) + 100
        )

    given = ["--out", store.url, "--every", "0.1", "--slowdown", "1000", "--minutes", "0.01", "--samples", str(samples)]
    publish("truth", 0.0)
    with Mirror(store, tmp_path / "here", keep=3, poll=0.05), running(tmp_path / "here", keep=3) as service:
        given += ["--service", service.addresses["http"]]
        with service.client() as client:
            versions = [version_after(client, "")]
            served(service, client, versions[0])
            second = publish("alike", 0.05)
            versions.append(version_after(client, versions[0]))
            assert main(["watch", *given]) == 0 and store.current() == second
            text = capsys.readouterr().out
            assert f"{second} stays; it had 1 requests, 100 are needed" in text and "outcomes of 0 and 40 users" in text
            served(service, client, versions[1])
            assert main(["watch", *given, "--users", "30"]) == 0 and store.current() == second
            assert "; outcomes of 40 and 40 users" in capsys.readouterr().out
            publish("too much", 2.0)
            served(service, client, version_after(client, versions[1]))
            assert main(["watch", *given]) == 0  # 40 users are too few by default
            assert main(["watch", *given, "--users", "30"]) == 3 and store.current() == second
            text = capsys.readouterr().out
            assert f"is taken back, {second} is current: predicted over observed is" in text and "normalized entropy" in text
            assert version_after(client, client.rank(**ANN, candidates=IDS, k=3)["version"]) == versions[1]
            third = publish("no probabilities", 0.0, calibration=False)
            served(service, client, version_after(client, versions[1]))
            assert main(["watch", *given, "--users", "30"]) == 0 and store.current() == third
            text = capsys.readouterr().out
            assert "outcomes are not judged of models with an SVD term" in text and f"{third} stays" in text
    store.rollback()
    record = json.loads((samples / versions[0] / "samples.json").read_text())
    (samples / versions[0] / "samples.json").write_text(json.dumps({k: v for k, v in record.items() if k != "versions"}))
    with pytest.raises(ValueError, match="none; join them again with this release"):
        watch(lambda: "", store, samples=samples)


def test_a_service_ranks_by_the_score_expressions_and_the_offset_of_its_export(tmp_path):
    """The export's orders are the service's, next to those that the operator gives."""
    made, counts = exports(), np.arange(len(IDS) + 1)
    params, config = with_item_offset(made.params["one"], popularity_offset(counts), config=made.model.config)
    trained = Trained(build(config), params, made.encoder)
    index = ItemIndex.build(trained, made.catalogue, batch_size=64, progress=False)
    orders = {"value": "p * bid * bid"}
    save(tmp_path / "export", trained, index, platforms=("cpu",), stablehlo=False, orders=orders)
    serving = dataclasses.replace(SERVING, orders={"cheap": "p / (1 + bid)"})
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
