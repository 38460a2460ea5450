"""A data set ready for training and serving: schema, events, catalogue, users, and the encoder that made them."""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import check_encoding, expect, expect_array, expect_finite, expect_integers, expect_names, expect_range
from aif_jax.data.cascade import Cascade
from aif_jax.data.events import COLUMNS, EventLog, ranges, repeated_share
from aif_jax.data.statistics import ItemStatistics
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.times import in_unit, seconds_of
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.features import behaviours
from aif_jax.schema import Schema
from aif_jax.store.trained import digest
from aif_jax.trees import leaves_by_path
from aif_jax.types import ItemFeatures, UserFeatures

REPEATED = 0.01
"""Share of events that repeat an item of their user, from which on users count as coming back to items."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Events, the features of users and items, and the raw ids behind their rows.

    Attributes:
      name: for logs and reports.
      log: the events; its item values are catalogue rows, its user values user rows.
      catalogue: item features [N].
      user_ids: by attribute of users, its values' rows int32 [U], or [U, n] of several values; row 0 is the unknown user.
      user_floats: float32 [U, F].
      users, items: vocabularies, raw ids to the U user rows and the N item rows.
      encoder: raw data to these features; None for data made otherwise, whose raw values nothing encodes.
      cascade: logged requests with all their candidates; None where the log holds no more than events.
      display_positions: int32 [n] of each event of the log in the list that was shown, from 1 on; 0 for unknown; None for none.
      repeats: whether users come back to items, which training, evaluation and candidates follow: where they do not, an item
        that the user has met is no negative and no candidate. None estimates it when the data set is made: whether `repeated`,
        the measured share of events, is at least `REPEATED`, 1 %. `dataclasses.replace` keeps the value.
      counted_log: events that item statistics count, those of forgotten or unknown users too; None for `log`.

    Raises:
      TypeError, ValueError: parts that do not fit together: names the field, what was expected and what came.
      EncodingMismatch: a catalogue of another encoder.
    """

    name: str
    log: EventLog
    catalogue: Catalogue
    user_ids: dict[str, np.ndarray]
    user_floats: np.ndarray
    users: Vocabulary
    items: Vocabulary
    encoder: Encoder | None = None
    cascade: Cascade | None = None
    display_positions: np.ndarray | None = None
    repeats: bool | None = None
    counted_log: EventLog | None = None

    def __post_init__(self):
        schema, users, items = self.schema, len(self.users), len(self.items)
        for field, rows, got in (("log.users", users, self.log.users), ("catalogue", items, len(self.catalogue))):
            expect(rows == got, f"Dataset.{field}", f"{rows} rows like the vocabulary", got)
        same = np.array_equal(self.items.raw, self.catalogue.raw)
        got = f"{self.items} and a catalogue of {len(self.catalogue)} rows"
        expect(same, "Dataset.items", "the raw ids of the catalogue in the same order", got)
        if self.encoder is not None:
            known = self.encoder.vocabularies
            same = (self.encoder.schema, known["user"], known["item"]) == (schema, self.users, self.items)
            got = f"one of {self.encoder.schema!r}; take the encoder that read them"
            expect(same, "Dataset.encoder", "one of this schema with these users and items", got)
            check_encoding("Dataset.catalogue", expected=self.encoder.version, got=schema.encoding)
            if not schema.encoding:
                object.__setattr__(self, "catalogue", dataclasses.replace(self.catalogue, schema=self.encoder.schema))
        expect_names(self.user_ids, "Dataset.user_ids", [a.name for a in schema.user_attributes])
        for a in schema.user_attributes:
            name, shape = f"Dataset.user_ids[{a.name!r}]", (users,) if a.length == 1 else (users, a.length)
            expect_range(expect_array(self.user_ids[a.name], name, dtype=np.int32, shape=shape), name, size=a.size)
        name, shape = "Dataset.user_floats", (users, schema.user_floats)
        expect_finite(expect_array(self.user_floats, name, dtype=np.float32, shape=shape), name)
        expect_range(self.log.item, "Dataset.log.item", size=items)
        expect_range(self.log.action, "Dataset.log.action", size=self.schema.actions)
        if self.cascade is not None:
            expect_range(self.cascade.rows, "Dataset.cascade.rows", size=items)
            expect_range(self.cascade.positions, "Dataset.cascade.positions", size=len(self.log))
        if self.display_positions is not None:
            shown = expect_array(self.display_positions, "Dataset.display_positions", dtype=np.int32, shape=(len(self.log),))
            expect_range(shown, "Dataset.display_positions", size=2**31)
        given = self.repeats is None or isinstance(self.repeats, bool | np.bool_)
        expect(given, "Dataset.repeats", "True, False, or None to estimate it from the log", repr(self.repeats))
        if self.repeats is None:
            object.__setattr__(self, "repeats", self.repeated >= REPEATED)

    def __repr__(self) -> str:
        counts = f"{len(self.users.raw):,} users, {len(self.items.raw):,} items, {len(self.log):,} events"
        return f"Dataset({self.name!r}: {counts}, {self.schema!r})"

    @property
    def schema(self) -> Schema:
        """Which features there are: those of the catalogue."""
        return self.catalogue.schema

    @property
    def encoding(self) -> str:
        """Version of the encoder that made the features, "" if unknown; see `Schema.encoding`."""
        return self.schema.encoding

    @property
    def columns(self) -> Columns:
        """Names and units of the raw data; the defaults without an encoder."""
        return Columns() if self.encoder is None else self.encoder.columns

    @property
    def action_names(self) -> list[Any]:
        """Raw actions of the action rows from 1 on; [] if unknown."""
        known = {} if self.encoder is None else self.encoder.vocabularies
        return list(self.columns.actions) or (known["action"].raw.tolist() if "action" in known else [])

    @functools.cached_property
    def action_counts(self) -> np.ndarray:
        """Events of the log by action row, int64 [actions]."""
        return np.bincount(self.log.action, minlength=self.schema.actions)

    @functools.cached_property
    def repeated(self) -> float:
        """Measured share of the events that repeat an item which their user has met before, see `events.repeated_share`."""
        return repeated_share(self.history_log)

    @functools.cached_property
    def history_log(self) -> EventLog:
        """The events that histories hold: the whole log, or a copy in memory of those of `Columns.history_actions`."""
        engaged = None if self.encoder is None else self.encoder.engaged
        if engaged is None:
            return self.log
        kept = np.isin(self.log.action, engaged)
        return EventLog(*(getattr(self.log, name)[kept] for name in COLUMNS), users=self.log.users)

    @functools.cached_property
    def digest(self) -> str:
        """64 hex digits over events, items, users, cascade, encoder and `repeats`: other data with the same counts differ."""
        logs, cascade, encoder = (self.log, self.counted_log), self.cascade, self.encoder
        arrays = {
            "log": [getattr(log, name) for log in logs if log is not None for name in (*COLUMNS, "offsets")],
            "items": self.catalogue.items,
            "users": [self.user_ids, self.user_floats],
            "display_positions": self.display_positions,
            "cascade": None if cascade is None else [cascade.positions, cascade.rows, cascade.stage, dict(cascade.labels)],
        }
        leaves = {path: dataclasses.astuple(digest(leaf)) for path, leaf in leaves_by_path(arrays).items()}
        parts = [leaves, encoder and encoder.version, self.users.digest, self.items.digest, bool(self.repeats)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def user_features(self, positions: Any, *, length: int) -> UserFeatures:
        """Return user features as of each sample: the profile, and the last `length` strictly earlier events.

        UserFeatures [B] of NumPy arrays; ages in seconds up to the sample's time.

        Raises:
          TypeError, ValueError: positions that are not integers in [0, n), a length below 1.
        """
        at = expect_integers(positions, "positions", size=len(self.log))
        return self.request_features(self.log.user[at], self.log.time[at], length=length)

    def request_features(self, users: Any, times: Any, *, length: int) -> UserFeatures:
        """Return features of user rows int [B] at `times` int [B] in seconds; `encoder.user` does it for raw ids and events."""
        expect(length >= 1, "length", "at least 1", length)
        users, times = expect_integers(users, "users", size=len(self.users)), in_unit(times, "times")
        log = self.history_log
        index, mask = log.windows(log.offsets[users], log.history_end_at(users, times), length)
        if not len(log):  # there is nothing to read, not even for padding
            log = EventLog([1], [0], [0], [0])
        item, action, age = log.item.take(index), log.action.take(index), log.time.take(index)
        np.subtract(times[:, None], age, out=age)
        return UserFeatures(
            ids={name: table[users] for name, table in self.user_ids.items()},
            floats=self.user_floats[users],
            history=behaviours(item, action, age, mask),
            encoding=self.encoding,
        )

    def history_lengths(self, positions: Any) -> np.ndarray:
        """Return int64 [B] events in the whole history before each sample."""
        at = np.asarray(positions)
        return self.history_log_end(at) - self.history_log.offsets[self.log.user[at]]

    def display_positions_of(self, positions: Any, rows: np.ndarray) -> np.ndarray:
        """Return the place of candidates int [B, C] in the lists of samples int [B], int32; 0 if unknown or not shown.

        A list is a user's events of one time; an item that repeats has its largest place. ValueError for data without any.
        """
        if self.display_positions is None:
            raise ValueError("Dataset.display_positions: expected those of shown items, got None; give Columns.position")
        log, at = self.log, np.asarray(positions)
        first = log.history_end(at)
        lengths = log.request_end(at) - first
        event = ranges(first, lengths)
        shown = np.repeat(np.arange(len(at)), lengths) * len(self.catalogue) + log.item[event]
        order = np.lexsort((self.display_positions[event], shown))
        wanted = np.arange(len(at))[:, None] * len(self.catalogue) + rows
        found = order[np.searchsorted(shown[order], wanted, side="right") - 1]
        return np.where((shown[found] == wanted) & (rows > 0), self.display_positions[event[found]], 0)

    @property
    def counted(self) -> EventLog:
        """The events that item statistics count."""
        return self.counted_log or self.log

    @functools.cached_property
    def statistics(self) -> ItemStatistics | None:
        """Item statistics as of any moment, from the events counted; None where the schema has none."""
        return ItemStatistics(self.schema, self.counted) if self.schema.item_statistics else None

    def item_features(self, rows: Any, times: Any, *, content: bool = True) -> ItemFeatures:
        """Return item features as of given times: those of the catalogue, with the statistics of that time.

        Seconds broadcast to the shape of `rows`: [B, 1] for candidates [B, C] of samples.
        """
        features = self.catalogue.features(rows, content=content)
        if self.statistics is None:
            return features
        known = np.asarray(features.floats)[..., : -self.statistics.width]
        return dataclasses.replace(features, floats=np.concatenate([known, self.statistics.at(rows, times)], -1))

    def statistic_columns(self, ids: Any, time: Any) -> dict[str, np.ndarray]:
        """Return item statistics of raw ids [n] as of `time`, a `datetime` or in `Columns.time_unit`: for a table of raw items.

        Column name to float32 [n], see `Columns.item_statistics`; {} where the schema has none. An unknown id has no event.

        Example:
          >>> import aif_jax as aif
          >>> events = {"user": [1, 2, 2], "item": [7, 7, 8], "time": [10, 3610, 3620]}
          >>> columns = aif.Columns(item_statistics=(3600,))
          >>> data = aif.read(events, items={"item": [7, 8], "category": [1, 1]}, columns=columns)
          >>> found = data.statistic_columns([7, 8], 3615)
          >>> np.expm1(4 * found["events_so_far"]).round(3).tolist()
          [2.0, 0.0]
        """
        if self.statistics is None:
            return {}
        floats = self.statistics.at(self.items.encode(ids), seconds_of(time, "time", unit=self.columns.time_unit))
        return dict(zip(self.schema.statistics, floats.T, strict=True))

    def history_log_end(self, positions: np.ndarray) -> np.ndarray:
        """Return where in `history_log` the history of each sample ends, int64 [B]."""
        return self.history_log.history_end_at(self.log.user[positions], self.log.time[positions])
