"""What one model version needs to serve: parameters on the device, an index snapshot, fallback users, compiled functions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from aif_jax.serving.programs import Programs, empty_features, prepare_features
from aif_jax.version import VersionMismatch, fingerprint

if TYPE_CHECKING:
    from aif_jax.serving.config import ServingConfig

HistoryShape = tuple[int, int]


class UserSide(NamedTuple):
    """A user state on the device, with the history lengths (short, long) that it was made from."""

    state: Any
    shape: HistoryShape


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """An index snapshot and the functions compiled for its capacity, by (history shape, requests in a batch, bucket)."""

    index: Any
    score: dict[tuple[HistoryShape, int, int], Callable[..., Any]]


@dataclasses.dataclass(eq=False)
class Version:
    """One model version. Requests hold the version they started with; its memory goes when the last of them does."""

    name: str
    params: Any
    user: dict[HistoryShape, Callable[..., Any]]
    fallback: UserSide
    templates: dict[HistoryShape, Any]  # one state of each shape, to compile for
    snapshot: Snapshot


def build_version(programs: Programs, params: Any, index: Any, config: ServingConfig) -> Version:
    """Puts parameters on the device, compiles and warms up whatever these shapes still lack.

    Raises:
      VersionMismatch: the index was not made from these parameters, config and schema.
    """
    model_config = programs.model.config
    name = fingerprint(params, model_config)
    check_version(index, name)
    params = jax.device_put(params)
    shapes = config.history_shapes or ((model_config.short_length, model_config.long_length),)
    user, templates = {}, {}
    for short, long in shapes:
        features = prepare_features(model_config, empty_features(model_config, short=short, long=long))
        function = user[short, long] = programs.user(params, features)
        templates[short, long] = jax.block_until_ready(function(params, programs.upload_features(features)))
    fallback = UserSide(templates[shapes[0]], shapes[0])
    return Version(name, params, user, fallback, templates, build_snapshot(programs, params, templates, index, config))


def build_snapshot(programs: Programs, params: Any, templates: dict, index: Any, config: ServingConfig) -> Snapshot:
    """Compiles and warms up the functions of every bucket and batch size for an index snapshot.

    A snapshot of the same capacity and storage needs nothing compiled, and nothing is run for it.
    """
    score = {}
    for shape, state in templates.items():
        for count in batch_sizes(config.batch_size):
            for bucket in config.buckets:
                before = programs.compiles["score"]
                function = score[shape, count, bucket] = programs.score(params, (state,) * count, index, bucket)
                if programs.compiles["score"] > before:
                    none = [np.zeros(0, np.int32)] * count
                    inputs = programs.upload_rows(none, [None] * count, ["logit"] * count, bucket)
                    _run(function, params, (state,) * count, index, inputs)
                    again = _run(function, params, (state,) * count, index, inputs)
                    programs.warm_seconds = max(programs.warm_seconds, again)
    return Snapshot(index, score)


def _run(function: Callable[..., Any], params: Any, states: tuple, index: Any, inputs: Any) -> float:
    """Seconds of one run to its end."""
    start = time.perf_counter()
    with index.reading() as table:
        answer = function(params, states, table, *inputs)
    jax.block_until_ready(answer)
    return time.perf_counter() - start


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
