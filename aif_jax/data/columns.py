"""Which column of one's own files is what. Source: ours."""

from __future__ import annotations

import dataclasses

from aif_jax.data.tables import PER_SECOND, Kind, Reading, TimeUnit

RESERVED = ("user", "item", "category", "action")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column is what: of the events file, the items file and, where there is one, the users file.

    Attributes:
      user: user ids in events and users: integers from 0, or text.
      item: item ids in events and items: the same.
      time: when it happened: integers in `time_unit`, or timestamps (UTC where they name no zone). Sub-seconds are cut.
      time_unit: of integer times: "s", "ms", "us" or "ns".
      action: what was done (a behaviour type or a rating); None where the events are of one kind.
      actions: values of `action` in the order of actions 1, 2, ...; () takes those that the file has, ascending.
      category: of an item; the field by which SIM looks into the history.
      item_attributes: further categorical columns of items, one value each; missing ones are "unknown".
      item_bags: columns of items with several values: lists, or text joined by `bag_separator`.
      bag_length: values of a bag that are kept, the first ones.
      bag_separator: between the values of a bag that comes as text.
      item_floats: numbers of an item; scale them to about -1..1, they enter the network as they are.
      side: numbers of an item that the engine gets to see and the network does not, such as a bid.
      content: a column of lists of numbers, the content embedding.
      behaviour_fields: among `item_attributes`, those that a behaviour carries beside item and category (SIM may use them).
      user_attributes, user_floats: the same of users.
      user_id: adds the user's own row as a user attribute.
      item_key, user_key: the id column of the items file and of the users file, where its name differs from that in events.
      text: columns that are text even where they look like numbers.

    Raises:
      ValueError: names that collide, or a value that is none of those allowed.

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
    category: str = "category"
    item_attributes: tuple[str, ...] = ()
    item_bags: tuple[str, ...] = ()
    bag_length: int = 8
    bag_separator: str = "|"
    item_floats: tuple[str, ...] = ()
    side: tuple[str, ...] = ()
    content: str | None = None
    behaviour_fields: tuple[str, ...] = ()
    user_attributes: tuple[str, ...] = ()
    user_floats: tuple[str, ...] = ()
    user_id: bool = False
    item_key: str | None = None
    user_key: str | None = None
    text: tuple[str, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from JSON or a command line
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(field.default, tuple) and not isinstance(value, tuple):
                raise ValueError(f"Columns.{field.name}: expected a tuple of column names, got {value!r}")
        if self.time_unit not in PER_SECOND:
            raise ValueError(f"Columns.time_unit: expected one of {', '.join(PER_SECOND)}, got {self.time_unit!r}")
        if self.bag_length < 2:
            raise ValueError(
                f"Columns.bag_length: expected at least 2 (item_attributes are for single values), got {self.bag_length}"
            )
        named = [*self.item_attributes, *self.item_bags, *self.user_attributes]
        for name in named:
            if name in RESERVED or named.count(name) > 1:
                names = f"different names, none of them {', '.join(RESERVED)}"
                raise ValueError(f"Columns: expected attributes of {names}, got {name!r} among {named}")
        for file, kinds in (("events", self._events()), ("items", self._items()), ("users", self._users())):
            used = [name for name, _ in kinds]
            twice = sorted({name for name in used if used.count(name) > 1})
            if twice:
                raise ValueError(f"Columns: expected each column of the {file} file in one place, got {twice} in several")
        for name in self.behaviour_fields:
            if name not in self.item_attributes:
                raise ValueError(
                    f"Columns.behaviour_fields: expected names among item_attributes {self.item_attributes}, got {name!r}"
                )
        if self.actions and self.action is None:
            raise ValueError(
                f"Columns.actions: expected a column for them in Columns.action, got None with actions {self.actions}"
            )

    @property
    def reading(self) -> Reading:
        """Units and separators for `tables.blocks`."""
        return Reading(time_unit=self.time_unit, text=self.text, bag_length=self.bag_length, bag_separator=self.bag_separator)

    def of_events(self) -> dict[str, Kind]:
        """The columns of an events file."""
        return dict(self._events())

    def of_items(self) -> dict[str, Kind]:
        """The columns of an items file."""
        return dict(self._items())

    def of_users(self) -> dict[str, Kind]:
        """The columns of a users file."""
        return dict(self._users())

    def _events(self) -> list[tuple[str, Kind]]:
        action: list[tuple[str, Kind]] = [] if self.action is None else [(self.action, "category")]
        return [(self.user, "id"), (self.item, "id"), (self.time, "time"), *action]

    def _items(self) -> list[tuple[str, Kind]]:
        content: list[tuple[str, Kind]] = [] if self.content is None else [(self.content, "vector")]
        return [
            (self.item_id, "id"),
            (self.category, "category"),
            *((name, "value") for name in self.item_attributes),
            *((name, "bag") for name in self.item_bags),
            *((name, "float") for name in (*self.item_floats, *self.side)),
            *content,
        ]

    def _users(self) -> list[tuple[str, Kind]]:
        return [
            (self.user_key or self.user, "id"),
            *((name, "value") for name in self.user_attributes),
            *((name, "float") for name in self.user_floats),
        ]

    @property
    def item_id(self) -> str:
        """The id column of the items file."""
        return self.item_key or self.item

    def vocabulary_of(self, column: str) -> str:
        """The vocabulary that a column's values belong to."""
        names = {self.user: "user", self.user_key: "user", self.item: "item", self.item_key: "item", self.category: "category"}
        return names.get(column) or ("action" if column == self.action else column)
