"""The catalogue: features of every item by row of the item vocabulary; row 0, the unknown item, is all zeros."""

import dataclasses
from typing import Any, Self

import jax
import numpy as np

from aif_jax.checks import expect, expect_integers
from aif_jax.features import check_item_features
from aif_jax.schema import Schema
from aif_jax.trees import take
from aif_jax.types import ItemFeatures


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """Features of N rows; the arrays may be memory-mapped.

    Attributes:
      schema: which features there are, and of which encoder.
      raw: int64 or str [N - 1] raw item ids; row r is `raw[r - 1]`.
      items: `ItemFeatures` [N] of NumPy arrays, content where the schema has it; without an encoding, which is the schema's.

    Raises:
      TypeError: wrong dtype.
      ValueError: names the field, expected and got: wrong shape, id out of range, NaN or infinity, a row 0 that is not zero.

    Example:
      >>> from aif_jax.schema import Attribute
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=4), Attribute(name="category", size=3)))
      >>> catalogue = Catalogue.from_items(schema, [10, 20, 30], ids={"category": [1, 2, 1]})
      >>> catalogue.features([3, 0]).ids["category"].tolist()
      [1, 0]
    """

    schema: Schema
    raw: np.ndarray
    items: ItemFeatures

    def __post_init__(self):
        flat = self.raw.ndim == 1 and self.raw.dtype.kind in "iuUT"
        expect(flat, "Catalogue.raw", "integers or strings [N - 1]", f"{self.raw.dtype} {list(self.raw.shape)}")
        check_item_features(self.schema, self.items, batched=True, name="Catalogue")
        object.__setattr__(self, "items", dataclasses.replace(self.items, encoding=""))
        rows = len(self.items.floats)
        expect(rows == len(self), "Catalogue.floats", f"{len(self)} rows (raw ids and the unknown item)", rows)
        for path, table in jax.tree_util.tree_leaves_with_path(self.items):
            name = f"Catalogue{jax.tree_util.keystr(path)}"
            expect(not np.any(table[0]), name, "zeros in row 0 (the unknown item)", table[0])

    @classmethod
    def from_items(
        cls, schema: Schema, raw: Any, *, ids: dict[str, Any], floats: Any = None, content: Any = None, side: Any = None
    ) -> Self:
        """Return the catalogue of N - 1 known items: adds row 0, and "item" (the row's own number) where `ids` lacks it.

        Args:
          schema: which features there are.
          raw: [N - 1] raw item ids in the order of the vocabulary.
          ids: attribute name to integers [N - 1], or [N - 1, n].
          floats: [N - 1, F]; may be left out where the schema has none.
          content: [N - 1, E], or None.
          side: name to floats [N - 1].
        """
        raw = np.asarray(raw)
        count = len(raw)
        tables: dict[str, Any] = {name: _with_unknown(table, f"ids[{name!r}]", count, np.int32) for name, table in ids.items()}
        tables.setdefault("item", np.arange(count + 1, dtype=np.int32))
        floats = np.zeros((count, 0), np.float32) if floats is None else floats
        items = ItemFeatures(
            ids=tables,
            floats=_with_unknown(floats, "floats", count, np.float32),
            content=None if content is None else _with_unknown(content, "content", count, np.float32),
            side={name: _with_unknown(table, f"side[{name!r}]", count, np.float32) for name, table in (side or {}).items()},
        )
        return cls(schema=schema, raw=raw, items=items)

    def __len__(self) -> int:
        """Return N, rows, the unknown row 0 included."""
        return len(self.raw) + 1

    def features(self, rows: Any, *, content: bool = True) -> ItemFeatures:
        """Return the features of some rows, NumPy arrays whose leading axes are those of `rows`.

        Args:
          rows: integer rows of any shape, in [0, N).
          content: False leaves the content out, for training a model whose tower does not read it.
        """
        rows = expect_integers(rows, "rows", size=len(self))
        return take(self.items if content else dataclasses.replace(self.items, content=None), rows)

    def with_statistics(self, statistics: np.ndarray) -> Self:
        """Return the catalogue with other item statistics float32 [N, ...], the last of its floats; see `ItemStatistics`."""
        floats = np.concatenate([np.asarray(self.items.floats)[:, : -statistics.shape[1]], statistics], 1)
        return dataclasses.replace(self, items=dataclasses.replace(self.items, floats=floats))


def _with_unknown(table: Any, name: str, count: int, dtype: Any) -> np.ndarray:
    """Return the table [N - 1, ...] with a row of zeros before it, as `dtype`; integers must not lose their value."""
    table = np.asarray(table)
    expect(table.shape[:1] == (count,), f"Catalogue.{name}", f"{count} rows like raw", f"shape {list(table.shape)}")
    if dtype == np.int32 and table.size:
        expect_integers(table, f"Catalogue.{name}", size=2**31)
    return np.concatenate([np.zeros((1, *table.shape[1:]), dtype), table.astype(dtype, copy=False)])
