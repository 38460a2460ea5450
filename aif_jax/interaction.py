"""The interaction component: one UserState x [C] ItemRows -> logits [C], the critical path; a handful of products over C."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import heads
from aif_jax.blocks.block import expect_arrays, own
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.heads import FirstLayer, HeadInputs
from aif_jax.trees import leaves_by_path
from aif_jax.types import ItemRow, Params, UserState

DIRECT = "direct"
"""Next to the head's parameters, which cannot have this name: [T] with T > 1 objectives, weighs what blocks add."""


def init(key: jax.Array, config: Config) -> Params:
    """Return parameters of the head."""
    name, head = f"head {type(config.head).__name__}", heads.head_of(config.head)
    trained = expect_arrays({name: head.init(key, config.head_features, config.outputs)}, "init")[name]
    expect(DIRECT not in trained, name, f"no parameter {DIRECT!r}, which the weights of the blocks' logits have", DIRECT)
    return trained if config.outputs == 1 else trained | {DIRECT: jnp.ones(config.outputs, jnp.float32)}


def apply(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> jax.Array:
    """Return logits of one user's candidates, float32 [C], or [C, T] for T objectives; a logit depends on its own row alone."""
    return logits(params.get("head", {}), inputs(params, state, rows, config=config), jnp.asarray(rows.vector), config=config)


def contributions(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> dict[str, jax.Array]:
    """Return what each block adds to the logits, float32 [C] or [C, T] by name: the logit less the logit without the block.

    "tower" is the share of user and item vector. The head is not linear, so the contributions need not add up to the logit.
    """
    given = inputs(params, state, rows, config=config)
    silent = jax.tree.map(lambda x: x if isinstance(x, float) else jnp.zeros_like(x), given)
    logits_of = partial(logits, params.get("head", {}), item=jnp.asarray(rows.vector), config=config)
    whole = logits_of(given)
    return {name: whole - logits_of(given | {name: silent[name]}) for name in given}


def inputs(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> dict[str, HeadInputs]:
    """Return what towers and blocks give to the head, by name."""
    trained = {name: leaf for name, leaf in params.get("head", {}).items() if name != DIRECT}
    first, given = heads.head_of(config.head).first_layer(trained), {}
    at = f"head {type(config.head).__name__}.first_layer"
    expect(isinstance(first, FirstLayer | None), at, "a FirstLayer or None", type(first).__name__, error=TypeError)
    kernels = {name: heads.identity(each) for name, each in config.head_features.items()} if first is None else first.kernels
    if first is not None:
        got = {path: np.shape(kernel) for path, kernel in leaves_by_path(kernels).items()}
        whole = not isinstance(kernels, Mapping) or "tower" in kernels
        widths = leaves_by_path({of: each for of, each in config.head_features.items() if whole or of != "tower"})
        hidden = next((shape[-1:] for shape in got.values()), np.shape(first.bias)[-1:])
        fits = got == {path: (width, *hidden) for path, width in widths.items()}
        fits = fits and (first.bias == 0 if isinstance(first.bias, float) else np.shape(first.bias) == hidden != ())
        expect(fits, at, f"kernels [width, H] in dicts of {widths}, bias 0.0 or [H]", (got, np.shape(first.bias) or first.bias))
    if "tower" in kernels:
        given["tower"] = towers(kernels["tower"], jnp.asarray(state.vector), jnp.asarray(rows.vector))
    for block in config.blocks:
        parts = heads.NotedKernels(kernels.get(block.name, {}))
        given[block.name] = block.score(own(params, block), state, rows, parts)
        heads.expect_terms(given[block.name], parts, jnp.asarray(rows.vector), f"{block.name}.score")
    return given


def towers(kernels: Mapping[str, jax.Array], user: jax.Array, item: jax.Array) -> HeadInputs:
    """Return the features of the towers: user vector [D], item vectors [C, D] and their product, u W_u + i W_i + (u * i) W_p.

    With many candidates the user vector enters the kernel, i (W_i + diag(u) W_p): one product instead of two.
    """
    once = user @ kernels["user"]
    if item.shape[0] > item.shape[1]:
        return HeadInputs(once=once, item=kernels["item"] + user[:, None] * kernels["product"])
    return HeadInputs(once=once, item=kernels["item"], pairs=((user[None, :] * item, kernels["product"]),))


def logits(params: Params, given: Mapping[str, HeadInputs], item: jax.Array, *, config: Config) -> jax.Array:
    """Return logits [C] or [C, T] from what towers and blocks give; `params` are the head's, `item` the item vectors [C, D]."""
    head, trained = heads.head_of(config.head), {name: leaf for name, leaf in params.items() if name != DIRECT}
    parts, first = list(given.values()), head.first_layer(trained)
    if first is None:
        features = jnp.concatenate([heads.joined([part], item) for part in parts], -1)
    else:
        features = heads.joined([HeadInputs(once=first.bias), *parts], item)
    made, shape = head.apply(trained, features), (item.shape[0], config.outputs)
    expect(np.shape(made) == shape, f"head {type(config.head).__name__}", f"logits of shape {shape}", np.shape(made))
    made, direct = jnp.asarray(made, jnp.float32), [part.logit for part in parts if not isinstance(part.logit, float)]
    offsets = [part.offset for part in parts if not isinstance(part.offset, float)]
    if config.outputs == 1:
        return sum([*direct, *offsets], made[:, 0])
    made += sum(direct, jnp.zeros_like(made[:, 0]))[:, None] * params[DIRECT][None, :]
    return made.at[:, 0].add(sum(offsets)) if offsets else made
