"""Names and meaning of the columns of your files."""

import collections
import dataclasses
from typing import Any, Literal, TypeAlias, get_args

from aif_jax.checks import Fields, expect, expect_types
from aif_jax.encoding.times import TimeUnit
from aif_jax.registry import plain
from aif_jax.schema import statistic_names

Kind: TypeAlias = Literal["id", "value", "action", "bag", "float", "optional float", "vector", "time"]
"""What a column holds: "id" (integers from 0 or strings, none missing), "value" (integers or strings, may be missing), "action"
(the same, none missing), "bag" (lists of values), "float", "optional float" (may be missing), "vector" (lists of floats),
"time"."""

TableName: TypeAlias = Literal["events", "items", "users"]  # of the files with a vocabulary, the last one here names its ids
CODED = ("id", "value", "action", "bag")  # kinds whose values become rows of a vocabulary
RESERVED = ("user", "item", "category", "action")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns(Fields):
    """Which column is what: of the events file, the items file and, where there is one, the users file.

    Attributes:
      user: user ids in events and users: integers from 0, or text.
      item: item ids in events and items: integers from 0, or text.
      time: when it happened: integers in `time_unit`, or timestamps (UTC unless named). Ages and requests go by seconds.
      time_unit: "s", "ms", "us" or "ns": unit of integer times, and the resolution of their order: timestamps are rounded
        down to it, and events of one user that are then equal are ordered by item and action, in training as in serving.
      action: what was done (a behaviour type or a rating); None where the events are of one kind.
      actions: values of `action` in the order of actions 1, 2, ...; () takes those that the file has, ascending.
      history_actions: values of `action` that histories hold, those of a user who engages: ("click", "buy") of an impression
        log, whose shows would otherwise fill the history. Positives of `NextItem` are these alone. () takes every event.
      position: place of an event in the list that was shown, from 1 on; 0 or empty where it is unknown. For
        `blocks.PositionBias`: training alone reads it. None for none.
      category: category of an item; the field by which SIM looks into the history. A missing one is "unknown" and matches none.
      item_attributes: further categorical columns of items, one value each; missing ones are "unknown".
      item_bags: columns of items with several values: lists, or text joined by `bag_separator`, empty for no value.
      bag_length: values of a bag that are kept, the first ones.
      bag_separator: text between the values of a bag in a text column; empty pieces are no values.
      item_floats: numbers of an item.
      item_statistics: half-lives in seconds of `ItemStatistics`, how popular an item is as of a sample's time, which then are
        float features of items; () for none. Several `actions` are counted apart, with the rate of each. `read` computes them
        from the events. A table of items for an index must have these columns, as of the moment when the index is made:
        `Dataset.statistic_columns` gives them.
      side: numbers of an item that the engine gets to see and the network does not, such as a bid.
      content: a column of lists of numbers, the content embedding.
      behaviour_fields: among `item_attributes`, those by which a behaviour is embedded too, after item and category.
      user_attributes, user_floats: columns of the users file: categories of one value each, and numbers.
      user_id: adds the user's own row as a user attribute.
      item_key, user_key: the id column of the items file and of the users file, where its name differs from that in events.
      text: columns that are text even where they look like numbers: "07" and "7" are two ids then. Ids whose column has another
        name in another file (`item_key`, `user_key`): name both.
      scale: floats enter the network as (x - mean) / deviation over the files that training reads, outliers clipped
        (`Encoder.scales`); False takes them as they are, which suits numbers of about -1..1.

    Example:
      >>> Columns(user="uid", item="sku", time="ts", action="event", item_attributes=("brand",)).time_unit
      's'
    """

    user: str = "user"
    item: str = "item"
    time: str = "time"
    time_unit: TimeUnit = "s"
    action: str | None = None
    actions: tuple[str | int, ...] = ()
    history_actions: tuple[str | int, ...] = ()
    position: str | None = None
    category: str = "category"
    item_attributes: tuple[str, ...] = ()
    item_bags: tuple[str, ...] = ()
    bag_length: int = 8
    bag_separator: str = "|"
    item_floats: tuple[str, ...] = ()
    item_statistics: tuple[int, ...] = ()
    side: tuple[str, ...] = ()
    content: str | None = None
    behaviour_fields: tuple[str, ...] = ()
    user_attributes: tuple[str, ...] = ()
    user_floats: tuple[str, ...] = ()
    user_id: bool = False
    item_key: str | None = None
    user_key: str | None = None
    text: tuple[str, ...] = ()
    scale: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from JSON or a command line
                object.__setattr__(self, field.name, tuple(value))
        expect_types(self)
        expect(self.bag_length >= 2, "Columns.bag_length", "at least 2; item_attributes hold single values", self.bag_length)
        expect(self.bag_separator, "Columns.bag_separator", "a character or more between the values of a bag", repr(""))
        named = [*self.item_attributes, *self.item_bags, *self.user_attributes]
        for name in named:
            good = name not in ("", *RESERVED) and "/" not in name and named.count(name) == 1
            expected = f"attributes of different names without '/', none of them {', '.join(RESERVED)}"
            expect(good, "Columns", expected, f"{name!r} among {named}")
        lives = self.item_statistics
        distinct = all(seconds >= 1 for seconds in lives) and list(lives) == sorted(set(lives))
        expect(distinct, "Columns.item_statistics", "ascending half-lives of a second or more", lives)
        expected = f"Columns.actions, the values of {self.action!r}, which are counted apart"
        got = "none; give such as actions=('shown', 'click')"
        expect(not lives or self.action is None or self.actions, "Columns.item_statistics", expected, got)
        for file in get_args(TableName):
            used = collections.Counter(name for name, _ in self._listed(file))
            twice = sorted(name for name, count in used.items() if count > 1)
            expect(not twice, "Columns", f"each column of the {file} file in one place", f"{twice} in several")
        every = tuple(name for file in get_args(TableName) for name in self.of(file))
        for field, which, names in ("behaviour_fields", "item_attributes", self.item_attributes), ("text", "columns", every):
            for name in getattr(self, field):
                expect(name in names, f"Columns.{field}", f"names among {which} {names}", repr(name))
        for field, values in (("actions", self.actions), ("history_actions", self.history_actions)):
            got = f"None with {field} {values}"
            expect(not values or self.action is not None, f"Columns.{field}", "a column for them in Columns.action", got)
        expect(len(set(map(str, self.actions))) == len(self.actions), "Columns.actions", "each action once", self.actions)
        known, chosen = (set(map(str, values)) for values in (self.actions or self.history_actions, self.history_actions))
        expected = f"actions among Columns.actions {self.actions}"
        expect(chosen <= known, "Columns.history_actions", expected, self.history_actions)

    def of(self, file: TableName, *, statistics: bool = True, position: bool = True) -> dict[str, Kind]:
        """Return kinds of columns by name, with or without the item `statistics` of items and the `position` of events."""
        left_out = {"items": () if statistics else self.statistics, "events": () if position else (self.position,)}
        return {name: kind for name, kind in self._listed(file) if name not in left_out.get(file, ())}

    def vocabularies(self, file: TableName) -> dict[str, str]:
        """Return the categorical columns of a file and the vocabulary of each."""
        special = {
            "events": {self.user: "user", self.item: "item", self.action: "action"},
            "items": {self.item_id: "item", self.category: "category"},
            "users": {self.user_record_id: "user"},
        }[file]
        return {name: special.get(name, name) for name, kind in self._listed(file) if kind in CODED}

    @property
    def item_id(self) -> str:
        """The id column of the items file."""
        return self.item_key or self.item

    @property
    def user_record_id(self) -> str:
        """The id column of the users file."""
        return self.user_key or self.user

    @property
    def statistics(self) -> tuple[str, ...]:
        """The columns of item statistics, which a table of items for an index must have."""
        return statistic_names(self.item_statistics, self.statistic_actions)

    @property
    def statistic_actions(self) -> tuple[str, ...]:
        """The actions that item statistics count apart; () for a log of one action."""
        return tuple(map(str, self.actions)) if self.item_statistics and len(self.actions) > 1 else ()

    @property
    def floats(self) -> dict[str, tuple[str, ...]]:
        """The float columns of "item" and of "user" that come with the files."""
        return {"item": self.item_floats, "user": self.user_floats}

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values, the arguments of the same columns."""
        return plain(self, if_set=("item_statistics", "history_actions", "position"))

    def _listed(self, file: TableName) -> list[tuple[str, Kind]]:
        columns: dict[TableName, list[tuple[tuple[str | None, ...], Kind]]] = {
            "events": [
                ((self.user, self.item), "id"),
                ((self.time,), "time"),
                ((self.action,), "action"),
                ((self.position,), "optional float"),
            ],
            "items": [
                ((self.item_id,), "id"),
                ((self.category,), "value"),
                (self.item_attributes, "value"),
                (self.item_bags, "bag"),
                ((*self.item_floats, *self.statistics, *self.side), "float"),
                ((self.content,), "vector"),
            ],
            "users": [((self.user_record_id,), "id"), (self.user_attributes, "value"), (self.user_floats, "float")],
        }
        return [(name, kind) for names, kind in columns[file] for name in names if name is not None]
