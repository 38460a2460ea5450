"""Static configuration of a model: frozen, hashable, checked once.

A config is sizes of the towers, the head, and a list of blocks; the paper's additive table (base, + SIM, + BEA, + long history)
is a list of block lists. Blocks are values of `aif_jax.blocks`, or yours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from aif_jax.schema import Schema

BlockType = TypeVar("BlockType", bound=type)
BLOCKS: dict[str, type] = {}
"""Every block class by name, for reading a config from JSON."""


class BlockSpec(Protocol):
    """What a config reads of a block; `aif_jax.blocks.block.Block` has the rest."""

    @property
    def name(self) -> str:
        """Its place in parameters, state, row and head."""
        ...

    @property
    def tables(self) -> tuple[Any, ...]:
        """Fitted tables that it reads."""
        ...

    @property
    def least_history(self) -> int:
        """The least number of places of a history that it takes in an export."""
        ...

    def check(self, config: Config) -> None:
        """Raises ValueError where the config lacks what the block needs."""
        ...

    def widths(self, config: Config) -> dict[str, int]:
        """The inputs that it adds to the head, by name."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What `build` needs to know.

    Attributes:
      schema: the features.
      width: D, the width of vectors, embeddings and attention.
      short_length: S, the recent behaviours that the user tower sees.
      long_length: L, the behaviours that blocks on the long history see.
      towers: hidden widths of the user and the item MLP; None for a model without towers.
      head: hidden widths of the head MLP; () for none: the logit is the sum of the blocks' logits and a bias.
      sequence: self-attention and profile-to-sequence cross-attention in the user tower; False pools by the mean.
      item_content: the content embedding enters the item tower, where the schema has one.
      blocks: approximations, see `aif_jax.blocks`; their order is that of the head's inputs.

    Raises:
      ValueError: names the field, what was expected and what came.
      TypeError: a block that is none.

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
    towers: tuple[int, ...] | None = (64,)
    head: tuple[int, ...] = (64, 32)
    sequence: bool = True
    item_content: bool = True
    blocks: tuple[BlockSpec, ...] = ()

    def __post_init__(self):
        for field in ("width", "short_length", "long_length"):
            _expect(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        for field in ("towers", "head"):
            widths = getattr(self, field)
            fits = widths is None or isinstance(widths, tuple) and all(isinstance(w, int) and w >= 1 for w in widths)
            _expect(fits and not (field == "head" and widths is None), field, "a tuple of widths of at least 1", widths)
        for part in self.blocks:
            if type(part) not in BLOCKS.values():
                raise TypeError(f"Config.blocks: expected values of classes made by the decorator `block`, got {part!r}")
        names = [part.name for part in self.blocks]
        _expect(len(set(names)) == len(names), "blocks", "blocks of different names", names)
        for part in self.blocks:
            part.check(self)
            for table in part.tables:
                table.check(self)
            if not self.head and part.widths(self):
                raise ValueError(f"Config.head: expected hidden widths for the inputs of {part!r}, got (): give head=(64, 32)")
        if not self.blocks and (self.towers is None or not self.head):
            lacks = "towers" if self.towers is None else "a head"
            raise ValueError(f"Config.blocks: expected at least one block in a model without {lacks}, got none")

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
    def tables(self) -> tuple[Any, ...]:
        """The fitted tables of all blocks, each once."""
        return tuple(dict.fromkeys(table for part in self.blocks for table in part.tables))

    @property
    def reads_content(self) -> bool:
        """Whether an item's own content enters the model, beyond what is fitted on it; training leaves it out otherwise."""
        return self.item_content and self.schema.content > 0

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `Config.from_json` reads it back."""
        value: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        value |= {name: None if value[name] is None else list(value[name]) for name in ("towers", "head")}
        return value | {"schema": self.schema.to_json(), "blocks": [block_to_json(part) for part in self.blocks]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Config:
        """The config that `to_json` wrote.

        Raises:
          ValueError: fields that this version does not have; a block that is not registered: import its module first.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if value.keys() - known:
            raise ValueError(f"config: expected fields among {sorted(known)}, got {sorted(value.keys() - known)}")
        widths = {name: None if value[name] is None else tuple(value[name]) for name in ("towers", "head") if name in value}
        blocks = tuple(block_from_json(part) for part in value.get("blocks", ()))
        return cls(**{**value, **widths, "schema": Schema.from_json(value["schema"]), "blocks": blocks})


def register(cls: BlockType) -> BlockType:
    """Registers a block class under its name, so that a config can be read back from JSON.

    Raises:
      ValueError: another class has that name.
    """
    known = BLOCKS.setdefault(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"block {cls.__name__!r}: expected a new name, got one that {known.__module__} has registered")
    BLOCKS[cls.__name__] = cls
    return cls


def block_to_json(value: Any) -> dict[str, Any]:
    """A block as a dict of plain JSON values."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {"block": type(value).__name__} | {
        name: list(entry) if isinstance(entry, tuple) else entry for name, entry in fields.items()
    }


def block_from_json(value: Mapping[str, Any]) -> Any:
    """The block that `block_to_json` wrote.

    Raises:
      ValueError: a class that is not registered, or fields that it does not have.
    """
    fields = {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in value.items() if key != "block"}
    name = value.get("block")
    if name not in BLOCKS:
        raise ValueError(
            f"block {name!r}: expected one of {sorted(BLOCKS)}; import the module that defines it (with the decorator `block`)"
        )
    known = {field.name for field in dataclasses.fields(BLOCKS[name])}
    if fields.keys() - known:
        raise ValueError(f"block {name!r}: expected fields among {sorted(known)}, got {sorted(fields.keys() - known)}")
    return BLOCKS[name](**fields)


def _expect(ok: bool, field: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"Config.{field}: expected {expected}, got {got!r}")
