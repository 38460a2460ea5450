"""Makes tests/golden/variants.npz: the logits of every model variant, with the parameters and the inputs that gave them.

Ran on commit 7ff4b7c15d9f36b83c51502c34ea453d0b394e99, before blocks became values; it stays as the record of how the file
was made, less the variants of blocks that are gone. Made under jax 0.10.2 on a CPU.

Command   PYTHONPATH=CHECKOUT python make_variants.py [OUTPUT], with CHECKOUT at that commit.

Keys of the file:

- `inputs/...`: one catalogue, four users, the rows of 40 candidates and of 3. Every variant reads the same ones.
- `array/...`: arrays by the hash of their content, so that variants share the equal ones. Parameters are float16, and the
  model ran on their float32 value; what was fitted (frozen arrays, signatures) stands as it was fitted.
- `variants`: JSON, name -> `config` (changes on `tiny()`), `params` (path -> array), `frozen` (name -> array) and `signatures`
  (array uint32 [50, W], one row for each item, or null).
- `logits/NAME` float32 [4, 40] and `few/NAME` float32 [4, 3] from `joint`, `staged/NAME` float32 [4, 40] from user, item and
  interaction apart.

A behaviour and a candidate have the signature of their item's row; where a history's mask is false it is zeros.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif

ITEMS, CANDIDATES, LONG = 50, 40, 24
EVENTS = (0, 3, 17, 24)
"""Length of each user's history."""
UNKNOWN = ((1, 1), (2, 4), (2, 11), (3, 2), (3, 20))
"""(user, place) of the events of an unknown item: row 0, mask true."""
TOLERANCE = 1e-5
ALONE: dict[str, Any] = {"bridges": 0, "memory": (), "sim_fields": (), "simtier": "off"}
"""What a variant of one block starts from."""

VARIANTS: dict[str, dict[str, Any]] = {
    "every block": {},
    "base": {"sequence": False, **ALONE},
    "sequence off": {"sequence": False},
    "no item content": {"item_content": False},
    "bridges only": {**ALONE, "bridges": 4},
    "sim only": {**ALONE, "sim_fields": ("category",)},
    "two SIM fields": {"sim_fields": ("category", "item")},
    "lsh memory only": {**ALONE, "memory": ("lsh",)},
    "learned linear keys only": {**ALONE, "memory": ("learned",)},
    "learned softmax keys": {**ALONE, "memory": ("learned",), "memory_keys": "softmax"},
    "matching": {"matching": True, "memory_keys": "softmax"},
    "exact simtier only": {**ALONE, "simtier": "exact"},
    "16 tiers": {"tiers": 16},
    "tiers by action": {"tiers_by_action": True},
    "tiers by action and window": {"tiers_by_action": True, "tier_windows": (2, 6)},
    "tier windows": {"tier_windows": (2, 6)},
    "64 bits": {"signature_bits": 64},
    "two_tower": {"architecture": "two_tower"},
    "two_tower, sequence off": {"architecture": "two_tower", "sequence": False},
    "exact": {"architecture": "exact"},
    "exact, matching": {"architecture": "exact", "matching": True},
    "exact, tiers by action and window": {"architecture": "exact", "tiers_by_action": True, "tier_windows": (2, 6)},
    "other hidden widths": {"tower_hidden": (16, 12), "head_hidden": (8,)},
    # a learned memory this wide stays unfolded for 3 candidates
    "wide learned linear keys": {"memory": ("learned",), "memory_width": 32, "matching": True},
    "wide learned softmax keys": {
        "memory": ("learned",), "memory_width": 32, "matching": True, "memory_keys": "softmax",
    },
}  # fmt: skip
"""Config changes on `tiny()` by name."""


def make_inputs() -> dict[str, np.ndarray]:
    """Catalogue, users and candidates; row 0 of the catalogue is the unknown item, all zeros."""
    rng = np.random.default_rng(0)
    catalogue = {
        "category": rng.integers(1, 6, ITEMS).astype(np.int32),
        "tags": rng.integers(0, 9, (ITEMS, 3)).astype(np.int32),
        "floats": rng.normal(size=(ITEMS, 1)).astype(np.float32),
        "content": rng.normal(size=(ITEMS, 12)).astype(np.float32),
        "bid": rng.uniform(1, 2, ITEMS).astype(np.float32),
    }
    for column in catalogue.values():
        column[0] = 0
    users = len(EVENTS)
    mask = np.arange(LONG) < np.array(EVENTS)[:, None]
    pools = np.stack([1 + rng.permutation(ITEMS - 1)[:14] for _ in EVENTS])  # few enough that items come again
    item = np.take_along_axis(pools, rng.integers(0, 14, (users, LONG)), 1) * mask
    for user, place in UNKNOWN:
        item[user, place] = 0
    age = np.cumsum(rng.exponential(2e5, (users, LONG)), axis=1) * mask
    few = 1 + rng.permutation(ITEMS - 1)[: CANDIDATES - 1]
    return catalogue | {
        "user_gender": rng.integers(0, 3, users).astype(np.int32),
        "user_interests": np.array([[2, 0], [0, 0], [5, 1], [6, 3]], np.int32),
        "user_floats": rng.normal(size=(users, 2)).astype(np.float32),
        "history_item": item.astype(np.int32),
        "history_category": catalogue["category"][item],
        "history_action": (rng.integers(0, 4, (users, LONG)) * mask).astype(np.int32),
        "history_age": age.astype(np.float32),
        "history_mask": mask,
        "candidates": np.append(few, 0).astype(np.int32),
        "few": few[:3].astype(np.int32),
    }


def make_users(inputs: dict[str, np.ndarray], signatures: np.ndarray | None, short: int) -> aif.UserFeatures:
    """All four users; the short history is the first places of the long one."""

    def history(length: int) -> aif.Behaviours:
        item, category, action, age, mask = (
            inputs[f"history_{name}"][:, :length] for name in ("item", "category", "action", "age", "mask")
        )
        words = None if signatures is None else signatures[item] * mask[..., None].astype(np.uint32)
        ids = {"item": item, "category": category}
        return aif.Behaviours(ids=ids, action=action, age=age, mask=mask, signature=words)

    return aif.UserFeatures(
        ids={"gender": inputs["user_gender"], "interests": inputs["user_interests"]},
        floats=inputs["user_floats"],
        short=history(short),
        long=history(LONG),
    )


def make_items(inputs: dict[str, np.ndarray], signatures: np.ndarray | None, rows: np.ndarray) -> aif.ItemFeatures:
    """Candidates: rows of the catalogue."""
    return aif.ItemFeatures(
        ids={"item": rows, "category": inputs["category"][rows], "tags": inputs["tags"][rows]},
        floats=inputs["floats"][rows],
        content=inputs["content"][rows],
        signature=None if signatures is None else signatures[rows],
        side={"bid": inputs["bid"][rows]},
    )


def make_value(path: str, initialised: np.ndarray) -> np.ndarray:
    """A parameter, float16, that depends on path and shape, and on what the model drew in its spread alone."""
    shape = initialised.shape
    drawn = np.random.default_rng(zlib.crc32(f"{path}{shape}".encode())).normal(size=shape)
    made = 1 + 0.1 * drawn if path == "user/norm/scale" else drawn * (float(np.std(initialised)) or 0.1)
    return np.asarray(made, np.float16)


def run(
    model: aif.PreRanker, params: Any, inputs: dict[str, np.ndarray], signatures: np.ndarray | None
) -> dict[str, np.ndarray]:
    """`logits`, `few` and `staged` of one variant."""
    users = make_users(inputs, signatures, model.config.short_length)
    items, few = (make_items(inputs, signatures, inputs[name]) for name in ("candidates", "few"))
    joint = jax.jit(jax.vmap(model.joint, (None, 0, None)))
    states = jax.jit(jax.vmap(model.user, (None, 0)))(params, users)
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(params, items)
    staged = jax.jit(jax.vmap(model.interaction, (None, 0, None)))(params, states, rows)
    made = {"logits": joint(params, users, items), "few": joint(params, users, few), "staged": staged}
    return {form: np.asarray(logits) for form, logits in made.items()}


def check(name: str, made: dict[str, np.ndarray]) -> None:
    """Forms agree; logits are finite and tell candidates and users apart."""
    logits, few, staged = made["logits"], made["few"], made["staged"]
    assert logits.dtype == few.dtype == staged.dtype == np.float32, name
    assert logits.shape == staged.shape == (len(EVENTS), CANDIDATES) and few.shape == (len(EVENTS), 3), name
    assert all(np.isfinite(values).all() for values in made.values()), name
    assert np.abs(logits - staged).max() < TOLERANCE, name
    assert np.abs(logits[:, :3] - few).max() < TOLERANCE, name
    assert min(logits.std(1).min(), few.std(1).min(), logits.std(0).min()) > 1e-3, name


def main(output: Path) -> None:
    """Runs every variant and writes the file."""
    inputs = make_inputs()
    file = {f"inputs/{name}": value for name, value in inputs.items()}
    variants: dict[str, dict[str, Any]] = {}
    values: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # the first variant that has a leaf says how far it spreads

    def kept(value: Any) -> str:
        value = np.asarray(value)
        digest = hashlib.sha1(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()
        key = f"array/{digest[:12]}"
        assert np.array_equal(file.setdefault(key, value), value), key
        return key

    for seed, (name, changes) in enumerate(VARIANTS.items()):
        config = aif.tiny(**changes)
        model = aif.build(config)
        frozen = aif.lsh.fit(inputs["content"], config, seed=0)
        params = model.init(jax.random.key(seed), frozen=frozen)
        params.pop("frozen", None)
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        for path, (_, leaf) in zip(paths, leaves, strict=True):
            values.setdefault((path, leaf.shape), make_value(path, np.asarray(leaf)))
        own = [values[path, leaf.shape] for path, (_, leaf) in zip(paths, leaves, strict=True)]
        params = jax.tree_util.tree_unflatten(tree, [jnp.asarray(value, jnp.float32) for value in own])
        signatures = None
        if config.uses_signatures:
            signatures = np.array(aif.lsh.sign(frozen, jnp.asarray(inputs["content"])))
            signatures[0] = 0
        made = run(model, params | ({"frozen": frozen} if frozen else {}), inputs, signatures)
        check(name, made)
        file |= {f"{form}/{name}": logits for form, logits in made.items()}
        variants[name] = {
            "config": changes,
            "params": dict(zip(paths, map(kept, own), strict=True)),
            "frozen": {part: kept(value) for part, value in frozen.items()},
            "signatures": None if signatures is None else kept(signatures),
        }
        print(f"{name}: {len(paths)} leaves, logits {made['logits'].mean():.3f} +- {made['logits'].std(1).mean():.3f}")
    np.savez_compressed(output, variants=np.array(json.dumps(variants)), **file)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("variants.npz"))
