"""The block protocol: a frozen dataclass with its parameters, user half, item half and features of the head."""

import dataclasses
import re
from functools import cached_property
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import checks, layers
from aif_jax.config import Config
from aif_jax.features import empty_items
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.registry import BLOCKS, Class
from aif_jax.trees import describe, leaves_by_path, nest, take
from aif_jax.types import Behaviours, ItemFeatures, ItemRow, Params, UserFeatures, UserState


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserView:
    """Features of ONE user and arrays derived from them, as blocks read them.

    Attributes:
      config, params: config and parameters of the whole model.
      features: the user's features.
      candidates: candidates to score, None in serving: a block with a cheaper equal form for few candidates may use it.
    """

    config: Config
    params: Params
    features: UserFeatures
    candidates: int | None = None

    @cached_property
    def short(self) -> Behaviours:
        """The first `short_length` places of the history."""
        return take(self.features.history, slice(self.config.short_length))

    @cached_property
    def long(self) -> Behaviours:
        """The first `long_length` places of the history."""
        return take(self.features.history, slice(self.config.long_length))

    @cached_property
    def sequence(self) -> jax.Array:
        """Z' float32 [S, D]: the short history projected, with its positions, by weights of the package's user component."""
        tower, length = self.params["user"], self.config.short_length
        embedded = self.embeddings[:length]  # other blocks embed the history too; embedded once it costs less
        if self.config.sequence:
            embedded = embedded + tower["position"][: embedded.shape[0]]
        return layers.dense(tower["sequence"], embedded)

    @cached_property
    def embeddings(self) -> jax.Array:
        """Embeddings of the longer of the two histories, float32 [n, D]; zeros for padding."""
        history = take(self.features.history, slice(self.config.history_length))
        return layers.embed_behaviours(self.params, self.config.schema, history, joined=self.candidates is not None)

    @cached_property
    def embedded(self) -> jax.Array:
        """Embeddings of the long history, float32 [L, D]; zeros for padding."""
        return self.embeddings[: self.config.long_length]

    def values(self, table: Any, history: Behaviours) -> jax.Array:
        """Return a fitted table's value for each place of a history, [S, ...]."""
        return layers.lookup(self.params["fitted"][table.name]["table"], jnp.asarray(history.item))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemView:
    """Features and vector of ONE item, as blocks read them.

    Attributes:
      config, params: config and parameters of the whole model.
      features: the item's features; no content in training unless the item tower reads it (`Config.item_content`).
      vector: float32 [D], the item vector.
    """

    config: Config
    params: Params
    features: ItemFeatures
    vector: jax.Array


class Block:
    """One way in which user and item interact. Subclass it, decorate with `block`, and override what you need.

    A block that overrides nothing does nothing. The order of calls:

        once       check(config)                       errors of a wrong config
        init       fit(items [N], config, *, seed)     arrays fitted on the catalogue -> params["fitted"][name]
                   init(key, config)                   trained parameters, floats; traced: JAX functions alone
        nearline   item(params, item) of ONE item      -> rows.blocks[name]
        per user   user(params, user) of ONE user      -> state.blocks[name], while retrieval runs
        real time  score(params, state, rows, kernels) -> HeadInputs: one user, C candidates
        training   training_logit(params, display_positions)      -> added to the logits; optional

    `params` is the block's own dict of what `init` and `fit` returned; `user.params` and `item.params` are the whole model's.
    `widths` names the pair features that a block gives; `kernels[name]` [width, H] is the head's kernel for each. Return
    feature @ kernel as terms of `HeadInputs`. Heads without `first_layer`, such as Flax modules, pass identity slices: the same
    code then returns features. States and rows are pytrees of real arrays, keys without "/"; from index and engine their
    bfloat16 comes as float32. An index of bfloat16 or int8 rounds float32 arrays of a row whose last axis has 8 numbers or
    more, int8 by one scale: keep ids as integers, numbers of unlike size apart. Histories may have fewer places than the
    config says (buckets), in exports a symbol: depend on no number. Divide by `mask.sum()`; cut by `p[: mask.shape[0]]`.

    A model's version does not cover code: each time you change what a block or head computes, raise its `revision`. Then
    whatever opens a model refuses those from before, `aif-jax serve` too when it starts; `export.load` runs what they hold.
    In a notebook run its cell again too where a function that it calls has changed: `build` gives the model compiled before.

    Attributes:
      revision: number of the code, `revision = 1` in the class, without a type.
      training_logit: method for what training alone adds to the logits, [B, C], with several objectives [B, C, T], by
        `display_positions` int32 [B, C]; `fit` refuses data without `Columns.position`, a `Batch` without them leaves it out.
      per_item: paths of `fit` arrays with a row for each item, () if none has; `carry_over` moves their rows, a refresh fits
        again. Unset, `carry_over` refuses a fitted array with as many rows as a changed vocabulary. It moves no array with a
        row for each category and refuses a trained one with a row for each id: fit the value of each item, or read embeddings.

    `user` and `item` read embeddings of the features' ids by `layers.lookup(user.params["embedding"][attribute], ids)` only,
    rows of fitted arrays, which may be NumPy's, likewise; `layers.behaviour_fields` gives the categories of a history's items.
    A block that reads embeddings of other ids trains with `sparse=()`, see `train.make_step`: else these are NaN.

    Example:
      >>> import jax, jax.numpy as jnp, aif_jax as aif
      >>> from aif_jax.blocks import Block, HeadInputs, block
      >>> @block
      ... class LastSeen(Block):
      ...     width: int = 4
      ...     def widths(self, config): return {"curve": self.width}
      ...     def init(self, key, config): return {"rates": jnp.linspace(0.1, 2.0, self.width)}
      ...     def user(self, params, user):  # [width], the same for all candidates
      ...         days = jnp.log1p(jnp.asarray(user.long.age)[0] / 86400)
      ...         return jnp.exp(-params["rates"] * days) * jnp.asarray(user.long.mask)[0]
      ...     def score(self, params, state, rows, kernels):
      ...         return HeadInputs(once=state.blocks[self.name] @ kernels["curve"])
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> aif.build(aif.Config(schema=schema, blocks=(LastSeen(),))).config.blocks[0].name
      'last_seen'
    """

    revision: ClassVar[int] = 0
    per_item: ClassVar[tuple[str, ...] | None] = None
    training_logit: Any = None

    @property
    def name(self) -> str:
        """Its place in parameters, state, row and head: the class name in snake case unless overridden."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def tables(self) -> tuple[Any, ...]:
        """Fitted objects that blocks share, `Signatures` or yours, in `params["fitted"]` by their names.

        Each is a frozen dataclass, so that two blocks' are equal, and has `name`, `check(config)`,
        `fit(items, config, *, seed)` with an array "table" [N, ...], and `item(params, features)`, of what `fit` returned and
        the `ItemFeatures` of ONE item, the value in `rows.fitted[name]`; see `UserView.values` for those of a history.
        """
        return ()

    def least_history(self, config: Config) -> int:
        """Return the fewest places in exports, padding counted: K if a state holds the first K (`x[:K]`), or code needs K."""
        return 1

    def check(self, config: Config) -> None:
        """Raise ValueError where the config lacks what the block needs."""

    def widths(self, config: Config) -> dict[str, int]:
        """Return widths of the features by name, each with a kernel in `score`. None may depend on a vocabulary's size."""
        return {}

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        """Return finite parameters that are fitted once, on the host, on items [N], row 0 the unknown one; never trained.

        Item statistics belong to a moment, which a fit has not: they are 0 here.
        """
        return {}

    def init(self, key: jax.Array, config: Config) -> Params:
        """Return trained parameters of both sides. Weight decay draws them to 0: write a scale as its start times exp(p)."""
        return {}

    def user(self, params: Params, user: UserView) -> Any:
        """Return the user half of ONE user, off the critical path."""
        return {}

    def item(self, params: Params, item: ItemView) -> Any:
        """Return the item half of ONE item, nearline."""
        return {}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        """Return, in real time, features times kernels and terms of the logit. A candidate's may depend on its own row only."""
        return HeadInputs()


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def block(cls: Class) -> Class:
    """Make a subclass of `Block` a frozen dataclass and register it under its class name; ValueError if another class has it.

    Fields are numbers, booleans, strings and flat tuples of these. Other types are ValueErrors, but within a `tuple[X, Y]`.
    """
    return BLOCKS.add(cls, Block)


def own(params: Params, part: Any) -> Params:
    """Return the parameters of one block or fitted table: trained and fitted ones in one dict."""
    return params.get("blocks", {}).get(part.name, {}) | params["fitted"].get(part.name, {})


def expect_arrays(made: dict[str, Any], function: str) -> dict[str, Any]:
    """Return what a function of each part gave, by name of the part; TypeError unless each is a pytree of arrays.

    Parameters, of `init` and `fit`, are nested dicts as files return them, of at most 32 bits: JAX narrows wider ones silently.
    """
    floats = ["float32", "bfloat16"]  # of float16, optimizers make NaN
    fitted = [*floats, "float16", "float8_e4m3fn", "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32"]
    kept = {"init": floats, "fit": fitted}.get(function)
    expected = f"nested dicts of {', '.join(kept)}, none empty" if kept else "a pytree of arrays (jnp.asarray of a number)"
    for name, value in made.items():
        nested = "/" not in "".join(leaves_by_path(value, separator=" "))
        nested = nested and (not kept or jax.tree.structure(nest(leaves_by_path(value))) == jax.tree.structure(value))
        arrays = [hasattr(leaf, "dtype") and (not kept or str(leaf.dtype) in kept) for leaf in jax.tree.leaves(value)]
        got = jax.tree.map(lambda leaf: describe(leaf) if hasattr(leaf, "dtype") else leaf, value)
        checks.expect(nested and all(arrays), f"{name}.{function}", f'{expected}, keys text without "/"', got, error=TypeError)
    return made


def with_table(params: Params, table: Any, block: Block, *, config: Config) -> tuple[Params, Config]:
    """Return parameters and config of the same model with this table as a block's, for an edit of yours, see `Run.edit`.

    For a table that training reads too, such as statistics of the log before the validation slice: `start, _ =
    with_table(model.init(key, catalogue), table, block, config=config)`, then `fit(model, data, start=start)`. One with the
    sample's own event is trusted too much, see `PureSvd`. A refresh trains with what `Block.fit` makes instead.

    Args:
      table: float32 of the shape that "table" of the block has in `params`, or of a new block in what `fit` returns of zeros.
      block: added, unless the model has one of its name; one with trained parameters must have been there in training.
      config: config of `params`.

    Raises:
      TypeError, ValueError: another table than finite float32 of that shape; a block without a table, or a new one with more.

    Example:
      >>> import aif_jax as aif
      >>> item, category = aif.Attribute(name="item", size=4), aif.Attribute(name="category", size=6)
      >>> config, offset = aif.presets.two_tower(aif.Schema(item_attributes=(item, category))), aif.blocks.ItemOffset()
      >>> params, config = with_table({"fitted": {}}, np.zeros(4, np.float32), offset, config=config)
      >>> config.blocks
      (DotProduct(), ItemOffset())
    """
    there: Any = config.find(block.name)
    config = config if there else config.replace(blocks=(*config.blocks, block))
    others = params["fitted"].get(block.name, {})
    made = others or (there or block).fit(empty_items(config.schema, config.schema.table_sizes["item"]), config, seed=0)
    fits = "table" in made and (others or len(made) == 1)
    checks.expect(fits, f"{type(block).__name__}.fit", 'an array "table", alone where params lack it', sorted(made))
    checks.expect_finite(checks.expect_array(table, "table", dtype=np.float32, shape=made["table"].shape), "table")
    return params | {"fitted": params["fitted"] | {block.name: others | {"table": jnp.asarray(table)}}}, config


def expect(ok: bool, block: Block, field: str, expected: str, got: object) -> None:
    """Raise ValueError that names a block's field."""
    checks.expect(ok, f"{type(block).__name__}.{field}", expected, repr(got))
