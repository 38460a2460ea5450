"""User features of a call: raw events, or an id that a feature source knows."""

import dataclasses

from aif_jax.connectors.features import DAMAGE, Fetch, Record, clock, encoded
from aif_jax.encoding.encoder import Encoder, LaterEvents
from aif_jax.encoding.times import in_unit
from aif_jax.service.calls import BadCall, Call
from aif_jax.serving import Request
from aif_jax.types import UserFeatures

PARTS = {"now": "now", "user": "record", "events": "events"}
"""Beginnings of the encoder's errors, and the field of a call that is at fault."""


@dataclasses.dataclass(eq=False)
class Context:
    """Context of an engine's request; `used`, set where features are read, tells log and `explain` what the answer is from."""

    call: Call
    features: UserFeatures | None = None  # that the call brings, once they are read
    used: UserFeatures | None = None  # of the call or the source; None where a prepared or versioned state answers


class SourceError(RuntimeError):
    """A record of the feature source, that is damaged: no fault of the caller."""


class UserSource:
    """The features of calls for one model version: of raw values in a call, or by `reads` of the feature source."""

    def __init__(self, encoder: Encoder, reads: Fetch | None):
        self.encoder, self._reads = encoder, reads

    def of(self, call: Call) -> UserFeatures | None:
        """Return features that a call brings; None where it brings an id alone, perhaps with a time. Raises BadCall."""
        self._expect_user(call.user)
        record = self._record(call)
        try:
            if record is not None:
                return encoded(self.encoder, call.user, record, clock(self.encoder) if call.now is None else call.now)
            if call.now is not None:
                in_unit(call.now, "now", unit=self.encoder.columns.time_unit)
            return None
        except DAMAGE as error:
            text = str(error)
            part = next((name for name in PARTS if text.startswith((f"{name}: ", f"{name}, "))), "")
            raise BadCall(PARTS.get(part, "events"), text[len(part) + 2 :] if part else text) from None

    async def fetch(self, request: Request) -> UserFeatures:
        """Return the engine's `features`: those of the call, else those of the source; BadCall without both."""
        context: Context = request.context
        # None for an id alone, and where `_request` (core.py) found a cached state that has expired since
        context.used = self.of(context.call) if context.features is None else context.features
        if context.used is not None:
            return context.used
        if (reads := self._reads) is None:
            expected, out = "raw events or a call of prepare before", "send events, or start the service with --features"
            raise BadCall("events", f"expected {expected}, got a user id alone; {out}")
        now = context.call.now
        try:
            context.used = await reads.encode(context.call.user, self.encoder, now)
        except DAMAGE as error:
            if now is not None and isinstance(error, LaterEvents):
                raise BadCall("now", f"expected a time after the user's events, got {now}; {error}") from None
            raise SourceError(f"feature source: {error}") from error
        return context.used

    def _expect_user(self, user: int | str) -> None:
        """Raise BadCall for an id that no user of the files which training read can have."""
        known = self.encoder.vocabularies["user"]
        if known.kind is None:
            return
        if isinstance(user, str) != (known.kind == "strings"):
            wanted = "text" if known.kind == "strings" else "an integer"
            raise BadCall("user", f"expected {wanted}, as in this model's files, got {user!r:.80}; send the id as they have it")
        if user == "" and known.raw[0] != "":  # raw ids ascend
            raise BadCall("user", "expected the user's id, got an empty text; send the session's id for a visitor without one")

    def _record(self, call: Call) -> Record | None:
        """Return the record and events of a call, of which it may leave out none that the model reads; None of an id alone."""
        if call.record is None and call.events is None:
            return None
        wanted = [*self.encoder.columns.user_attributes, *self.encoder.columns.user_floats]
        if call.record is None and wanted:
            raise BadCall("record", f"expected values of {wanted}, which the model reads, got none; send null for unknown ones")
        if call.events is None:
            raise BadCall("events", "expected the user's events, got none; send {} or empty tensors for a user without events")
        return Record(call.record, call.events)
