"""A small shop whose events come by day, with new users and items on the last days, and a model of its first days."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import aif_jax as aif
from aif_jax.refreshing import GateConfig, RefreshResult
from tests import demo

DAY = 86_400
START = 1_700_006_400
USERS, ITEMS, NEW, CATEGORIES = 60, 36, 6, 4
COLUMNS = aif.Columns(item_attributes=("brand",))
GATE = GateConfig(users=5, gauc=0.05, hit_rate=0.1, log_loss=0.2, calibration=0.2)
OPTIONS: dict[str, Any] = dict(
    batch_size=64, learning_rate=0.02, requests=80, k=5, gate=GATE, platforms=("cpu",), progress=False
)  # fmt: skip


def items(days: int) -> dict[str, list[Any]]:
    """The catalogue on a day: the last NEW items, of a new brand, come on day 4."""
    number = np.arange(ITEMS if days > 4 else ITEMS - NEW)
    brands = [f"brand {'new' if n >= ITEMS - NEW else n % 3}" for n in number]
    return {"item": (number + 100).tolist(), "category": [f"category {n % CATEGORIES}" for n in number], "brand": brands}


def events(days: int, *, a_day: int = 300) -> dict[str, np.ndarray]:
    """The log of the first days: each user prefers one category; the last ten users come on day 4."""
    rng, parts = np.random.default_rng(7), []
    for day in range(days):
        users = rng.integers(0, USERS if day >= 4 else USERS - 10, a_day)
        size = ITEMS if day >= 4 else ITEMS - NEW
        loved = (rng.integers(0, size // CATEGORIES, a_day) * CATEGORIES + users % CATEGORIES) % size
        item = np.where(rng.random(a_day) < 0.85, loved, rng.integers(0, size, a_day))
        time = START + day * DAY + np.sort(rng.choice(DAY, a_day, replace=False))
        parts.append((users, item + 100, time))
    user, item, time = map(np.concatenate, zip(*parts, strict=True))
    return {"user": user, "item": item, "time": time}


def data(days: int) -> aif.Dataset:
    """What a reader makes of the first days."""
    return aif.read(events(days), items=items(days), columns=COLUMNS, progress=False)


def model(schema: aif.Schema) -> aif.PreRanker:
    """A two-tower model that trains in a second."""
    return aif.build(aif.presets.two_tower(schema, width=4, towers=(8,), short_length=4, sequence=False))


def refresh(current: Any, events: Any, **given: Any) -> RefreshResult:
    """`aif.refresh` with the fields of its config by keyword."""
    fields = {field.name for field in dataclasses.fields(aif.RefreshConfig)} & given.keys()
    return aif.refresh(current, events, aif.RefreshConfig(**{name: given.pop(name) for name in fields}), **given)


def first(folder: Path | None, days: aif.Dataset | None = None, **changes: Any) -> aif.Run:
    """The run of the first four days, or of other data, whose last tenth is not trained on."""
    days = data(4) if days is None else days
    options = dict(batch_size=64, learning_rate=0.05, epochs=8, validation=0.1, test=0.0, keep_best=None, requests=20, k=None)
    options["evaluate_every"] = 10**6  # a checkpoint takes as long as ten epochs
    return demo.fit(model(days.schema), days, out=folder, progress=False, **(options | changes))
