"""A data set ready for training and serving: schema, events, catalogue, users.

Readers return it; histories are gathered from it as NumPy arrays on the host. Source: ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from aif_jax.data.catalogue import Catalogue
from aif_jax.data.events import EventLog
from aif_jax.data.schema import Schema, Vocabulary
from aif_jax.data.validate import expect_array, expect_finite, expect_ids, expect_integers, expect_range
from aif_jax.types import Behaviours, UserFeatures


class CorruptRecord(ValueError):
    """An event or a feature that cannot be right; the message names its position in the log."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Events, the features of users and items, and the raw ids behind their rows.

    Attributes:
      name: for logs and reports.
      schema: which features there are; the catalogue's.
      log: the events; its item values are catalogue rows, its user values user rows.
      catalogue: item features [N].
      user_ids: int32 [U] each, or [U, n] for a multi-valued attribute; row 0 is the unknown user.
      user_floats: float32 [U, F].
      users: raw user ids, U rows.
      items: raw item ids, N rows.

    Raises:
      TypeError: wrong dtype.
      ValueError: parts that do not fit together: names the field, what was expected and what came.
    """

    name: str
    schema: Schema
    log: EventLog
    catalogue: Catalogue
    user_ids: dict[str, np.ndarray]
    user_floats: np.ndarray
    users: Vocabulary
    items: Vocabulary

    def __post_init__(self):
        if self.schema != self.catalogue.schema:
            raise ValueError(f"Dataset.schema: expected the catalogue's {self.catalogue.schema}, got {self.schema}")
        for field, expected, got in (
            ("log.users", len(self.users), self.log.users),
            ("catalogue", len(self.items), len(self.catalogue)),
        ):
            if expected != got:
                raise ValueError(f"Dataset.{field}: expected {expected} rows like the vocabulary, got {got}")
        if not np.array_equal(self.items.raw, self.catalogue.raw):
            raise ValueError("Dataset.items: expected the raw ids of the catalogue in the same order, got others")
        lead = (len(self.users),)
        expect_ids(self.user_ids, "Dataset.user_ids", self.schema.user_attributes, lead=lead)
        shape = (*lead, self.schema.user_floats)
        floats = expect_array(self.user_floats, "Dataset.user_floats", dtype=np.float32, shape=shape)
        expect_finite(floats, "Dataset.user_floats")
        expect_range(self.log.item, "Dataset.log.item", size=len(self.catalogue))
        expect_range(self.log.action, "Dataset.log.action", size=self.schema.actions)

    def __repr__(self) -> str:
        counts = f"{len(self.users) - 1:,} users, {len(self.items) - 1:,} items, {len(self.log):,} events"
        return f"Dataset({self.name!r}: {counts}, {self.schema!r})"

    def user_features(self, positions: Any, *, short: int, long: int) -> UserFeatures:
        """What was known of the user just before each sample: profile and strictly earlier events.

        Args:
          positions: [B] integer positions of events in the log.
          short: S, length of the short history.
          long: L, length of the long history; it starts at the most recent event too, so it includes the short one.

        Returns:
          UserFeatures of NumPy arrays with a leading axis B. Ages are counted from the sample's time, in seconds.

        Raises:
          TypeError, ValueError: positions that are not integers in [0, n), lengths below 1.
        CorruptRecord: an event out of range, in a file that was damaged after it was opened.
        """
        positions = expect_integers(positions, "positions", size=len(self.log))
        users = self.log.user[positions]
        if users.size and (users.min() < 0 or users.max() >= len(self.users)):
            at = int(np.argmax((users < 0) | (users >= len(self.users))))
            raise CorruptRecord(
                f"{self.name}: event {positions[at]} of the log is corrupt: expected user in [0, {len(self.users)}),"
                f" got {users[at]}"
            )
        end = self.log.history_end(positions)
        return self._features(users, self.log.time[positions], end, short=short, long=long)

    def request_features(self, users: Any, times: Any, *, short: int, long: int) -> UserFeatures:
        """The same for requests of `users` at arbitrary `times`.

        Args:
          users: [B] integer user rows; row 0, the unknown user, has an empty history.
          times: [B] integer seconds.
          short: S.
          long: L.

        Returns:
          UserFeatures of NumPy arrays with a leading axis B.

        Raises:
          TypeError, ValueError: users that are not integers in [0, U), times that are not integers [B], lengths below 1.
        """
        users = expect_integers(users, "users", size=len(self.users))
        end = self.log.history_end_at(users, times)
        return self._features(users, np.asarray(times, np.int64), end, short=short, long=long)

    def with_signatures(self, signature: Any) -> Dataset:
        """The same data set with item signatures uint32 [N, W]; behaviours carry them too."""
        return dataclasses.replace(self, catalogue=self.catalogue.with_signatures(signature))

    def with_content(self, content: Any) -> Dataset:
        """The same data set with another content embedding float32 [N, E]."""
        catalogue = self.catalogue.with_content(content)
        return dataclasses.replace(self, schema=catalogue.schema, catalogue=catalogue)

    def _features(self, users: np.ndarray, times: np.ndarray, end: np.ndarray, *, short: int, long: int) -> UserFeatures:
        if short < 1 or long < 1:
            raise ValueError(f"short, long: expected lengths of at least 1, got short={short}, long={long}")
        history = self._behaviours(users, times, end, max(short, long))
        return UserFeatures(
            ids={name: table[users] for name, table in self.user_ids.items()},
            floats=self.user_floats[users],
            short=_most_recent(history, short),
            long=_most_recent(history, long),
        )

    def _behaviours(self, users: np.ndarray, times: np.ndarray, end: np.ndarray, length: int) -> Behaviours:
        log, catalogue = self.log, self.catalogue
        index, mask = log.windows(log.offsets[users], end, length)
        if not len(log):  # there is nothing to read, not even for padding
            log = EventLog.from_arrays([1], [0], [0], [0])
        # `take` into fresh arrays, then in place: this runs once for every training step and every request
        item = log.item.take(index)
        item *= mask  # row 0, all zeros, in padding
        action = log.action.take(index)
        action *= mask
        age = log.time.take(index)
        np.subtract(times[:, None], age, out=age)
        age *= mask
        # A log was checked when it was opened; its file may have been damaged since, and a wrong row must not be trained on.
        for name, values, limit in (
            ("item", item, len(catalogue)),
            ("action", action, self.schema.actions),
            ("age", age, 2**62),
        ):
            if values.size and (values.min() < 0 or values.max() >= limit):
                at = np.unravel_index(np.argmax((values < 0) | (values >= limit)), values.shape)
                raise CorruptRecord(
                    f"{self.name}: event {index[at]} of the log is corrupt: expected {name} in [0, {limit}), got {values[at]};"
                    f" it is in the history of user {users[at[0]]}"
                )
        signature = None
        if catalogue.signature is not None:
            signature = catalogue.signature.take(item, axis=0)
            if catalogue.signature[0].any():
                signature *= mask[..., None]
        return Behaviours(
            ids={field: catalogue.ids[field].take(item) for field in self.schema.behaviour_fields},
            action=action,
            age=age.astype(np.float32),
            mask=mask,
            signature=signature,
        )


def _most_recent(history: Behaviours, length: int) -> Behaviours:
    """The first `length` behaviours of every row, as arrays of their own where that is not all of them."""

    def cut(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[:, :length])

    return Behaviours(
        ids={field: cut(np.asarray(ids)) for field, ids in history.ids.items()},
        action=cut(np.asarray(history.action)),
        age=cut(np.asarray(history.age)),
        mask=cut(np.asarray(history.mask)),
        signature=None if history.signature is None else cut(np.asarray(history.signature)),
    )
