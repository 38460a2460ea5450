"""The encoder: raw users, events and items to features, the same way in training and in serving."""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from aif_jax.checks import ArgumentError, expect
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.raw import column_of, expect_1d, float_of, names_in, select
from aif_jax.encoding.times import MODERN, PER_SECOND, dates_as_numbers, history_order, in_unit
from aif_jax.encoding.vocabulary import WHOLE, Vocabulary, as_ids, id_array, new_rows
from aif_jax.export.consume.ids import ids_by_name
from aif_jax.features import behaviours
from aif_jax.schema import Attribute, Schema
from aif_jax.types import Behaviours, ItemFeatures, UserFeatures

MOST_PLACES = 1 << 22  # of a history or a bag, so that a record from elsewhere cannot ask for all memory
CLIP_RANGE = 5  # outliers are further from the median than so many times the 5 % or 95 % quantile is
FEWEST = 20  # with fewer values in a column none is an outlier
SPELLINGS = (["false", "true"], ["False", "True"], ["FALSE", "TRUE"])  # of booleans in CSV, and of Arrow's as text


class LaterEvents(ValueError):
    """Events later than the request: clocks or units differ, or the request's time is too early."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """Everything that turns raw data into features, items by `readers.encode_items`; it travels with the model.

    `aif.read` makes it from your files, checkpoints and exports keep it. `Dataset.user_features` cuts samples by the same
    rules, so a request gets the features that a sample of the same moment would have had:

    | raw | becomes |
    |---|---|
    | an item or attribute value that the vocabulary lacks, an attribute None | row 0; an unknown item is still an event |
    | a user float None | 0 once scaled |
    | a user float NaN, a user without that column | ValueError |
    | an action that is none of those listed | action 0 |
    | an event whose action is none of `Columns.history_actions`, where there are any | left out |
    | events in any order | the most recent first, ties as `times.history_order` has them: the order of arrival never matters |
    | an event in the same second as the request, or up to `max_skew` seconds later | left out, as in training |
    | an event later than that | ValueError: clocks or units differ |
    | text where the vocabulary has integers | TypeError, though files may have "7" for 7 |
    | a time that cannot be in `Columns.time_unit` | ValueError with the likely unit |
    | more events than `length` | the most recent ones |
    | no events, no user | an empty history, the unknown user |

    Attributes:
      columns: names and units of raw data.
      vocabularies: by name: "user", "item", "category", each attribute, and "action" where `columns` lists no actions.
      content: E, the width of content embeddings; 0 for none.
      scales: "item/NAME" or "user/NAME" to (mean, standard deviation) of a float column, or (mean, deviation, low, high) where
        values are clipped to low..high first; empty for floats as they are.
      length: places of the history, a model's `config.history_length`.
      max_skew: seconds that an event may be later than the request.
      schema: the features, those of columns and vocabularies; carries the version as its `encoding`.

    Example:
      >>> columns = Columns(action="event", actions=("view", "buy"))
      >>> vocabularies = {"user": Vocabulary(["ann"]), "item": Vocabulary([7, 8]), "category": Vocabulary(["cup", "tea"])}
      >>> encoder = Encoder(columns=columns, vocabularies=vocabularies, length=3)
      >>> user = encoder.user(None, {"item": [7, 99], "time": [1_600_000_000, 1_600_000_050], "event": ["buy", "view"]},
      ...                     now=1_600_000_060)
      >>> user.history.item.tolist(), user.history.action.tolist(), user.history.age.tolist(), user.history.mask.tolist()
      ([0, 1, 0], [1, 2, 0], [10.0, 60.0, 0.0], [True, True, False])
    """

    columns: Columns
    vocabularies: Mapping[str, Vocabulary]
    content: int = 0
    scales: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    length: int = 512
    max_skew: int = 60
    schema: Schema = dataclasses.field(init=False)

    def __post_init__(self):
        expect(self.length >= 1, "Encoder.length", "at least 1", self.length)
        places = max(self.length, self.columns.bag_length)
        expect(places <= MOST_PLACES, "Encoder.length, Columns.bag_length", f"at most {MOST_PLACES}", places)
        expect(self.max_skew >= 0, "Encoder.max_skew", "0 seconds or more", self.max_skew)
        object.__setattr__(self, "schema", schema_of(self.columns, self.vocabularies, content=self.content))
        floats = {f"{which}/{name}" for which, names in self.columns.floats.items() for name in names}
        fits = not self.scales or set(self.scales) == floats
        expect(fits, "Encoder.scales", f"those of {sorted(floats)}, or none", sorted(self.scales))
        for name, scale in self.scales.items():
            fits = len(scale) == 2 or (len(scale) == 4 and scale[2] < scale[3])
            expected = "(mean, deviation), or with low < high (mean, deviation, low, high)"
            expect(fits, f"Encoder.scales[{name!r}]", expected, scale)
        known = self.engaged is None or self.engaged.all()
        expect(known, "Columns.history_actions", "actions that the vocabulary 'action' has", self.columns.history_actions)
        object.__setattr__(self, "schema", dataclasses.replace(self.schema, encoding=self.version))

    def __repr__(self) -> str:
        return f"Encoder({self.version[:12]}, {self.schema!r}, length={self.length})"

    @functools.cached_property
    def version(self) -> str:
        """64 hex digits over schema, columns, vocabularies and scales: what ids and floats mean. Features carry it."""
        parts = self._settings() | {"vocabularies": {name: v.digest for name, v in self.vocabularies.items()}}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def with_length(self, length: int) -> Self:
        """Return the same encoder for histories of `length` places; the version stays."""
        return dataclasses.replace(self, length=length)

    def user(self, user: Mapping[str, Any] | None, events: Any, now: Any) -> UserFeatures:
        """Return features of ONE user at the moment of a request: NumPy arrays with `length` places of history.

        Args:
          user: raw values by column of the users file (the id where `Columns.user_id` is set); None for an unknown user.
          events: raw values by column of the events file: arrays, lists or Arrow; None for no events. Of this user alone: a
            column `Columns.user`, where there is one, is compared with the user's id.
          now: time of the request, in `Columns.time_unit`, or a `datetime`.

        Raises:
          TypeError: ids of another kind than the vocabulary's, invalid times.
          ValueError: missing columns, columns of different lengths, times in another unit or later than `now` by more than
            `max_skew` seconds, floats that are not finite, also once scaled, events of other users.
        """
        self.expect_of_user(events, None if user is None else user.get(self.columns.user_record_id))
        ids, floats = self.profile(user)
        return UserFeatures(ids=ids, floats=floats, history=self._history(events, now), encoding=self.version)

    __call__ = user

    def item_features(
        self, rows: Mapping[str, np.ndarray], floats: Mapping[str, np.ndarray], content: np.ndarray | None
    ) -> ItemFeatures:
        """Return features of n items: rows int32 [n] or [n, bag length] by vocabulary, float32 [n] by column, content."""

        def stack(names: tuple[str, ...]) -> np.ndarray:
            return stacked([floats[name] for name in names], len(rows["item"]))

        scaled = self.scale_floats("item", stack(self.columns.item_floats))
        return ItemFeatures(
            ids={attribute.name: rows[attribute.name] for attribute in self.schema.item_attributes},
            floats=np.concatenate([scaled, stack(self.columns.statistics)], axis=1),
            content=content,
            side={name: floats[name] for name in self.columns.side},
            encoding=self.version,
        )

    def scale_floats(self, which: str, floats: np.ndarray) -> np.ndarray:
        """Return floats [n, F] of "item" or "user" as they enter the network; ValueError for what overflows there."""
        names = self.columns.floats[which]
        if not self.scales or not names:
            return floats
        scales = [(*self.scales[f"{which}/{name}"], -np.inf, np.inf)[:4] for name in names]
        mean, deviation, low, high = np.array(scales, np.float32).T
        with np.errstate(over="ignore"):
            scaled = (np.clip(floats, low, high) - mean) / deviation
        for row, place in np.argwhere(np.isinf(scaled))[:1]:
            expect(False, f"{which}, column {names[place]!r}", "a number that is finite once scaled", str(floats[row, place]))
        return scaled

    def action_rows(self, raw: Any) -> np.ndarray:
        """Return int32 [n] actions 1, 2, ... of raw values; 0 for one that `Columns.actions` or the vocabulary lacks."""
        name = f"events, column {self.columns.action!r}"
        raw = self._as_read(raw, str(self.columns.action), "action", name)
        if not self.columns.actions:
            return self.vocabularies["action"].encode(raw, name)
        vocabulary, rows = self._listed_actions["strings" if isinstance(raw[0] if len(raw) else 0, str) else "integers"]
        return rows[vocabulary.encode(raw, name)]

    @functools.cached_property
    def engaged(self) -> np.ndarray | None:
        """int32 action rows of `Columns.history_actions`, whose events histories hold; None for every event."""
        if not (chosen := self.columns.history_actions):
            return None
        actions, rows = self._listed_actions["strings"]  # a command line names integers as text
        return rows[actions.encode(list(map(str, chosen)))]

    def expect_of_user(self, events: Any, user: Any) -> None:
        """Raise ValueError for raw events of several users, or of another one than the raw id `user`, None for any one.

        Events without a column of users have nothing to compare.
        """
        name = self.columns.user
        if events is None or name not in names_in(events):
            return
        users = column_of(events, name)
        users = users if isinstance(users, list) else users.tolist()
        user = users[0] if user is None and users else user
        if users.count(user) == len(users):
            return
        others = [at for at, other in enumerate(users) if other != user and str(other) != str(user)]  # text may come as numbers
        got = others and f"{len(others)} of {len(users)} of others, such as {users[others[0]]!r} at position [{others[0]}]"
        way_out = f"give events[events[{name!r}] == {user!r}]"
        expect(not others, f"events, column {name!r}", f"rows of user {user!r} alone", f"{got}; {way_out}")

    def to_record(self) -> dict[str, Any]:
        """Return a dict of plain JSON values; with `to_arrays` everything that `from_record` needs."""
        rest = {"length": self.length, "max_skew": self.max_skew, "version": self.version}
        return self._settings() | {"vocabularies": list(self.vocabularies)} | rest

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the vocabularies as arrays: "NAME/ids" int64, or for strings "NAME/utf8" uint8 and "NAME/offsets" int64."""
        return {f"{name}/{key}": array for name, v in self.vocabularies.items() for key, array in v.to_arrays().items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Self:
        """Return the encoder that `to_record` and `to_arrays` wrote. Raises ValueError for missing or other parts."""
        known, named = ids_by_name(arrays), record.get("vocabularies", ())
        if missing := [name for name in named if name not in known]:
            raise ValueError(f"encoder: expected arrays of every vocabulary, got none of {missing}")
        try:
            encoder = cls(
                columns=Columns(**record["columns"]),
                vocabularies={name: Vocabulary(known[name].raw) for name in dict.fromkeys((*named, *known))},
                content=record["schema"]["content"],
                scales={name: tuple(map(float, scale)) for name, scale in record["scales"].items()},
                length=record["length"],
                max_skew=record["max_skew"],
            )
        except (KeyError, TypeError, AttributeError, ArgumentError) as error:
            text = f"encoder: expected a record of Encoder.to_record, got another: {error!r}"
            raise ValueError(f"{text}; another version wrote it, or it was edited: export or save the model again") from error
        version = record.get("version")
        expect(encoder.version == version, "encoder", f"vocabularies and settings of version {version}", encoder.version)
        return encoder

    def _settings(self) -> dict[str, Any]:
        scales = {name: list(scale) for name, scale in self.scales.items()}
        return {"schema": self.schema.to_json(), "columns": self.columns.to_json(), "scales": scales}

    @functools.cached_property
    def _listed_actions(self) -> dict[str, tuple[Vocabulary, np.ndarray]]:
        """For text and for integers: all actions as a vocabulary of that kind, and the action of each of its rows."""
        listed = self.columns.actions or self.vocabularies["action"].raw.tolist()
        numbers: dict[Any, int] = {str(value): number for number, value in enumerate(listed, start=1)}
        integers: dict[Any, int] = {int(text): number for text, number in numbers.items() if re.match(WHOLE, text)}
        return {
            kind: (Vocabulary(list(rows)), np.array([0, *(rows[value] for value in sorted(rows))], np.int32))
            for kind, rows in (("strings", numbers), ("integers", integers))
        }

    def profile(self, user: Mapping[str, Any] | None) -> tuple[dict[str, Any], np.ndarray]:
        """Return ids and floats of ONE user from raw values by column; None for an unknown one."""
        columns = self.columns
        names = {columns.user_record_id: "user"} if columns.user_id else {}
        names |= {name: name for name in columns.user_attributes}
        if user is None:
            return {name: np.zeros((), np.int32) for name in names.values()}, np.zeros(len(columns.user_floats), np.float32)
        missing = [name for name in (*names, *columns.user_floats) if name not in user]
        expect(not missing, "user", f"values of {missing}, None or null where unknown", f"none among {list(user)}"[:200])
        ids = {name: self._row(user[column], column, name) for column, name in names.items()}
        given = {f"user, column {name!r}": user[name] for name in columns.user_floats}
        numbers = [np.nan if value is None else float_of(value, where) for where, value in given.items()]
        floats = self.scale_floats("user", np.array([numbers], np.float32))[0]
        return ids, np.where(np.isnan(floats), np.float32(0), floats)

    def _history(self, events: Any, now: Any) -> Behaviours:
        columns, length = self.columns, self.length
        moment = in_unit(now, "now", unit=columns.time_unit) // PER_SECOND[columns.time_unit]
        expect(not moment.ndim, "now", "one time", f"an array of shape {list(moment.shape)}")
        (item, action), age, count = np.zeros((2, length), np.int32), np.zeros(length, np.int64), 0
        if events is not None:
            item_rows, action_rows, seconds = self._latest(events, int(moment))
            count = len(seconds)
            item[:count], action[:count], age[:count] = item_rows, action_rows, moment - seconds
        return behaviours(item, action, age, np.arange(length) < count)

    def _latest(self, events: Any, now: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return item row, action and second of the last events before `now`, most recent first."""
        columns, per_second = self.columns, PER_SECOND[self.columns.time_unit]
        raw = {name: column_of(events, name) for name in (columns.item, columns.time, columns.action) if name is not None}
        lengths = {name: len(values) for name, values in raw.items()}
        expect(len(set(lengths.values())) == 1, "events", "columns of one length", lengths)
        where = f"events, column {columns.time!r}"
        time = expect_1d(in_unit(raw[columns.time], where, unit=columns.time_unit), where, "time")
        last = int(time.max()) // per_second if len(time) else now
        if last > now + self.max_skew:
            expected = f"times up to the request's, {self.max_skew} s of clock skew allowed"
            got = f"one {last - now} s later at position [{int(np.argmax(time))}]"
            raise LaterEvents(f"{where}: expected {expected}, got {got}")
        if now - last > 10 * MODERN and dates_as_numbers(time).all():  # 30 years before the request
            expect(False, where, "times or ISO dates", f"{time[0]}, a date written as a number, before a request of {now} s")
        kept = time < now * per_second  # an event in the same second would tie with a sample
        if self.engaged is not None:
            kept &= np.isin(self.action_rows(raw[str(columns.action)]), self.engaged)
        if np.count_nonzero(kept) > self.length:  # the newest, and what ties with the oldest: `history_order` chooses
            kept &= time >= np.partition(time[kept], -self.length)[-self.length]
        at = None if kept.all() else np.flatnonzero(kept)
        name = f"events, column {columns.item!r}"
        values = self._as_read(select(raw[columns.item], at), columns.item, "item", name)
        item = expect_1d(self.vocabularies["item"].encode(values, name), name)
        action = np.ones(len(item), np.int32)
        if columns.action is not None:
            action = expect_1d(self.action_rows(select(raw[columns.action], at)), f"events, column {columns.action!r}")
        time = select(time, at)
        order = history_order(time, item, action, ids=lambda tied: id_array(as_ids(select(values, tied), name, short=False)))
        latest = slice(None, -self.length - 1, -1)  # the last `length`, the most recent first
        item, action, time = (values[order][latest] for values in (item, action, time))
        return item, action, time if per_second == 1 else time // per_second

    def _row(self, value: Any, column: str, name: str) -> np.ndarray:
        """Return the row of ONE raw value of a user, int32 []; 0 where it is missing, which pandas marks by NaN."""
        where = f"user, column {column!r}"
        if value is None or (isinstance(value, float) and value != value):
            return np.zeros((), np.int32)
        rows = self.vocabularies[name].encode(self._as_read([value], column, name, where), where)
        return expect_1d(rows, where).reshape(())

    def _as_read(self, values: Any, column: str, name: str, where: str) -> Any:
        """Return values as a file would give them: booleans as 0 and 1 or in their spelling, `Columns.text` as text.

        Raises TypeError for booleans as ids of users or items, and for booleans that the files spell in several ways.
        """
        known = self.vocabularies[name] if name in self.vocabularies else self._listed_actions["strings"][0]
        first = values[0] if len(values) else None
        if isinstance(first, bool | np.bool_):
            expect(name not in ("user", "item"), where, "integers or strings as ids", "bool", error=TypeError)
            found = [pair for pair in SPELLINGS if known.kind == "strings" and known.encode(pair).any()]
            expect(len(found) < 2, where, "text, because the files spell booleans in several ways", "bool", error=TypeError)
            pair = found[0] if found else [0, 1]
            return [pair[bool(value)] if isinstance(value, bool | np.bool_) else value for value in values]
        text = column in self.columns.text and known.kind == "strings"
        return list(map(str, values)) if text and isinstance(first, int | np.integer) else values


def schema_of(columns: Columns, vocabularies: Mapping[str, Vocabulary], *, content: int = 0) -> Schema:
    """Derive the schema of features; `content` is the width E of embeddings. Raises ValueError for a missing vocabulary."""
    users, wanted = (("user",) if columns.user_id else ()) + columns.user_attributes, vocabulary_names(columns)
    expect(set(wanted) == set(vocabularies), "Encoder.vocabularies", sorted(wanted), sorted(vocabularies))

    def attribute(name: str, length: int = 1) -> Attribute:
        return Attribute(name=name, size=max(len(vocabularies[name]), 2), length=length)

    actions = len(columns.actions) + 1 if columns.actions else len(vocabularies.get("action", ())) or 2
    return Schema(
        item_attributes=(
            *(attribute(name) for name in ("item", "category", *columns.item_attributes)),
            *(attribute(name, columns.bag_length) for name in columns.item_bags),
        ),
        user_attributes=tuple(attribute(name) for name in users),
        behaviour_fields=("item", "category", *columns.behaviour_fields),
        actions=max(actions, 2),
        user_floats=len(columns.user_floats),
        item_floats=len(columns.item_floats) + len(columns.statistics),
        item_statistics=columns.item_statistics,
        statistic_actions=columns.statistic_actions,
        content=content,
        side=columns.side,
    )


def reencode(items: ItemFeatures, before: Encoder, after: Encoder) -> ItemFeatures:
    """Return the features of one encoder with the ids of another with the same columns; ids that it lacks are unknown."""
    places = {name: np.maximum(new_rows(before.vocabularies[name], after.vocabularies[name]), 0) for name in items.ids}
    ids = {name: places[name][rows] for name, rows in items.ids.items()}
    return dataclasses.replace(items, ids=ids, encoding=after.version)


def vocabulary_names(columns: Columns) -> list[str]:
    """Return the vocabularies that features of these columns need."""
    action = ["action"] if columns.action is not None and not columns.actions else []
    return ["user", "item", "category", *columns.item_attributes, *columns.item_bags, *columns.user_attributes, *action]


def stacked(columns: list[np.ndarray], count: int) -> np.ndarray:
    """Return float32 [n, F] of F columns of n = `count` floats; F may be 0."""
    return np.stack(columns, axis=1) if columns else np.zeros((count, 0), np.float32)


def bulk_of(values: np.ndarray) -> tuple[float, float]:
    """Return low and high end of floats [n], n > 0, without outliers: median + `CLIP_RANGE` x (5 % or 95 % quantile - median).

    Normal and uniform distributions lie inside, very long tails except for 1 %. If a quantile equals the median, as among many
    zeros, the 1 % and then the 0.1 % quantile is taken, else the last value.
    """
    last, limit = len(values) - 1, float(np.finfo(np.float32).max)
    half = last // 2
    below = [min(half, math.ceil(share * last)) for share in (0.05, 0.01, 0.001)]
    above = [max(half, math.floor((1 - share) * last)) for share in (0.05, 0.01, 0.001)]
    ordered = np.partition(values, np.unique([half, *below, *above]))
    middle = float(ordered[half])

    def end(quantiles: np.ndarray, furthest: float) -> float:
        differ = quantiles[quantiles != middle].astype(np.float64)
        reach = CLIP_RANGE * (differ[0] - middle) if len(differ) else furthest - middle
        return float(np.float32(np.clip(middle + reach, -limit, limit)))

    return end(ordered[below], float(values.min())), end(ordered[above], float(values.max()))


def scale_of(values: np.ndarray) -> tuple[float, ...]:
    """Return the scale of floats [n], float32 numbers: (mean, standard deviation), the latter 1 for a constant column.

    With outliers (`bulk_of`) it is (mean, deviation, low, high) of the values clipped to low..high: one price of 1e12 would
    make a constant of all others. Fewer than `FEWEST` values have no outliers.
    """
    if not len(values):
        return 0.0, 1.0
    if values.min() == values.max():
        return float(values[0]), 1.0
    low, high = bulk_of(values)
    clipped = len(values) >= FEWEST and low < high and (values.min() < low or values.max() > high)
    values = np.clip(values, low, high) if clipped else values
    scale = float(np.float32(values.mean(dtype=np.float64))), float(np.float32(values.std(dtype=np.float64))) or 1.0
    return (*scale, low, high) if clipped else scale
