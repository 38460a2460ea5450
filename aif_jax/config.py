"""Static configuration of a model: sizes of the towers, a list of blocks, and a head; frozen, hashable, checked once."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Self

from aif_jax.checks import ArgumentError, Fields, expect, expect_types
from aif_jax.heads import Mlp, head_of
from aif_jax.registry import BLOCKS, HEADS, from_plain, plain
from aif_jax.schema import Schema
from aif_jax.scores import GROUP, chains


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Fields):
    """Sizes, blocks and head of a model, see `build`.

    Attributes:
      schema: the features.
      width: D, the width of vectors, embeddings and attention.
      short_length: S, the recent behaviours that the user tower sees.
      long_length: L, the behaviours that blocks on the long history see.
      towers: hidden widths of the user and the item MLP.
      head: from the features of towers and blocks to logits, see `aif_jax.heads`: an `Mlp`, a `LogitSum`, or one of yours.
      sequence: self-attention and profile-to-sequence cross-attention in the user tower; False pools by the mean.
      item_content: the content embedding enters the item tower, where the schema has one.
      blocks: approximations, see `aif_jax.blocks`; their order is that of the head's features.
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
    head: Any = Mlp((64, 32))
    sequence: bool = True
    item_content: bool = True
    blocks: tuple[Any, ...] = ()
    objectives: tuple[str, ...] = ()
    assembled: tuple[str, ...] = ()

    def __post_init__(self):
        expect(isinstance(self.blocks, tuple), "Config.blocks", "a tuple, such as (Bea(),)", self.blocks, error=ArgumentError)
        expect_types(self)
        for field in ("width", "short_length", "long_length"):
            expect(getattr(self, field) >= 1, f"Config.{field}", "at least 1", getattr(self, field))
        expect(min(self.towers, default=1) >= 1, "Config.towers", "widths of at least 1", self.towers)
        chains(self.objectives)
        for part in self.blocks:
            BLOCKS.check(part, "Config.blocks")
            fits, got = isinstance(part.tables, tuple) and isinstance(part.per_item, tuple | None), (part.tables, part.per_item)
            fits = fits and all(type(table).__hash__ for table in part.tables)
            expected = "attributes or properties `tables`, of frozen dataclasses, and `per_item`, tuples"
            expect(fits, type(part).__name__, expected, repr(got))
        HEADS.check(self.head, "Config.head")
        names, taken = [part.name for part in (*self.blocks, *self.tables)], ("tower", "fields", GROUP)
        expected = f"blocks and tables of different names, strings without '/', none of {', '.join(taken)}"
        fits = all(isinstance(name, str) and "/" not in name for name in names)
        way_out = 'a second block of a class needs a subclass with a field `name: str = "b"`; make tables frozen dataclasses'
        expect(fits and len({*names, *taken}) == len(names) + len(taken), "Config.blocks", expected, f"{names}; {way_out}")
        for part in (*self.blocks, *self.tables):
            part.check(self)
        blocks = {block.name: block.widths(self) for block in self.blocks}
        for name, widths in blocks.items():
            fits = isinstance(widths, dict) and all(isinstance(width, int) and width >= 0 for width in widths.values())
            fits = fits and all(isinstance(of, str) and "/" not in of for of in widths)
            expect(fits, f"{name}.widths", "a dict of integers of at least 0 by strings without '/'", repr(widths))
        head_of(self.head).check(blocks, self.outputs)

    @property
    def history_length(self) -> int:
        """Places of the history that the model reads."""
        return max(self.short_length, self.long_length)

    @property
    def outputs(self) -> int:
        """T, the logits of a candidate; with one they have no axis for it."""
        return max(1, len(self.objectives))

    @property
    def head_features(self) -> dict[str, dict[str, int]]:
        """Widths of the head's features, by block and name, in order; "tower": user vector, item vector, their product."""
        towers = {"tower": {name: self.width for name in ("user", "item", "product")}}
        return towers | {block.name: block.widths(self) for block in self.blocks}

    @property
    def tables(self) -> tuple[Any, ...]:
        """The fitted tables of all blocks, each once."""
        return tuple(dict.fromkeys(table for part in self.blocks for table in part.tables))

    @property
    def reads_content(self) -> bool:
        """Whether the item tower reads content; training leaves it out of the batches otherwise, for blocks too."""
        return self.item_content and self.schema.content > 0

    @property
    def reads_display_positions(self) -> bool:
        """Whether training reads where candidates were shown."""
        return any(block.training_logit for block in self.blocks)

    def find(self, name: str) -> Any:
        """Return the block of that name, or None."""
        return next((block for block in self.blocks if block.name == name), None)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def with_encoding(self, encoding: str) -> Self:
        """Return the same config for data of the encoder of that version, see `Schema.encoding`."""
        return self.replace(schema=dataclasses.replace(self.schema, encoding=encoding))

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values; `Config.from_json` reads it back."""
        parts = {"blocks": [BLOCKS.to_json(part) for part in self.blocks], "head": HEADS.to_json(self.head)}
        return plain(self, if_set=("objectives", "assembled")) | {"schema": self.schema.to_json()} | parts

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the config that `to_json` wrote; ValueError for unknown fields, unregistered parts, or no such record."""
        importlib.import_module("aif_jax.blocks")  # registers the package's own, which import this module
        try:
            parts: dict[str, Any] = {"blocks": [BLOCKS.from_json(entry) for entry in value.get("blocks", ())]}
            parts |= {"head": HEADS.from_json(value["head"])} if "head" in value else {}
            return from_plain(cls, {**value, "schema": Schema.from_json(value["schema"])} | parts, "config")
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"config: expected a record that `to_json` made, got another: {error!r}") from error
