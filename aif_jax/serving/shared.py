"""User states as bytes, for a cache that replicas share: the second level behind each engine's own."""

from __future__ import annotations

import hashlib
import struct
import time
from typing import Any, NamedTuple, Protocol

import numpy as np

from aif_jax.index.storage import Layout
from aif_jax.serving.cache import StateKey
from aif_jax.serving.programs import Form
from aif_jax.serving.unknown import Known

HEAD = struct.Struct("<d8si?4i")  # wall-clock time of the fetch, digest of the layout, form of the history, what is known


class StateStore(Protocol):
    """A cache of states by (user, feature version, model version), such as `aif_jax.connectors.ValkeyStates`."""

    async def get(self, key: StateKey) -> bytes | None:
        """The bytes of a state, or None."""
        ...

    async def put(self, key: StateKey, state: bytes) -> None:
        """Keeps the bytes of a state."""
        ...


class Shared(NamedTuple):
    """A state that another replica computed."""

    form: Form
    words: np.ndarray  # uint32 [W]
    age: float  # seconds since its features were fetched
    known: Known  # how much of them the model knows


def to_bytes(words: np.ndarray, layout: Layout, form: Form, *, age: float, known: Known = Known()) -> bytes:  # noqa: B008 frozen
    """A state of `age` seconds as bytes."""
    return HEAD.pack(time.time() - age, _digest(layout), *form, *known) + words.astype("<u4").tobytes()


def from_bytes(data: bytes, empty: dict[Form, Any]) -> Shared | None:
    """The state that `to_bytes` wrote; None for one of another layout or form than the states in `empty`."""
    if len(data) < HEAD.size:
        return None
    fetched, digest, places, streamed, *known = HEAD.unpack_from(data)
    like = empty.get(Form(places, streamed))
    if like is None or digest != _digest(like.layout) or len(data) - HEAD.size != 4 * like.words.size:
        return None
    words, age = np.frombuffer(data, "<u4", offset=HEAD.size), max(0.0, time.time() - fetched)
    return Shared(Form(places, streamed), words, age, Known(*known))


def _digest(layout: Layout) -> bytes:
    return hashlib.sha256(repr([tuple(column) for column in layout.columns]).encode()).digest()[:8]
