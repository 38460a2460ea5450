"""Replicas of a small service as processes, the two versions that they serve, and what each version answers."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.service.current import publish
from tests.servers import free_port
from tests.service_world import IDS, NOW, exports

CALLS, USERS = 4, 24
"""Calls of a user, so that all but a quarter can find a state, and users."""


class World:
    """The versions "one" and "two" of `service_world`, calls of twice as many users, and what each version answers to them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.events = [{"item": rng.choice(IDS, 12), "time": NOW - rng.integers(100, 10**6, 12)} for _ in range(2 * USERS)]
        self.candidates = rng.choice(IDS, 30, replace=False)
        self.logits = {
            index.version: [exports().logits(name, events, user="nobody") for events in self.events]
            for name, index in exports().index.items()
        }

    def copy(self, folder: Path) -> Path:
        """A copy of both versions whose file `current` names the first: what one replica follows."""
        exports().copied(folder)
        publish(folder, ["one"])
        return folder

    def call(self, user: int) -> dict[str, Any]:
        """The fields of a call: raw events, so that the same call finds the state of the one before it in the cache."""
        return {"user": f"user {user}", "events": self.events[user], "now": NOW, "candidates": self.candidates, "k": 5}

    def play(self, ask: Callable[[dict[str, Any]], dict[str, Any]], order: np.ndarray) -> dict[str, Any]:
        """Calls one after another: the share whose state was cached, how many versions answered, answers that mix them."""
        answers = [(user, ask(self.call(user))) for user in order.tolist()]
        return {
            "hit_share": np.mean(["user" not in answer["stages"] for _, answer in answers]),
            "versions": len({answer["version"] for _, answer in answers}),
            "mixed": sum(not self.is_of_one_version(*each) for each in answers),
        }

    def is_of_one_version(self, user: int, answer: dict[str, Any]) -> bool:
        """Whether the ids and logits of an answer are the best that its version gives, and of no other."""
        logits = self.logits[answer["version"]][user]
        best = np.sort(logits[np.searchsorted(IDS, self.candidates)])[::-1][: len(answer["ids"])]
        own = logits[np.searchsorted(IDS, answer["ids"])]
        return np.allclose(answer["logits"], own, atol=1e-4) and np.allclose(answer["logits"], best, atol=1e-4)


class Replica:
    """`aif-jax serve FOLDER` on loopback, which starts with the object; its `address` is the same after a restart."""

    def __init__(self, folder: Path):
        self.folder, port = folder, str(free_port())
        self.address = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "aif_jax", "serve", str(folder), "--port", port, "--poll", "0.1"]
        self._command += ["--log-level", "error", "--serving.buckets", "64", "--serving.max-k", "64"]
        self.start()

    def start(self) -> "Replica":
        """Starts it, without waiting."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        return self

    def wait(self) -> None:
        """Waits until it is ready; RuntimeError where it ends instead."""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"the replica did not start: exit code {self.process.wait()}")

    def kill(self) -> None:
        """SIGKILL: no call in flight is answered."""
        self.end(signal.SIGKILL)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends it by a signal."""
        self.process.send_signal(how)
        try:
            self.process.communicate(timeout=60)
        finally:
            self.process.kill()
