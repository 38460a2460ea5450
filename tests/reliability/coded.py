"""A model whose logit names the version, the index update, the user and the item that it was computed from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif

USERS, ITEMS, GENERATIONS = 50, 64, 8
IDS = np.arange(ITEMS, dtype=np.int64) * 7 + 1000
ATTRIBUTES = aif.Attribute(name="item", size=ITEMS + 1), aif.Attribute(name="category", size=3)
SCHEMA = aif.Schema(item_attributes=ATTRIBUTES, user_floats=1, item_floats=2)
CONFIG = aif.Config(schema=SCHEMA, width=4, short_length=2, long_length=2)


def user(params: Any, features: aif.UserFeatures) -> dict[str, Any]:
    """The user's number, and the version of the parameters that computed this state."""
    return {"user": jnp.asarray(features.floats)[0], "version": params["version"]}


def item(params: Any, features: aif.ItemFeatures) -> dict[str, Any]:
    """The item's number, the update that it came with, and the version of the parameters that computed this row."""
    return {"vector": jnp.append(jnp.asarray(features.floats), params["version"])}


def interaction(params: Any, state: Any, rows: Any) -> jax.Array:
    """(version x 8 + update) x 1000 + a number of user and item; -1 where state, row and parameters are of two versions."""
    number, generation, made = rows["vector"].T
    version = params["version"]
    code = (state["user"].astype(jnp.int32) * 37 + number.astype(jnp.int32) * 101) % 997
    logits = (version * 8.0 + generation) * 1000.0 + code.astype(jnp.float32)
    return jnp.where((made == version) & (state["version"] == version), logits, -1.0)


def params(version: int) -> dict[str, Any]:
    return {"version": np.float32(version), "fitted": {}}


MODEL = aif.build(CONFIG)._replace(init=lambda *given, **options: params(0), user=user, item=item, interaction=interaction)


def user_features(number: int) -> aif.UserFeatures:
    empty = aif.empty_user(SCHEMA, length=CONFIG.history_length)
    return aif.UserFeatures(ids=empty.ids, floats=np.array([number], np.float32), history=empty.history)


def item_features(generation: int) -> aif.ItemFeatures:
    """The features of all items, as update number `generation` has them."""
    number = np.arange(ITEMS)
    floats = np.stack([number, np.full(ITEMS, generation)], axis=1).astype(np.float32)
    ids = {"item": (number + 1).astype(np.int32), "category": (number % 3).astype(np.int32)}
    return aif.ItemFeatures(ids=ids, floats=floats)


def index(version: int, *, capacity: int = 6 * ITEMS) -> aif.ItemIndex:
    """The index of a version, before any update; its capacity has room for the rows of every snapshot that a storm makes."""
    trained, items = aif.Trained(MODEL, params(version)), [(IDS, item_features(0))]
    return aif.ItemIndex.build(trained, items, batch_size=ITEMS, capacity=capacity, progress=False)


def codes(number: int, ids: np.ndarray) -> np.ndarray:
    """int64 [C] what user and item add to a logit; -1 for an unknown item."""
    place = np.searchsorted(IDS, ids).clip(0, ITEMS - 1)
    return np.where(IDS[place] == ids, (number * 37 + place * 101) % 997, -1)


def expected_ranking(number: int, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and codes [min(k, known items)] of the best known candidates, each item once, ties in the candidates' order."""
    code = codes(number, ids)
    _, first = np.unique(ids, return_index=True)
    once = np.sort(first)
    best = once[np.argsort(-code[once], kind="stable")]
    best = best[code[best] >= 0][:k]
    return ids[best], code[best]


def parts(logits: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Version, update and codes of the finite logits of one answer; raises unless all are of one version and one update."""
    whole = logits.astype(np.int64)
    assert (whole == logits).all() and (whole >= 0).all(), f"state, rows and parameters of several versions: {logits}"
    stamps = set((whole // 1000).tolist())
    assert len(stamps) == 1, f"an answer mixes versions or updates: {sorted(stamps)}"
    (stamp,) = stamps
    return stamp // 8, stamp % 8, whole % 1000
