"""Heads: from the features of (user, candidate) pairs to logits. A head is one value in the config, like a block.

Blocks give features [C, w] times kernels [w, H] of the head's `first_layer`, if it has one: then terms all candidates share
are computed once, and where the feature of a candidate is a product r U, of its row r and a matrix U of the user, U K is
computed once a request: (r U) K = r (U K). A head without one gets the features, next to each other.
"""

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.checks import expect
from aif_jax.registry import HEADS, Class
from aif_jax.types import Params

__all__ = ["Mlp", "LogitSum", "Head", "head", "FirstLayer"]

Widths = Mapping[str, Mapping[str, int]]
"""Widths of features, by block and name, in order."""
BlockKernels = Mapping[str, jax.Array]
"""Kernels [w, H] of the features of one block, by name."""


class HeadInputs(NamedTuple):
    """A block's contribution: its features times the head's kernels, as a sum of terms [C, H], and terms of the logit.

    Attributes:
      once: [H], the same for every candidate.
      item: [D, H], a kernel of the item vector: item vector @ kernel is added; the head multiplies once for all blocks.
      pairs: products of (left [C, w], right [w, H]), which the head joins into one.
      rest: [C, H], everything else.
      logit: [C], added to the logit past the head; with several objectives to each, by a trained weight.
      offset: [C], added unweighted to the logit of the first objective: terms fitted after training.
    """

    once: Any = 0.0
    item: Any = 0.0
    pairs: tuple[tuple[jax.Array, jax.Array], ...] = ()
    rest: Any = 0.0
    logit: Any = 0.0
    offset: Any = 0.0


class FirstLayer(NamedTuple):
    """The first layer of a head, features @ kernels + bias.

    Attributes:
      kernels: [w, H] for each feature, by block and name.
      bias: [H], or 0.0 for none.
    """

    kernels: Mapping[str, BlockKernels]
    bias: Any = 0.0


class Head:
    """From the features of C (user, candidate) pairs to logits. Subclass it, decorate with `head`, and override what you need.

    The order of calls:

        once       check(blocks, outputs)                errors of a wrong config
        init       init(key, widths, outputs)            trained parameters
        real time  first_layer(params)                   None for a head that reads the features themselves
                   apply(params, features) -> logits [C, T]

    `widths[block][name]` is the width of each feature, in order, first "tower": user, item, product; `blocks` of `check` has no
    "tower". A block without features has {}: leave it out of the parameters. `features` are [C, w], w the sum of widths, or
    what the first layer gives, [C, H]. Blocks add terms past the head. Raise `revision` with the code, see `Block`.

    A Flax linen module of parameters alone (no dropout, no batch statistics) is a head too: decorate it, and its
    `__call__(features [w])` gives the logits [T] of ONE pair; for T > 1 by a field of yours that says T.

    Example:
      >>> import jax, aif_jax as aif
      >>> from aif_jax.heads import Head, head
      >>> @head
      ... class OneLayer(Head):
      ...     scale: float = 0.1
      ...     def init(self, key, widths, outputs):
      ...         size = sum(sum(each.values()) for each in widths.values())
      ...         return {"kernel": self.scale * jax.random.normal(key, (size, outputs))}
      ...     def apply(self, params, features):
      ...         return features @ params["kernel"]
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> aif.presets.aif(schema, head=OneLayer(scale=0.2)).to_json()["head"]
      {'head': 'OneLayer', 'scale': 0.2}
    """

    revision: ClassVar[int] = 0

    def check(self, blocks: Widths, outputs: int) -> None:
        """Raise ValueError if the head cannot take the features of the config's blocks, or give T = `outputs` logits."""

    def init(self, key: jax.Array, widths: Widths, outputs: int) -> Params:
        """Return trained parameters, a dict; traced. No key may be "direct", which the weights of the blocks' logits have."""
        return {}

    def first_layer(self, params: Params) -> FirstLayer | None:
        """Return a linear first layer: `kernels[block][name]` for each feature; without "tower" the towers' are left out."""
        return None

    def apply(self, params: Params, features: jax.Array) -> jax.Array:
        """Return logits [C, T] of features, see above, a candidate's from its features alone, since serving pads candidates."""
        raise TypeError(f"{type(self).__name__}.apply: expected a head that overrides it, got one that does not")


@dataclass_transform(frozen_default=True)
def head(cls: Class) -> Class:
    """Make a subclass of `Head` a frozen dataclass, and register it, or a Flax module, under its class name.

    Fields are numbers, booleans, strings and flat tuples of these. ValueError if another class has that name.
    """
    return HEADS.add(cls, Head, layers.Module)


@head
class Mlp(Head):
    """An MLP, whose first layer is split by feature.

    Attributes:
      widths: hidden widths, at least one.
    """

    widths: tuple[int, ...] = (64, 32)

    def __post_init__(self):
        expect(self.widths and min(self.widths) >= 1, "Mlp.widths", "at least one width, each at least 1", self.widths)

    def init(self, key: jax.Array, widths: Widths, outputs: int) -> Params:
        """Return `first`: a kernel [w, H] for each feature and a bias [H], scaled by the fan-in; `rest`: layers above it."""
        first, rest = jax.random.split(key)
        sizes = {block: sum(each.values()) for block, each in widths.items()}
        whole = layers.dense_init(first, sum(sizes.values()), self.widths[0])
        blocks = _split(whole["kernel"], sizes)
        kernels = {block: _split(blocks[block], each) for block, each in widths.items() if each}
        above = layers.init_module(layers.MLP((*self.widths[1:], outputs)), rest, self.widths[0])
        return {"first": {"kernels": kernels, "bias": whole["bias"]}, "rest": above}

    def first_layer(self, params: Params) -> FirstLayer:
        return FirstLayer(**params["first"])

    def apply(self, params: Params, features: jax.Array) -> jax.Array:
        return layers.mlp(params["rest"], jax.nn.relu(features))


@head
class LogitSum(Head):
    """No layers: the logit is the sum of what blocks add to it and a bias. With `DotProduct()` this is a two-tower model."""

    def check(self, blocks: Widths, outputs: int) -> None:
        expect(blocks, "Config.blocks", "at least one block for the head LogitSum()", "none; add blocks= or head=Mlp((64, 32))")
        unread, way_out = [name for name, widths in blocks.items() if widths], "LogitSum(): give head=Mlp((64, 32))"
        expect(not unread, "Config.head", f"a head that reads the features of {', '.join(unread)}", way_out)
        expect(outputs == 1, "Config.head", "a head with layers for several objectives", way_out)

    def init(self, key: jax.Array, widths: Widths, outputs: int) -> Params:
        return {"bias": jnp.zeros((), jnp.float32)}

    def first_layer(self, params: Params) -> FirstLayer:
        return FirstLayer({})

    def apply(self, params: Params, features: jax.Array) -> jax.Array:
        return jnp.broadcast_to(params["bias"], (features.shape[0], 1))


class FlaxHead(Head):
    """A Flax module as a head."""

    def __init__(self, module: layers.Module):
        self.module = module

    def init(self, key: jax.Array, widths: Widths, outputs: int) -> Params:
        return layers.init_module(self.module, key, sum(width for each in widths.values() for width in each.values()))

    def apply(self, params: Params, features: jax.Array) -> jax.Array:
        return jax.vmap(lambda pair: layers.apply_module(self.module, params, pair))(features)  # alone: serving pads candidates


def head_of(value: Any) -> Head:
    """Return the head of a config: `Config.head`, or its Flax module as one."""
    return FlaxHead(value) if isinstance(value, layers.Module) else value


def identity(widths: Mapping[str, int]) -> dict[str, jax.Array]:
    """Return kernels of one block under which it gives its features, next to each other."""
    return _split(jnp.eye(sum(widths.values())), widths)


def _split(rows: jax.Array, sizes: Mapping[str, int]) -> dict[str, jax.Array]:
    """Return parts of rows [n, H] by name, of sizes that add up to n, so that nothing is left behind the last cut."""
    return dict(zip(sizes, jnp.split(rows, list(itertools.accumulate(sizes.values()))), strict=False))


class NotedKernels(collections.UserDict[str, jax.Array]):
    """Kernels of one block that note which are read: one that `score` forgets would be trained by weight decay alone."""

    def __init__(self, kernels: BlockKernels):
        self.unread = set(kernels)
        super().__init__(kernels)

    def __getitem__(self, name: str) -> jax.Array:
        self.unread.discard(name)
        return self.data[name]


jax.tree_util.register_pytree_node(  # for a `score` that gives them to `jax.jit` or `jax.tree.map`
    NotedKernels, lambda k: (k.values(), tuple(k)), lambda names, each: NotedKernels(dict(zip(names, each, strict=True)))
)


def expect_terms(terms: Any, kernels: NotedKernels, item: jax.Array, name: str) -> None:
    """Raise TypeError or ValueError unless a block gives what `HeadInputs` says: sums would broadcast other shapes."""
    unread = sorted(kernels.unread)
    expect(isinstance(terms, HeadInputs), name, "HeadInputs", type(terms).__name__, error=TypeError)
    fits = isinstance(terms.pairs, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in terms.pairs)
    expect(fits, f"{name}, pairs", "a tuple of pairs, ((left, right),) for one", jax.tree.map(jnp.shape, terms.pairs))
    named = f" for kernels of {list(kernels) or 'no feature; declare it in `widths`'}"
    (count, width), hidden = item.shape, next((kernel.shape[1] for kernel in kernels.values()), 0)
    pairs: Any = tuple(((count, *w), (*w, hidden)) for w in (jnp.shape(pair[-1])[:1] for pair in terms.pairs))
    shapes = HeadInputs((hidden,), (width, hidden), pairs, (count, hidden), (count,), (count,))
    for field, part, shape, of in zip(HeadInputs._fields, terms, shapes, [named] * 4 + [""] * 2, strict=True):
        got = jax.tree.map(jnp.shape, part)
        fits = jax.tree.leaves(got) == jax.tree.leaves(shape) or isinstance(part, float) and part == 0
        expect(fits, f"{name}, {field}", f"shape {shape}{of}", got)
    features = terms.pairs or not all(isinstance(part, float) for part in (terms.once, terms.item, terms.rest))
    wanted, got = f"features times the kernels of {list(kernels)}", f"none of {unread}; give it, or leave it out of `widths`"
    expect(features or not kernels, name, wanted, "none; give pairs or arrays")
    expect(not unread, name, wanted, got)


def joined(inputs: Sequence[HeadInputs], item: jax.Array) -> jax.Array:
    """Return features times kernels [C, H], summed over blocks, from the item vectors [C, D]; [C, 0] without features.

    With many candidates narrow inputs are concatenated: one product is faster than several and a sum over [C, H]. With few,
    kernels stay separate: those that all users share need not be copied for each user.
    """
    kernels = [of.item for of in inputs if not isinstance(of.item, float)]
    pairs = [(item, sum(kernels[1:], kernels[0]))] if kernels else []
    pairs += [pair for of in inputs for pair in of.pairs]
    terms = [jnp.expand_dims(of.once, 0) for of in inputs if not isinstance(of.once, float)]
    if pairs and item.shape[0] > item.shape[1]:
        left, right = zip(*pairs, strict=True)
        pairs = [(jnp.concatenate(left, -1), jnp.concatenate(right, 0))]
    terms += [left @ right for left, right in pairs]
    terms += [of.rest for of in inputs if not isinstance(of.rest, float)]
    whole = sum(terms[1:], terms[0]) if terms else jnp.zeros((1, 0), item.dtype)
    return jnp.broadcast_to(whole, (item.shape[0], whole.shape[1]))
