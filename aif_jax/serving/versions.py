"""What one model version needs to serve: parameters on the device, an index snapshot, fallback users, compiled functions."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import VersionMismatch, expect, expect_finite
from aif_jax.features import UserPacker, behaviours, empty_user
from aif_jax.output import track
from aif_jax.schema import Schema
from aif_jax.scores import GROUP, probabilities
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.programs import LOGIT, NO_BID, Orders, Programs
from aif_jax.serving.requests import NonFiniteScores
from aif_jax.serving.scoring import CompiledIndex, UserSide, Version
from aif_jax.store.trained import Trained
from aif_jax.trees import leaves_by_path
from aif_jax.types import UserFeatures


def build_version(programs: Programs, trained: Trained, index: Any, config: ServingConfig, orders: Orders) -> Version:
    """Put parameters on the device, compile and warm up whatever these shapes still lack, and score probe users.

    Raises VersionMismatch for an index of another model, ValueError, NonFiniteScores for NaN or infinite parameters or scores.
    """
    model_config, params, name = trained.config, trained.params, trained.version
    check_version(index, name)
    for path, leaf in leaves_by_path(params).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            expect_finite(np.asarray(leaf), f"params {path}")
    fitted = params.get("fitted", {}).get(GROUP)
    calibration = {} if fitted is None else {"fitted": {GROUP: jax.tree.map(np.asarray, fitted)}}
    on_host = functools.partial(probabilities, calibration, objectives=model_config.objectives, xp=np)
    params = jax.device_put(params)
    schema, length = model_config.schema, model_config.history_length
    user, packer = programs.user(params, config.batch_size), UserPacker(schema, length)

    def state_of(features: UserFeatures) -> UserSide:
        with jax.transfer_guard_host_to_device("allow"):
            return UserSide(user(np.stack([packer(features)] * config.batch_size), np.int32(1))[0], 0.0)

    unknown, probe = state_of(empty_user(schema, length=length)), state_of(probe_user(schema, length))
    compiled, count = compile_index(programs, params, unknown, index, config, orders), min(len(index), config.buckets[0])
    for side, who in ((unknown, "the unknown user"), (probe, f"a user with {length} events")):
        if bad := _non_finite(compiled, side, count, LOGIT, config):
            raise NonFiniteScores(f"version {name[:12]}: {bad} of {count} scores of {who} are NaN or infinite")
    for order in orders.names:
        if count and order not in orders.need_bids and _non_finite(compiled, unknown, count, order, config) == count:
            raise NonFiniteScores(f"order {order!r}: the values of all {count} probe items are NaN or infinite")
    return Version(name, packer, trained.encoding, params, user, unknown, compiled, on_host)


def _non_finite(compiled: CompiledIndex, side: UserSide, count: int, order: str, config: ServingConfig) -> int:
    """Return how many of the first `count` rows, also of deleted items, have no finite value by an order without given bids."""
    packed, _ = compiled.run([side], compiled.inputs([np.arange(count)], [None], order, config.buckets[0]))
    return compiled.best(packed, 1)[0].non_finite


def compile_index(
    programs: Programs, params: Any, user: UserSide, index: Any, config: ServingConfig, orders: Orders
) -> CompiledIndex:
    """Return an index with the functions of every bucket, compiled and warmed up where they are new."""
    size = config.batch_size
    no_bids = {bucket: jax.device_put(np.full((size, bucket), NO_BID, np.float32)) for bucket in config.buckets}
    branches = {order: jax.device_put(np.int32(branch)) for branch, order in enumerate((LOGIT, *orders.names))}
    counts = [jax.device_put(np.int32(count)) for count in range(size + 1)]
    compiled = CompiledIndex(index, orders, {}, no_bids, branches, counts, programs.model.config.outputs, programs.transfers)
    for bucket in track(config.buckets, label="engine", unit="programs"):
        before = programs.compiles["score"]
        compiled.programs[bucket] = programs.score(params, (user.state,) * size, index, bucket, orders)
        if programs.compiles["score"] > before:
            inputs = compiled.inputs([np.zeros(0, np.int32)], [None], LOGIT, bucket)
            jax.block_until_ready(compiled.run([user], inputs))
            start = time.perf_counter()
            jax.block_until_ready(compiled.run([user], inputs))
            programs.warm_seconds = max(programs.warm_seconds, time.perf_counter() - start)
    return compiled


def compile_updated(programs: Programs, version: Version, index: Any, config: ServingConfig) -> CompiledIndex:
    """Return an updated index of the same version, compiled; at the same capacity the functions stay the same."""
    if index.shapes == version.compiled.index.shapes:
        return version.compiled._replace(index=index)
    return compile_index(programs, version.params, version.unknown_user, index, config, version.compiled.orders)


def check_version(index: Any, name: str) -> None:
    """Raise VersionMismatch unless the index was made by the model version of that name, TypeError for none."""
    expect(hasattr(index, "lookup"), "index", "one of ItemIndex.build or load", type(index).__name__, error=TypeError)
    if index.version != name:
        raise VersionMismatch("index", expected=name, got=index.version)


def probe_user(schema: Schema, length: int) -> UserFeatures:
    """Return a user with an event in every place of the history, an hour apart."""
    places = np.arange(length)
    items = 1 + places % (schema.table_sizes["item"] - 1)
    history = behaviours(items, places % schema.actions, 3600.0 * (1 + places), np.ones(length, bool))
    return dataclasses.replace(empty_user(schema, length=length), history=history)
