"""Which features there are: the part of a config that data, model, index and export must agree on."""

import dataclasses
from typing import Any, Self

from aif_jax.checks import expect, expect_types

REQUIRED_ITEM_FIELDS = ("item", "category")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribute:
    """One categorical feature and its vocabulary.

    Attributes:
      name: key in `ids` dicts and of the embedding table.
      size: rows of the vocabulary, at least 2, row 0 (unknown or padding) included; ids are in [0, size).
      length: 1 for a single value (ids of shape []), n > 1 for a bag of up to n values (ids [n], padded with 0).
    """

    name: str
    size: int
    length: int = 1

    def __post_init__(self):
        expect_types(self)
        expect(self.name and "/" not in self.name, "Attribute.name", "a non-empty name without '/'", repr(self.name))
        expect(self.size >= 2, f"Attribute {self.name!r}.size", "at least 2 (row 0 is 'unknown')", self.size)
        expect(self.length >= 1, f"Attribute {self.name!r}.length", "at least 1", self.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """The features of a data set.

    Attributes:
      item_attributes: categorical attributes of an item; must hold single-valued "item" and "category".
      user_attributes: categorical attributes of a user; names must differ from the items'.
      behaviour_fields: names of the item attributes that a behaviour is embedded by too (they share the item's table). The
        catalogue determines them, so they are looked up by item id.
      actions: size of the behaviour-type (or rating-bucket) vocabulary, row 0 unknown.
      user_floats, item_floats: how many float features.
      item_statistics: half-lives in seconds of `ItemStatistics`, whose numbers are the last of the `item_floats`; () for none.
      statistic_actions: names of the actions 1, 2, ... that the item statistics count apart; () counts all events as one kind.
      content: E, the width of the content embedding; 0 for none.
      side: names of float values that a row carries along for the engine, such as "bid".
      encoding: version of the encoder whose ids and floats these are; "" where none is known, as for arrays made by hand. It
        travels with every catalogue, data set and config that has this schema, and data of another encoder is refused. No part
        of equality or JSON.

    Example:
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=100), Attribute(name="category", size=8)))
      >>> schema.behaviour_fields
      ('item', 'category')
    """

    item_attributes: tuple[Attribute, ...]
    user_attributes: tuple[Attribute, ...] = ()
    behaviour_fields: tuple[str, ...] = REQUIRED_ITEM_FIELDS
    actions: int = 2
    user_floats: int = 0
    item_floats: int = 0
    item_statistics: tuple[int, ...] = ()
    statistic_actions: tuple[str, ...] = ()
    content: int = 0
    side: tuple[str, ...] = ()
    encoding: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        expect_types(self)
        names = [a.name for a in self.item_attributes + self.user_attributes]
        expect(len(set(names)) == len(names), "Schema", "attribute names that differ", names)
        single, behaviour = {a.name for a in self.item_attributes if a.length == 1}, "Schema.behaviour_fields"
        for name in REQUIRED_ITEM_FIELDS:
            expect(name in single, "Schema.item_attributes", f"a single-valued {name!r}", sorted(single))
            expect(name in self.behaviour_fields, behaviour, f"{name!r} among them", self.behaviour_fields)
        for name in self.behaviour_fields:
            expect(name in single, behaviour, f"single-valued item attributes {sorted(single)}", repr(name))
        expect(self.actions >= 2, "Schema.actions", "at least 2 (row 0 is 'unknown')", self.actions)
        least = len(self.statistics)
        expect(self.item_floats >= least, "Schema.item_floats", f"at least {least}, for item_statistics", self.item_floats)
        fits, expected = len(self.statistic_actions) in (0, self.actions - 1), f"none or {self.actions - 1} names, for actions"
        expect(fits, "Schema.statistic_actions", expected, self.statistic_actions)
        for field in ("user_floats", "item_floats", "content"):
            expect(getattr(self, field) >= 0, f"Schema.{field}", "0 or more", getattr(self, field))

    def __repr__(self) -> str:
        """Return the features, each attribute with its size, and its length if it is a bag."""

        def listed(attributes: tuple[Attribute, ...]) -> str:
            return ", ".join(f"{a.name} {a.size}{f'x{a.length}' if a.length > 1 else ''}" for a in attributes) or "none"

        parts = [f"items: {listed(self.item_attributes)}", f"users: {listed(self.user_attributes)}"]
        parts += [f"behaviours: {', '.join(self.behaviour_fields)}", f"actions: {self.actions}"]
        parts += [f"{name}: {n}" for name in ("user_floats", "item_floats", "content") if (n := getattr(self, name))]
        parts += [f"side: {', '.join(self.side)}"] if self.side else []
        return f"Schema({'; '.join(parts)})"

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the item statistics, the last of the item floats; () for none."""
        return statistic_names(self.item_statistics, self.statistic_actions)

    @property
    def table_sizes(self) -> dict[str, int]:
        """Rows of each attribute's embedding table, by name."""
        return {a.name: a.size for a in self.item_attributes + self.user_attributes}

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values; `Schema.from_json` reads it back."""
        # what is not set is left out: schemas without statistics keep the fingerprint they had
        written = dataclasses.replace(self, encoding="")  # the encoder is written next to it
        left_out = ("encoding", ""), ("item_statistics", ()), ("statistic_actions", ())
        return dataclasses.asdict(written, dict_factory=lambda fields: dict(f for f in fields if f not in left_out))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the schema that `to_json` wrote."""
        expect("encoding" not in value, "schema", "a record that `to_json` made", "one with an encoding")
        fields: dict[str, Any] = {name: tuple(entry) if isinstance(entry, list) else entry for name, entry in value.items()}
        for name in ("item_attributes", "user_attributes"):
            fields[name] = tuple(Attribute(**attribute) for attribute in fields.get(name, ()))
        return cls(**fields)


def statistic_names(half_lives: tuple[int, ...], actions: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the columns of the statistics in a table of items, () without half-lives; see `ItemStatistics`."""
    counts = ("events_so_far", *(f"events_half_life_{seconds}" for seconds in half_lives))
    by_action = tuple(f"{name}_{action}" for action in actions for name in (*counts, "events_rate"))
    return (*(by_action or counts), "since_first_event", "since_last_event") if half_lives else ()
