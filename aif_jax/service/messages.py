"""The protobuf messages of the service, and what they say as calls and answers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory, unknown_fields

from aif_jax.service.answers import rank_fields, score_fields
from aif_jax.service.calls import BadCall, Call, Limits, candidates_of, parse
from aif_jax.service.core import Reply
from aif_jax.serving import Candidates, Ranking, Scores

PACKAGE = "aif_jax.v1"
INFERENCE = "inference"
DESCRIPTORS = Path(__file__).parent / "stubs" / "service.binpb"
DTYPES = {"int32": np.dtype("<i4"), "float32": np.dtype("<f4"), "bool": np.dtype("?")}
PACKED = {"Candidates": {"ids", "bids"}, "RankResponse": {"scores", "logits"}, "ScoreResponse": {"logits", "known"}}
"""Arrays of the messages: what protobuf sends of them is what NumPy has in memory."""


@functools.cache
def pool(*, packed: bool = False) -> Any:
    """All messages, apart from those that other libraries of this process may have under the same names.

    With `packed`, the arrays of `PACKED` are bytes: the same on the wire, without a Python object for each number. They are
    repeated, because an array may come in several parts.
    """
    made = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        for each in file.message_type if packed and file.package == PACKAGE else ():
            for field in each.field:
                if field.name in PACKED.get(each.name, ()):
                    field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
        made.Add(file)
    return made


@functools.cache
def kind(name: str, *, packed: bool = False) -> Any:
    """The class of a message by its full name, see `pool`."""
    return message_factory.GetMessageClass(pool(packed=packed).FindMessageTypeByName(name))


def read(name: str, raw: bytes) -> Any:
    """A message from bytes, its arrays packed; BadCall for bytes that are none."""
    try:
        return kind(name, packed=True).FromString(raw)
    except (message.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCall("message", f"expected a {name}: {error}") from None


def call_of(given: Any, limits: Limits, *, budget: float | None) -> Call:
    """The call that a request says; raises BadCall."""
    fields: dict[str, Any] = {"id": given.request_id, "version": given.version or None, "budget": budget}
    fields |= _user(given.user)
    names = given.DESCRIPTOR.fields_by_name
    if "k" in names:
        fields |= {"k": given.k, "order": given.order or None}
    if "candidates" in names:
        fields |= _candidates(given.candidates)
        if len(given.exclude.ids) or given.exclude.texts or given.exclude.bids:
            fields["exclude"] = _excluded(given.exclude)
    return parse(fields, limits)


def candidates_in(given: Any, limits: Limits) -> Candidates:
    """The candidates of one message of a stream; raises BadCall."""
    fields = _candidates(given.candidates)
    return candidates_of(fields["candidates"], fields.get("bids"), limits)


def rank_response(reply: Reply[Ranking], call_id: str) -> Any:
    """A RankResponse."""
    fields = rank_fields(reply, call_id)
    ids = fields["ids"]
    best = {"ids": [_bytes(ids, "<i8")]} if ids.dtype.kind == "i" else {"texts": ids.tolist()}
    return kind(f"{PACKAGE}.RankResponse", packed=True)(
        about=_about(fields), best=best, scores=[_bytes(fields["scores"])], logits=[_bytes(fields["logits"])],
        candidates=fields["candidates"], unknown=fields["unknown"], excluded=fields["excluded"],
    )  # fmt: skip


def score_response(reply: Reply[Scores], call_id: str) -> Any:
    """A ScoreResponse."""
    fields = score_fields(reply, call_id)
    return kind(f"{PACKAGE}.ScoreResponse", packed=True)(
        about=_about(fields), logits=[_bytes(fields["logits"])], known=[_bytes(fields["mask"], "?")]
    )


def _bytes(array: np.ndarray, dtype: str = "<f4") -> bytes:
    return array.astype(dtype, copy=False).tobytes()


def _about(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = ("version", "degraded", "reason", "state_age", "non_finite", "stages", "objectives")
    return {"request_id": fields["id"]} | {name: fields[name] for name in names if fields.get(name) is not None}


def _user(user: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"user": _id(user.id, "user")}
    if user.HasField("feature_version"):
        fields["feature_version"] = _id(user.feature_version, "feature_version")
    if user.HasField("now"):
        fields["now"] = user.now
    if user.features:
        fields |= {
            "features": {name: _tensor(tensor, name) for name, tensor in user.features.items()},
            "encoding": user.encoding,
        }
    if user.record or user.events or user.known:
        fields["record"] = {name: _value(value) for name, value in user.record.items()} or None
        fields["events"] = {name: _column(column, name) for name, column in user.events.items()}
        fields["events"] = fields["events"] or ({} if fields["record"] is None else None)
    return fields


def _id(given: Any, field: str) -> Any:
    which = given.WhichOneof("id")
    if which is None:
        raise BadCall(field, "expected a number or a text, got none")
    return getattr(given, which)


def _excluded(given: Any) -> Any:
    fields = _candidates(given, "exclude")
    if "bids" in fields:
        raise BadCall("exclude", "expected ids or texts without bids, got bids")
    return fields["candidates"]


def _candidates(given: Any, field: str = "candidates") -> dict[str, Any]:
    if len(unknown_fields.UnknownFieldSet(given)):  # numbers that came one by one, not packed, as protobuf allows
        plain = kind(f"{PACKAGE}.Candidates").FromString(given.SerializeToString())
        given = kind(f"{PACKAGE}.Candidates", packed=True).FromString(plain.SerializeToString())
    ids, bids = _numbers(given.ids, field, "<i8"), _numbers(given.bids, "bids", "<f4")
    if len(ids) and given.texts:
        raise BadCall(field, "expected ids or texts, got both")
    return {"candidates": list(given.texts) if given.texts else ids} | ({"bids": bids} if len(bids) else {})


def _numbers(parts: Any, field: str, dtype: str) -> np.ndarray:
    raw, wanted = parts[0] if len(parts) == 1 else b"".join(parts), np.dtype(dtype)
    if len(raw) % wanted.itemsize:
        raise BadCall(field, f"expected {wanted.itemsize} bytes for each, got {len(raw)}")
    return np.frombuffer(raw, wanted)


def _value(value: Any) -> Any:
    which = value.WhichOneof("value")
    return None if which is None else getattr(value, which)


def _column(column: Any, name: str) -> Any:
    parts = [list(part) for part in (column.integers, column.numbers, column.texts) if part]
    if len(parts) > 1:
        raise BadCall(f"events.{name}", "expected integers, numbers or texts, got several of them")
    if not parts:
        return np.zeros(0, np.int64)
    return np.array(parts[0], np.int64) if column.integers else parts[0]


def _tensor(tensor: Any, name: str) -> np.ndarray:
    dtype, shape = DTYPES.get(tensor.dtype), list(tensor.shape)
    if dtype is None or len(shape) > 4 or any(size < 0 for size in shape):
        raise BadCall(f"features.{name}", f"expected a dtype among {', '.join(DTYPES)} and sizes of 0 or more, got others")
    count = 1
    for size in shape:
        count *= size
    if len(tensor.data) != count * dtype.itemsize:
        raise BadCall(f"features.{name}", f"expected {count * dtype.itemsize} bytes for {shape}, got {len(tensor.data)}")
    if dtype.kind == "b" and tensor.data.translate(None, b"\0\1"):
        raise BadCall(f"features.{name}", "expected bytes 0 and 1 of a bool")
    return np.frombuffer(tensor.data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
