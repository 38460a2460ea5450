"""Replicas of a service as processes, and the small model that they serve."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import ItemIndex, export
from aif_jax.service.models import publish

NAMES = ("monday", "tuesday")
NOW = 1_700_000_000


class World:
    """Exports "monday" and "tuesday" of one model in a folder, the calls of users, and the logits of each version."""

    def __init__(self, folder: Path, *, items: int = 120, users: int = 40, candidates: int = 50, small: bool = True):
        rng = np.random.default_rng(0)
        self.folder = folder
        self.ids = 1000 + 7 * np.arange(items)
        self.items = {"item": self.ids, "category": [f"c{number % 10}" for number in range(items)]}
        self.items["bid"] = np.linspace(1, 2, items)
        count = 12 * users
        self._events = {"user": np.repeat(np.arange(users), 12), "item": rng.choice(self.ids, count)}
        self._events["time"] = NOW - rng.integers(100, 10**6, count)
        data = aif.read(self._events, items=self.items, columns=aif.Columns(side=("bid",)))
        sizes: dict[str, Any] = {"width": 8, "short_length": 4, "long_length": 8, "towers": (8,), "sequence": False}
        preset = aif.presets.two_tower(data.schema, **sizes) if small else aif.presets.aif(data.schema, long_length=512)
        self.model = aif.build(preset)
        self.encoder, self.users = data.encoder, range(users)
        self.candidates, self.count = rng.choice(self.ids, candidates, replace=False), candidates
        encode = self.encoder.with_length(self.model.config.history_length)
        self.features = [encode.user(None, self.events(number), NOW) for number in self.users]
        self.params = {name: self.model.init(jax.random.key(seed), data.catalogue) for seed, name in enumerate(NAMES)}
        self.logits: dict[str, dict[int, np.ndarray]] = {}  # float32 [items] by version and user
        for name in NAMES:
            index = self.index(name)
            self.save(folder, name, index)
            self.logits[index.version] = self._logits(name, index)

    def index(self, name: str, **options: Any) -> ItemIndex:
        """Return the index of a version; options of `ItemIndex.build`."""
        trained = aif.Trained(self.model, self.params[name], self.encoder)
        return ItemIndex.build(trained, [self.items], **({"progress": False} | options))

    def save(self, folder: Path, name: str, index: ItemIndex) -> None:
        """Export a version with an index."""
        platforms = (jax.default_backend(),)
        export.save(folder / name, index.trained, index, platforms=platforms)

    def copy(self, folder: Path) -> Path:
        """Return a copy of the folder whose file `current` names the first version: what one replica follows."""
        for each in NAMES:
            shutil.copytree(self.folder / each, folder / each)
        publish(folder, NAMES[:1])
        return folder

    def call(self, user: int, *, k: int = 5) -> dict[str, Any]:
        """Return the fields of a call: raw events, so that the same call finds the state of the one before it in the cache."""
        return {"user": user, "events": self.events(user), "now": NOW, "candidates": self.candidates, "k": k}

    def events(self, user: int) -> dict[str, np.ndarray]:
        """Return raw events of a user."""
        own = self._events["user"] == user
        return {name: self._events[name][own] for name in ("item", "time")}

    def is_of_one_version(self, user: int, answer: dict[str, Any]) -> bool:
        """Return whether the ids and logits of an answer are the best that its version gives, and of no other."""
        logits = self.logits[answer["version"]][user]
        wanted = np.sort(logits[np.searchsorted(self.ids, self.candidates)])[::-1][: len(answer["ids"])]
        own = logits[np.searchsorted(self.ids, answer["ids"])]
        return np.allclose(answer["logits"], own, atol=1e-4) and np.allclose(answer["logits"], wanted, atol=1e-4)

    def _logits(self, name: str, index: ItemIndex) -> dict[int, np.ndarray]:
        rows, _ = index.take(self.ids)
        user, score, params = jax.jit(self.model.user), jax.jit(self.model.interaction), self.params[name]
        return {number: np.asarray(score(params, user(params, each), rows)) for number, each in enumerate(self.features)}


class Replica:
    """`aif-jax serve FOLDER` on loopback: starts with the object, is ready after `wait`.

    Attributes:
      address: of HTTP, the same after a restart.
      process: that serves.
    """

    def __init__(self, folder: Path, *words: str, buckets: Sequence[int], max_k: int = 64):
        port = str(free_port())
        self.address = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "aif_jax", "serve", str(folder), "--port", port, "--poll", "0.1", *words]
        self._command += ["--log-level", "error", "--serving", f"buckets={json.dumps(list(buckets))}", f"max_k={max_k}"]
        self.process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def wait(self) -> Replica:
        """Wait until it is ready; RuntimeError where it ends instead."""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"the replica did not start: exit code {self.process.wait()}")
        return self

    def __enter__(self) -> Replica:
        return self.wait()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def kill(self) -> None:
        """Send SIGKILL: no call in flight is answered."""
        self.process.kill()
        self.process.wait(60)

    def start(self) -> Replica:
        """Start it again on its port, without waiting."""
        self.stop()
        self.process = self._started()
        return self

    def stop(self) -> None:
        """Send SIGTERM, and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
