"""Samples of requests that a service answered: features as they were served, from arrays on disk.

`jobs.outcomes.join_outcomes` writes such a folder from a request log. Nothing of a user is computed again, so what a model
trains on is what the served one was given.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax.checks import expect, expect_array
from aif_jax.encoding.statistics import ItemStatistics
from aif_jax.features import check_user_features
from aif_jax.schema import Schema
from aif_jax.store.folders import local
from aif_jax.trees import leaves_by_path
from aif_jax.types import Behaviours, UserFeatures

RECORD = "samples.json"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ServedFeatures:
    """Features as served, one user's for each request.

    Attributes:
      positions: int64 [R], ascending: the first event of each request in the event log.
      features: UserFeatures [R] of NumPy arrays, memory-mapped perhaps, with L places of history.
      outcomes: names of what may follow on an item, such as ("click", "conversion"): the log's action 1 is an item that was
        shown, action 2 one with the first outcome, and so on.
      statistics: item statistics of the events, where the schema has them; the log has what was shown.

    Raises:
      TypeError, ValueError: arrays of other dtypes or lengths.
    """

    positions: np.ndarray
    features: UserFeatures
    outcomes: tuple[str, ...]
    statistics: ItemStatistics | None = None

    def __post_init__(self):
        positions = expect_array(self.positions, "ServedFeatures.positions", dtype=np.int64, shape=(None,))
        expect((np.diff(positions) > 0).all(), "ServedFeatures.positions", "ascending positions", positions)
        counts = {len(leaf) for leaf in jax.tree.leaves(self.features)}
        expect(counts == {len(positions)}, "ServedFeatures.features", f"arrays of {len(positions)} requests", sorted(counts))

    def at(self, positions: Any) -> np.ndarray:
        """int64 [B] requests of positions in the log; ValueError for one that is not the first event of a request."""
        wanted = np.asarray(positions)
        at = np.searchsorted(self.positions, wanted)
        known = np.append(self.positions, -1)[at] == wanted
        way_out = "served features are of requests: train and evaluate the tasks Impressions and Cascaded"
        expect(known.all(), "positions", "first events of served requests", f"{wanted[~known][:1]}; {way_out}")
        return at

    def of(self, positions: Any, *, length: int) -> UserFeatures:
        """The features of some requests [B], in memory, with `length` places of history: cut, or padded with no event."""
        at = self.at(positions)
        features = jax.tree.map(lambda leaf: np.asarray(leaf[at]), self.features)

        def fitted(leaf: np.ndarray) -> np.ndarray:
            padding = max(0, length - leaf.shape[1])
            return np.pad(leaf, ((0, 0), (0, padding)))[:, :length] if padding else np.ascontiguousarray(leaf[:, :length])

        return dataclasses.replace(features, history=jax.tree.map(fitted, features.history))

    def history_lengths(self, positions: Any) -> np.ndarray:
        """int64 [B] events in the histories of some requests."""
        return np.count_nonzero(self.features.history.mask[self.at(positions)], axis=1)


def features_from(arrays: Mapping[str, np.ndarray], schema: Schema, *, encoding: str, name: str) -> UserFeatures:
    """UserFeatures [n] from arrays by dotted name; TypeError, ValueError for those of another schema."""
    groups: dict[str, dict[str, Any]] = {"ids": {}, "history": {}}
    for path, array in arrays.items():
        group, _, key = path.partition(".")
        if group in groups:
            groups[group][key] = array
    try:
        history = Behaviours(**groups["history"])
        features = UserFeatures(ids=groups["ids"], floats=arrays["floats"], history=history, encoding=encoding)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{name}: expected arrays of ids, floats and a history, got {sorted(arrays)}") from error
    check_user_features(schema, features, batched=True, name=name)
    return features


def names_of(features: UserFeatures) -> dict[str, np.ndarray]:
    """Arrays by dotted name, as `features_from` takes them."""
    return {name: np.asarray(leaf) for name, leaf in leaves_by_path(features, separator=".").items()}


def open_samples(folder: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the arrays of a folder of samples, memory-mapped; FileNotFoundError, ValueError for what is none."""
    folder = local(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        named = {name: folder / f"{name}.npy" for name in record["arrays"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: expected a folder of join_outcomes, found no {RECORD} in it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RECORD}: expected the record of join_outcomes, got another: {error!r}") from error
    arrays = {}
    for name, file in named.items():
        try:
            arrays[name] = np.load(file, mmap_mode="r") if file.stat().st_size > 256 else np.load(file)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: expected a complete array of join_outcomes, got none: {error}") from error
    return record, arrays
