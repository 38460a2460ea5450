"""Static configuration of a model: sizes of the towers, the head, and a list of blocks; frozen, hashable, checked once."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from aif_jax.checks import Fields, expect, expect_types
from aif_jax.schema import Schema
from aif_jax.scores import parse_objectives

BlockType = TypeVar("BlockType", bound=type)
BLOCKS: dict[str, type] = {}  # every block class by name, for reading a config from JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Fields):
    """What `build` needs to know.

    Attributes:
      schema: the features.
      width: D, the width of vectors, embeddings and attention.
      short_length: S, the recent behaviours that the user tower sees.
      long_length: L, the behaviours that blocks on the long history see.
      towers: hidden widths of the user and the item MLP.
      head: hidden widths of the head MLP; () for none: the logit is the sum of the blocks' logits and a bias.
      sequence: self-attention and profile-to-sequence cross-attention in the user tower; False pools by the mean.
      item_content: the content embedding enters the item tower, where the schema has one.
      blocks: approximations, see `aif_jax.blocks`; their order is that of the head's inputs.
      objectives: what each logit is the probability of, see `aif_jax.scores`: ("click", "conversion|click", "like") gives
        logits [C, 3]. One name, or () for one without a name, gives logits [C].
      assembled: components of yours, by name, which `assemble` notes here: part of the version, as no folder holds functions.

    Example:
      >>> from aif_jax import Attribute, Schema
      >>> from aif_jax.blocks import Bea, Sim
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=100), Attribute(name="category", size=8)))
      >>> Config(schema=schema, blocks=(Bea(bridges=4), Sim("category"))).history_length
      256
    """

    schema: Schema
    width: int = 32
    short_length: int = 32
    long_length: int = 256
    towers: tuple[int, ...] = (64,)
    head: tuple[int, ...] = (64, 32)
    sequence: bool = True
    item_content: bool = True
    blocks: tuple[Any, ...] = ()
    objectives: tuple[str, ...] = ()
    assembled: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("towers", "head"):
            widths = getattr(self, field)
            fits = isinstance(widths, tuple) and all(isinstance(w, int) and w >= 1 for w in widths)
            expect(fits, f"Config.{field}", "a tuple of widths of at least 1", widths)
        expect(isinstance(self.objectives, tuple), "Config.objectives", "a tuple of names", repr(self.objectives))
        several = len(parse_objectives(self.objectives)) > 1
        expect(self.head or not several, "Config.head", "hidden widths for several objectives", "()")
        expect_types(self)
        for field in ("width", "short_length", "long_length"):
            expect(getattr(self, field) >= 1, f"Config.{field}", "at least 1", getattr(self, field))
        for part in self.blocks:
            if type(part) not in BLOCKS.values():
                raise TypeError(f"Config.blocks: expected values of classes made by the decorator `block`, got {part!r}")
        names = [part.name for part in self.blocks]
        expect(len(set(names)) == len(names), "Config.blocks", "blocks of different names", names)
        for part in self.blocks:
            for checked in (part, *part.tables):
                checked.check(self)
            used = self.head or not part.widths(self)
            expect(used, "Config.head", f"hidden widths for the inputs of {part!r}", "(): give head=(64, 32)")
        expect(
            self.blocks or self.head,
            "Config.blocks",
            "at least one block in a model without a head",
            "none; add blocks= or head=",
        )

    def __repr__(self) -> str:
        """The fields that differ from their defaults: what a reader of a log looks for."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name != "schema" and getattr(self, field.name) != field.default
        ]
        return f"Config({', '.join([*changed, f'schema={self.schema!r}'])})"

    @property
    def history_length(self) -> int:
        """Places of the history that the model reads."""
        return max(self.short_length, self.long_length)

    @property
    def outputs(self) -> int:
        """T, the logits of a candidate; with one they have no axis for it."""
        return max(1, len(self.objectives))

    @property
    def tables(self) -> tuple[Any, ...]:
        """The fitted tables of all blocks, each once."""
        return tuple(dict.fromkeys(table for part in self.blocks for table in part.tables))

    @property
    def reads_content(self) -> bool:
        """Whether an item's own content enters the model, beyond what is fitted on it; training leaves it out otherwise."""
        return self.item_content and self.schema.content > 0

    @property
    def reads_places(self) -> bool:
        """Whether training reads where candidates were shown."""
        return any(block.reads_places for block in self.blocks)

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def with_encoding(self, encoding: str) -> Config:
        """The same config for data of the encoder of that version, see `Schema.encoding`."""
        return self.replace(schema=dataclasses.replace(self.schema, encoding=encoding))

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `Config.from_json` reads it back."""
        blocks = [{"block": type(part).__name__} | _plain(part) for part in self.blocks]
        record = _plain(self) | {"schema": self.schema.to_json(), "blocks": blocks}
        for field in ("objectives", "assembled"):
            if not record[field]:
                del record[field]  # versions of models without them stay what they were
        return record

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Config:
        """The config that `to_json` wrote; ValueError for unknown fields, blocks that are not registered, or no such record."""
        try:
            blocks = [block_from_json(entry) for entry in value.get("blocks", ())]
            return _from_plain(cls, {**value, "schema": Schema.from_json(value["schema"]), "blocks": blocks}, "config")
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"config: expected a record that `to_json` made, got another: {error!r}") from error


def register(cls: BlockType) -> BlockType:
    """Registers a block class under its name, for configs in JSON; ValueError where another class has that name."""
    known = BLOCKS.setdefault(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"block {cls.__name__!r}: expected a new name, got one that {known.__module__} has registered")
    BLOCKS[cls.__name__] = cls
    return cls


def block_from_json(value: Mapping[str, Any]) -> Any:
    """The block that `Config.to_json` wrote; ValueError for a class that is not registered, or fields that it lacks."""
    importlib.import_module("aif_jax.blocks")  # registers the package's own, which import this module
    name = value.get("block")
    if name not in BLOCKS:
        raise ValueError(f"block: expected one of {sorted(BLOCKS)}, got {name!r}; import the module with its `@block`")
    return _from_plain(BLOCKS[name], {key: entry for key, entry in value.items() if key != "block"}, f"block {name!r}")


def _plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, tuples as lists."""
    entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: list(entry) if isinstance(entry, tuple) else entry for name, entry in entries.items()}


def _from_plain(cls: Any, value: Mapping[str, Any], name: str) -> Any:
    """The dataclass of these fields, lists as tuples; ValueError for fields that it lacks."""
    known = {field.name for field in dataclasses.fields(cls)}
    expect(value.keys() <= known, name, f"fields among {sorted(known)}", sorted(value.keys() - known))
    return cls(**{key: tuple(entry) if isinstance(entry, list) else entry for key, entry in value.items()})
