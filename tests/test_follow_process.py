"""`aif-jax refresh --follow` as a process, beside a real broker of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest

import aif_jax as aif
from aif_jax.connectors import SnapshotStore
from aif_jax.export import Delta
from tests import follow_world as world
from tests import refresh_world as shop
from tests.conftest import child_environment
from tests.test_update_streams import Broker


@pytest.mark.parametrize("kind", ["valkey", "kafka"])
def test_the_command_publishes_what_a_stream_moves(kind, request, tmp_path):
    store = SnapshotStore(tmp_path / "store")
    store.publish(world.export_of(tmp_path / "export"))
    for name, table in (("events", world.files()), ("items", shop.items(5))):
        pa.csv.write_csv(pa.table(table), tmp_path / f"{name}.csv")
    broker = Broker(kind, request.getfixturevalue({"valkey": "valkey_url", "kafka": "kafka_address"}[kind]), "events")
    for number, message in enumerate(world.messages(world.until(tmp_path / "store"))):
        broker.send(message, partition=number % 2)
    words = [
        "refresh", "--follow", broker.url, "--every", "0s", "--batches", "2", "--max-messages", "8", "--batch-size", "32",
        "--events", str(tmp_path / "events.csv"), "--items", str(tmp_path / "items.csv"), "--out", str(tmp_path / "store"),
        "--learning-rate", "0.02", "--requests", "40", "--json", "--gate", "users=5", "gauc=0.2", "log_loss=0.5",
        "calibration=0.5", "overlap=0", "slowdown=1000",
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "aif_jax", *words], env=child_environment(), capture_output=True, text=True, timeout=250
    )
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout)
    assert made["published"] == 2 and made["refused"] == 0 and made["trained"] > 0
    deltas = SnapshotStore(tmp_path / "store" / "deltas")
    read = [Delta.load(deltas.fetch(tmp_path / "here", name)) for name in deltas.names()]
    assert [delta.number for delta in read] == [1, 2] and read[1].base == read[0].version and read[1].version == made["version"]
    assert read[0].base == aif.open(tmp_path / "export").version and read[0].users is not None
    assert "refresh: batch 000002: published" in ended.stderr and Path(f"{tmp_path / 'store'}.follow").is_dir()
