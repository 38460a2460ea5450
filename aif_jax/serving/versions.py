"""What one model version needs to serve: parameters on the device, an index snapshot, fallback users, compiled functions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import expect_finite
from aif_jax.features import behaviours, empty_user
from aif_jax.schema import Schema
from aif_jax.serving.errors import NonFiniteScores
from aif_jax.serving.programs import Programs
from aif_jax.trees import leaves_by_path
from aif_jax.types import UserFeatures
from aif_jax.version import VersionMismatch, fingerprint

if TYPE_CHECKING:
    from aif_jax.serving.config import ServingConfig


class UserSide(NamedTuple):
    """A user state on the device, with the history length that it was made from."""

    state: Any
    length: int
    since: float | None  # fetch of its features, by time.perf_counter; None for the unknown user


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """An index snapshot and the functions compiled for its capacity, by (history length, requests in a batch, bucket)."""

    index: Any
    score: dict[tuple[int, int, int], Callable[..., Any]]


@dataclasses.dataclass(eq=False)
class Version:
    """One model version. Requests hold the version they started with; it is freed when the last of them completes."""

    name: str
    encoding: str  # version of the encoder that its features must come from, "" where none is known
    params: Any
    user: dict[int, Callable[..., Any]]  # by history length
    fallback: UserSide
    templates: dict[int, Any]  # one state of each history length, to compile for
    snapshot: Snapshot


def build_version(programs: Programs, params: Any, index: Any, config: ServingConfig) -> Version:
    """Puts parameters on the device, compiles and warms up whatever these shapes still lack, and scores probe users.

    Raises VersionMismatch for an index of another model, ValueError, NonFiniteScores for NaN or infinite parameters or scores.
    """
    model_config, encoder = programs.model.config, index.encoder
    name = fingerprint(params, model_config, encoder)
    check_version(index, name)
    for path, leaf in leaves_by_path(params).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            expect_finite(np.asarray(leaf), f"params {path}")
    params = jax.device_put(params)
    lengths = config.history_lengths or (model_config.history_length,)
    user = {length: programs.user(params, length) for length in lengths}
    templates = {
        length: function(params, programs.upload_features(empty_user(model_config.schema, length=length)))
        for length, function in user.items()
    }
    snapshot = build_snapshot(programs, params, templates, index, config)
    version = Version(
        name=name,
        encoding="" if encoder is None else encoder.version,
        params=params,
        user=user,
        fallback=UserSide(templates[lengths[0]], lengths[0], None),
        templates=templates,
        snapshot=snapshot,
    )
    _expect_finite_scores(programs, version, config.buckets[0])
    return version


def build_snapshot(programs: Programs, params: Any, templates: dict, index: Any, config: ServingConfig) -> Snapshot:
    """Compiles and warms up the functions of every bucket and batch size, none for a known capacity and storage."""
    score = {}
    for length, state in templates.items():
        for count in batch_sizes(config.batch_size):
            for bucket in config.buckets:
                before = programs.compiles["score"]
                function = score[length, count, bucket] = programs.score(params, (state,) * count, index, bucket)
                if programs.compiles["score"] > before:
                    none = [np.zeros(0, np.int32)] * count
                    inputs = programs.upload_rows(none, [None] * count, ["logit"] * count, bucket)
                    _run(function, params, (state,) * count, index, inputs)
                    start = time.perf_counter()
                    _run(function, params, (state,) * count, index, inputs)
                    programs.warm_seconds = max(programs.warm_seconds, time.perf_counter() - start)
    return Snapshot(index, score)


def next_snapshot(programs: Programs, version: Version, index: Any, config: ServingConfig) -> Snapshot:
    """The snapshot for an updated index of the same version; at the same capacity the functions are taken over as they are."""
    if index.shapes == version.snapshot.index.shapes:
        return Snapshot(index, version.snapshot.score)
    return build_snapshot(programs, version.params, version.templates, index, config)


def check_version(index: Any, name: str) -> None:
    """Raises VersionMismatch unless the index was made by the model version of that name."""
    if index.version != name:
        raise VersionMismatch("index", expected=name, got=index.version)


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Compiled batch sizes: powers of two below `largest`, and `largest` itself."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(sizes[-1] * 2, largest))
    return tuple(sizes)


def probe_user(schema: Schema, length: int) -> UserFeatures:
    """A user with an event in every place of the history, an hour apart."""
    places = np.arange(length)
    items = 1 + places % (schema.item_attribute("item").size - 1)
    history = behaviours(items, places % schema.actions, 3600.0 * (1 + places), np.ones(length, bool))
    return dataclasses.replace(empty_user(schema, length=length), history=history)


def _run(function: Callable[..., Any], params: Any, states: tuple, index: Any, inputs: Any) -> jax.Array:
    """The packed answer of one run, ready."""
    with index.reading() as table:
        packed, _ = function(params, states, table, *inputs)
    return jax.block_until_ready(packed)


def _expect_finite_scores(programs: Programs, version: Version, bucket: int) -> None:
    """Scores the unknown user and one with a full history against the first items of the index."""
    index, schema = version.snapshot.index, programs.model.config.schema
    count = min(len(index), bucket)
    inputs = programs.upload_rows([np.arange(count, dtype=np.int32)], [None], ["logit"], bucket)
    for length, function in version.user.items():
        probe = function(version.params, programs.upload_features(probe_user(schema, length)))
        for state, user in ((version.templates[length], "the unknown user"), (probe, f"a user with {length} events")):
            packed = _run(version.snapshot.score[length, 1, bucket], version.params, (state,), index, inputs)
            bad = programs.download_best(packed)[0].non_finite
            if bad:
                raise NonFiniteScores(f"version {version.name[:12]}: {bad} of {count} scores of {user} are NaN or infinite")
