"""User features of a call: encoded features, raw events, or an id that a feature source knows."""

import dataclasses

import jax
import numpy as np

from aif_jax.checks import check_encoding
from aif_jax.connectors.features import DAMAGE, Fetch, Record, clock, encoded
from aif_jax.encoding.encoder import Encoder
from aif_jax.features import behaviours, check_user_features, user_layout
from aif_jax.schema import Schema
from aif_jax.service.calls import BadCall, Call, exact_numbers
from aif_jax.serving import Request
from aif_jax.trees import leaves_by_path
from aif_jax.types import UserFeatures

HISTORY = "history."
PARTS = {"now": "now", "user": "record", "events": "events"}
"""What the encoder's errors begin with, and the field of a call that has it."""


@dataclasses.dataclass(eq=False)
class Context:
    """Context of an engine's request."""

    call: Call
    features: UserFeatures | None = None  # that the call brings, once they are read
    used: UserFeatures | None = None  # what `UserSource.fetch` gave; None where an earlier call brought it


class SourceError(RuntimeError):
    """A record of the feature source, that is damaged: no fault of the caller."""


class UserSource:
    """The features of calls for one model version: those that a call brings, or by `reads` of the feature source."""

    def __init__(self, schema: Schema, length: int, encoder: Encoder | None, reads: Fetch | None):
        self._schema = schema
        self._length = length
        self._encoder = None if encoder is None else encoder.with_length(length)
        self._reads = reads
        layout = user_layout(schema)
        self._leaves, self._tree = leaves_by_path(layout, separator="."), jax.tree.structure(layout)

    def of(self, call: Call) -> UserFeatures | None:
        """Return features that a call brings; None where it brings an id alone. Raises BadCall, EncodingMismatch."""
        self._expect_user(call.user)
        if call.features is not None:
            return self._encoded(call)
        if call.record is None and call.events is None:
            return None
        return self._raw(call)

    async def fetch(self, request: Request) -> UserFeatures:
        """Return the engine's `features`: those of the call, else those of the source; BadCall without both."""
        context: Context = request.context
        context.used = self.of(context.call) if context.features is None else context.features
        if context.used is not None:
            return context.used
        if (reads := self._reads) is None:
            out = "or start the service with --features"
            raise BadCall("features", f"expected features, raw events or a call of prepare before, got a user id alone; {out}")
        if self._encoder is None:
            raise SourceError("the exported model has no encoder for the records of a feature source; send encoded features")
        now = context.call.now
        try:
            context.used = await reads.encode(context.call.user, self._encoder, self.clock() if now is None else now)
        except DAMAGE as error:
            if now is not None and str(error).startswith("now: "):
                raise BadCall("now", f"expected a time in the unit of the events, got {now!r:.80}") from None
            raise SourceError(f"feature source: {error}") from error
        return context.used

    def clock(self) -> int | None:
        """Return the time now in the unit of the raw events; None for a model without an encoder."""
        return None if self._encoder is None else clock(self._encoder)

    def _expect_user(self, user: int | str) -> None:
        """Raise BadCall for an id that no user of the files which training read can have."""
        ids = None if self._encoder is None else self._encoder.vocabularies["user"]
        if ids is None or ids.kind is None:
            return
        wanted = "text" if ids.kind == "strings" else "an integer"
        if isinstance(user, str) != (ids.kind == "strings"):
            raise BadCall("user", f"expected {wanted}, as in this model's files, got {user!r:.80}; send the id as they have it")
        if user == "" != ids.raw[0]:  # ascending
            raise BadCall("user", "expected the user's id, got an empty text; send the session's id for a visitor without one")

    def _raw(self, call: Call) -> UserFeatures:
        """Return the features of a record and events, of which a call may leave out none that the model reads."""
        if self._encoder is None:
            raise BadCall("events", "expected encoded features, got raw ones, for which the exported model has no encoder")
        columns = self._encoder.columns
        wanted = [*columns.user_attributes, *columns.user_floats]
        if call.record is None and wanted:
            out = "send null for a value that is not known"
            raise BadCall("record", f"expected values of {wanted}, which this model reads, got no record; {out}")
        if call.events is None:
            raise BadCall("events", "expected the user's events, got none; send {} for a user without events")
        name, record = columns.user_record_id, call.record or {}
        if name in record:
            given = record[name].tolist() if isinstance(record[name], np.ndarray) else record[name]
            if given not in (call.user, [call.user]):
                raise BadCall(
                    "record", f"column {name!r}: expected {call.user!r:.80}, the call's user, got {given!r:.80}; leave it out"
                )
        identity = {name: call.user} if columns.user_id else {}
        moment = self.clock() if call.now is None else call.now
        try:
            return encoded(self._encoder, Record({**record, **identity}, call.events), moment)
        except DAMAGE as error:
            text = str(error)
            part = next((name for name in PARTS if text.startswith((f"{name}: ", f"{name}, "))), "")
            raise BadCall(PARTS.get(part, "events"), text[len(part) + 2 :] if part else text) from None

    def _encoded(self, call: Call) -> UserFeatures:
        assert call.features is not None
        if call.encoding and self._encoder is not None:
            check_encoding("features", expected=self._encoder.version, got=call.encoding)
        missing, extra = sorted(self._leaves.keys() - call.features.keys()), sorted(call.features.keys() - self._leaves.keys())
        if missing or extra:
            raise BadCall("features", f"expected {sorted(self._leaves)}, got missing {missing}, extra {str(extra)[:200]}")
        arrays = []
        for name, leaf in self._leaves.items():
            value = call.features[name]
            try:
                array = value if isinstance(value, np.ndarray) else exact_numbers(value, leaf.dtype)
            except (TypeError, ValueError, OverflowError) as error:
                raise BadCall(f"features.{name}", str(error)) from None
            arrays.append(self._fitted(array) if name.startswith(HISTORY) else array)
        features = dataclasses.replace(jax.tree.unflatten(self._tree, arrays), encoding=call.encoding)
        try:
            check_user_features(self._schema, features, batched=False, name="features")
        except (TypeError, ValueError) as error:
            raise BadCall("features", str(error)) from None
        history = features.history
        return dataclasses.replace(features, history=behaviours(history.item, history.action, history.age, history.mask))

    def _fitted(self, array: np.ndarray) -> np.ndarray:
        """Return a history of as many places as the model reads: the most recent ones, or with empty places behind."""
        if array.ndim != 1 or len(array) == self._length:
            return array
        return np.pad(array[: self._length], (0, max(0, self._length - len(array))))
