"""The interaction component: one UserState x [C] ItemRows -> logits [C], the critical path; a handful of products over C.

Its head is an MLP over the inputs of one (user, candidate) pair, its first layer split by block. So what is the same for every
candidate is computed once, and a block that is linear in a user-side matrix (BEA, linear attention, SIM values) takes its
kernel in before the candidates come: w V W = w (V W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import HeadInputs, own
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.types import ItemRow, Params, UserState

Pair = tuple[jax.Array, jax.Array]  # an input [C, w] and its kernel [w, H]


def widths(config: Config) -> dict[str, dict[str, int]]:
    """Widths of the head's inputs, by block and name, in order; "tower" has the user vector, the item vector, their product."""
    towers = {"tower": {name: config.width for name in ("user", "item", "product")}}
    return towers | {block.name: block.widths(config) for block in config.blocks}


def init(key: jax.Array, config: Config) -> Params:
    """Parameters of the head."""
    return head_init(key, widths(config), config.head, config.outputs)


def apply(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> jax.Array:
    """Logits of one user's candidates, float32 [C], or [C, T] for T objectives; a logit depends on its own row alone."""
    return logits(params["head"], list(_terms(params, state, rows, config).values()))


def contributions(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> dict[str, jax.Array]:
    """What each block adds to the logits, float32 [C] or [C, T] by name: the logit less the logit without the block's terms.

    "tower" is the share of user and item vector. The head is not linear, so the contributions need not add up to the logit.
    """
    named = _terms(params, state, rows, config)
    whole = logits(params["head"], list(named.values()))
    if len(named) == 1:
        return {name: whole for name in named}
    rest = {name: [term for other, term in named.items() if other != name] for name in named}
    return {name: whole - logits(params["head"], terms) for name, terms in rest.items()}


def _terms(params: Params, state: UserState, rows: ItemRow, config: Config) -> dict[str, HeadInputs]:
    """What towers and blocks give to the head, by name."""
    terms: dict[str, HeadInputs] = {}
    if config.head:
        terms["tower"] = towers(params["head"], jnp.asarray(state.vector), jnp.asarray(rows.vector))
    for block in config.blocks:
        term = block.score(own(params, block), state, rows, kernels(params["head"], block.name))
        expect(isinstance(term, HeadInputs), f"{block.name}.score", "HeadInputs", type(term).__name__, error=TypeError)
        terms[block.name] = term
    return terms


def head_init(key: jax.Array, widths: Mapping[str, Mapping[str, int]], hidden: tuple[int, ...], outputs: int = 1) -> Params:
    """`first`: a kernel [width, H] for each input and a bias [H], scaled by the total fan-in; `rest`: the MLP above it.

    With several outputs `direct` [T] weighs the blocks' own logits for each. Without hidden layers there is a `bias` [] alone.
    """
    if not hidden:
        return {"bias": jnp.zeros((), jnp.float32)}
    first, rest = jax.random.split(key)
    whole = layers.dense_init(first, sum(sum(inputs.values()) for inputs in widths.values()), hidden[0])
    kernels, start = {}, 0
    for block, inputs in widths.items():
        for name, width in inputs.items():
            kernels.setdefault(block, {})[name] = whole["kernel"][start : start + width]
            start += width
    first_layer = {"kernels": kernels, "bias": whole["bias"]}
    made = {"first": first_layer, "rest": layers.mlp_init(rest, hidden[0], (*hidden[1:], outputs))}
    return made if outputs == 1 else made | {"direct": jnp.ones(outputs, jnp.float32)}


def kernels(params: Params, block: str) -> dict[str, jax.Array]:
    """The kernels of a block's inputs, by name; none without hidden layers or inputs."""
    return params["first"]["kernels"].get(block, {}) if "first" in params else {}


def towers(params: Params, user: jax.Array, item: jax.Array) -> HeadInputs:
    """The inputs of the towers: user vector [D], item vectors [C, D] and their product, u W_u + i W_i + (u * i) W_p.

    With many candidates the user vector enters the kernel, i (W_i + diag(u) W_p): one product instead of two.
    """
    own = kernels(params, "tower")
    if item.shape[0] > item.shape[1]:
        pairs: tuple[Pair, ...] = ((item, own["item"] + user[:, None] * own["product"]),)
    else:
        pairs = ((item, own["item"]), (user[None, :] * item, own["product"]))
    return HeadInputs(once=user @ own["user"], pairs=pairs)


def logits(params: Params, terms: Sequence[HeadInputs]) -> jax.Array:
    """Logits [C], or [C, T] of several outputs, from the terms of towers and blocks.

    Terms of fitted tables are float32 whatever the compute dtype.
    """
    given = [[term.logit for term in terms], [term.offset for term in terms]]
    if "direct" not in params:  # one objective
        given = [[value for pair in zip(*given, strict=True) for value in pair], []]
    direct, offsets = ([value for value in values if not isinstance(value, float)] for values in given)
    if "first" not in params:
        direct = [logit.astype(params["bias"].dtype) for logit in direct]
        return sum(direct[1:], direct[0]) + params["bias"]
    once: Any = sum((term.once for term in terms if not isinstance(term.once, float)), params["first"]["bias"])
    first = once[None, :] + total([pair for term in terms for pair in term.pairs])
    first = sum((term.rest for term in terms if not isinstance(term.rest, float)), first)
    logits = layers.mlp(params["rest"], jax.nn.relu(first))
    direct = [logit.astype(logits.dtype) for logit in direct]
    if "direct" not in params:
        return sum(direct, logits[..., 0])
    logits += sum(direct, jnp.zeros_like(logits[:, 0]))[:, None] * params["direct"][None, :]
    return logits.at[:, 0].add(sum(offset.astype(logits.dtype) for offset in offsets)) if offsets else logits


def total(pairs: Sequence[Pair]) -> jax.Array | float:
    """The sum of left @ right: [C, w] x [w, H] each -> [C, H].

    With many candidates narrow inputs are concatenated: one product is faster than several and a sum over [C, H]. With few,
    kernels stay separate: those that users share need not be copied for each.
    """
    if not pairs:
        return 0.0
    same: dict[int, Pair] = {}  # an input that several blocks read comes once, with the sum of its kernels
    for left, right in pairs:
        same[id(left)] = (left, same[id(left)][1] + right if id(left) in same else right)
    pairs = list(same.values())
    (first, _), *_ = pairs
    if first.shape[0] > first.shape[1]:
        left, right = zip(*pairs, strict=True)
        return jnp.concatenate(left, -1) @ jnp.concatenate(right, 0)
    return sum((left @ right for left, right in pairs), 0.0)
