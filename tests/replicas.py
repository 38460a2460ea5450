"""Replicas of a small service as processes, the two versions that they serve, and what each version answers."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import ItemIndex, export
from aif_jax.service.current import publish
from tests.servers import free_port

NAMES = ("monday", "tuesday")
NOW = 1_700_000_000


class World:
    """Exports "monday" and "tuesday" of one model in a folder, the calls of users, and the logits of each version."""

    def __init__(self, folder: Path, *, users: int):
        rng = np.random.default_rng(0)
        self.folder, self.ids = folder, 1000 + 7 * np.arange(120)
        items = {"item": self.ids, "category": [f"c{number % 10}" for number in range(120)], "bid": np.linspace(1, 2, 120)}
        self._events = {"user": np.repeat(np.arange(users), 12), "item": rng.choice(self.ids, 12 * users)}
        self._events["time"] = NOW - rng.integers(100, 10**6, 12 * users)
        data = aif.read(self._events, items=items, columns=aif.Columns(side=("bid",)))
        sizes: dict[str, Any] = {"width": 8, "short_length": 4, "long_length": 8, "towers": (8,), "sequence": False}
        model = aif.build(aif.presets.two_tower(data.schema, **sizes))
        self.candidates = rng.choice(self.ids, 50, replace=False)
        encode = data.encoder.with_length(model.config.history_length)
        features = [encode.user(None, self.events(number), NOW) for number in range(users)]
        user, score = jax.jit(model.user), jax.jit(model.interaction)
        self.logits: dict[str, list[np.ndarray]] = {}  # float32 [items] by version and user
        for seed, name in enumerate(NAMES):
            params = model.init(jax.random.key(seed), data.catalogue)
            index = ItemIndex.build(aif.Trained(model, params, data.encoder), [items], progress=False)
            export.save(folder / name, index.trained, index, platforms=(jax.default_backend(),))
            rows, _ = index.take(self.ids)
            self.logits[index.version] = [np.asarray(score(params, user(params, each), rows)) for each in features]

    def copy(self, folder: Path) -> Path:
        """A copy of the folder whose file `current` names the first version: what one replica follows."""
        for each in NAMES:
            shutil.copytree(self.folder / each, folder / each)
        publish(folder, NAMES[:1])
        return folder

    def call(self, user: int) -> dict[str, Any]:
        """The fields of a call: raw events, so that the same call finds the state of the one before it in the cache."""
        return {"user": user, "events": self.events(user), "now": NOW, "candidates": self.candidates, "k": 5}

    def events(self, user: int) -> dict[str, np.ndarray]:
        """Raw events of a user."""
        own = self._events["user"] == user
        return {name: self._events[name][own] for name in ("item", "time")}

    def is_of_one_version(self, user: int, answer: dict[str, Any]) -> bool:
        """Whether the ids and logits of an answer are the best that its version gives, and of no other."""
        logits = self.logits[answer["version"]][user]
        wanted = np.sort(logits[np.searchsorted(self.ids, self.candidates)])[::-1][: len(answer["ids"])]
        own = logits[np.searchsorted(self.ids, answer["ids"])]
        return np.allclose(answer["logits"], own, atol=1e-4) and np.allclose(answer["logits"], wanted, atol=1e-4)


class Replica:
    """`aif-jax serve FOLDER` on loopback: starts with the object, is ready after `wait`.

    Attributes:
      address: of HTTP, the same after a restart.
      process: that serves.
    """

    def __init__(self, folder: Path):
        port = str(free_port())
        self.address = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "aif_jax", "serve", str(folder), "--port", port, "--poll", "0.1"]
        self._command += ["--log-level", "error", "--serving", "buckets=[64]", "max_k=64"]
        self.process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def wait(self) -> "Replica":
        """Wait until it is ready; RuntimeError where it ends instead."""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"the replica did not start: exit code {self.process.wait()}")
        return self

    def kill(self) -> None:
        """Send SIGKILL: no call in flight is answered."""
        self.process.kill()
        self.process.wait(60)

    def start(self) -> "Replica":
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
