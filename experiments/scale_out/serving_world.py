"""Two versions of a small model, exported, and what each must answer: for `service_load`, replicas and parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import export
from aif_jax.index import ItemIndex
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
        """The index of a version; options of `ItemIndex.build`."""
        trained = aif.Trained(self.model, self.params[name], self.encoder)
        return ItemIndex.build(trained, [self.items], **({"progress": False} | options))

    def save(self, folder: Path, name: str, index: ItemIndex) -> None:
        """Exports a version with an index."""
        platforms = (jax.default_backend(),)
        export.save(folder / name, index.trained, index, platforms=platforms, stablehlo=False)

    def copy(self, folder: Path) -> Path:
        """A copy of the folder whose file `current` names the first version: what one replica follows."""
        for each in NAMES:
            shutil.copytree(self.folder / each, folder / each)
        publish(folder, NAMES[:1])
        return folder

    def shard(self, folder: Path, place: int, shards: int) -> Path:
        """The same with the items of a shard alone."""
        for each in NAMES:
            self.save(folder, each, self.index(each, shard=(place, shards)))
        publish(folder, NAMES[:1])
        return folder

    def call(self, user: int, *, k: int = 5) -> dict[str, Any]:
        """The fields of a call: raw events, so that the same call finds the state of the one before it in the cache."""
        return {"user": user, "events": self.events(user), "now": NOW, "candidates": self.candidates, "k": k}

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

    def _logits(self, name: str, index: ItemIndex) -> dict[int, np.ndarray]:
        rows, _ = index.take(self.ids)
        user, score, params = jax.jit(self.model.user), jax.jit(self.model.interaction), self.params[name]
        return {number: np.asarray(score(params, user(params, each), rows)) for number, each in enumerate(self.features)}
