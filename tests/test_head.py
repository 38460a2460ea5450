"""The head split by blocks equals one MLP over the concatenated blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import bridge, head, interaction, memory, sim
from aif_jax.types import Behaviours
from tests.reference import head as reference

BLOCKS = {"user": 4, "item": 4, "product": 4, "tiers": 3}


def init(key, blocks, hidden):
    return jax.jit(lambda key: head.init(key, blocks, hidden))(key)


def params(hidden=(6, 5)):
    made = init(jax.random.key(0), BLOCKS, hidden)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), made)


def test_parameters_have_one_kernel_for_each_block():
    made = init(jax.random.key(0), BLOCKS, (6, 5))
    assert {name: k.shape for name, k in made["first"]["kernels"].items()} == {n: (w, 6) for n, w in BLOCKS.items()}
    assert made["first"]["bias"].shape == (6,)
    assert [made["rest"][f"layer_{i}"]["kernel"].shape for i in range(2)] == [(6, 5), (5, 1)]
    wide = init(jax.random.key(0), {"a": 1000, "b": 500}, (60,))["first"]["kernels"]
    spread = np.concatenate([kernel.ravel() for kernel in wide.values()])
    np.testing.assert_allclose(spread.std(), 1500**-0.5, rtol=0.05)  # by the whole fan-in, not by the block's


@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4)])
def test_concatenated_matches_the_reference(hidden):
    own = params(hidden)
    rng = np.random.default_rng(0)
    blocks = {name: rng.normal(size=(7, width)).astype(np.float32) for name, width in BLOCKS.items()}
    expected = [reference.logit(own, {name: block[c] for name, block in blocks.items()}) for c in range(7)]
    np.testing.assert_allclose(head.concatenated(own, blocks), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("candidates", [1, 4, 5, 50])
def test_product_by_either_form(candidates):
    own, rng = params(), np.random.default_rng(1)
    user, item = rng.normal(size=4).astype(np.float32), rng.normal(size=(candidates, 4)).astype(np.float32)
    kernels = own["first"]["kernels"]
    np.testing.assert_allclose(
        head.total(head.product(own, user, item)),
        item @ kernels["item"] + (user * item) @ kernels["product"],
        rtol=1e-4,
        atol=1e-5,
    )


def behaviours(rng, schema, length, kept):
    """One user's history with signatures, padding last."""
    names = {a.name: a.size for a in schema.item_attributes}
    return Behaviours(
        ids={f: jnp.asarray(rng.integers(0, names[f], length), jnp.int32) for f in schema.behaviour_fields},
        action=jnp.asarray(rng.integers(0, schema.actions, length), jnp.int32),
        age=jnp.asarray(np.sort(rng.random(length) * 1e6), jnp.float32),
        mask=jnp.arange(length) < kept,
        signature=jnp.asarray(rng.integers(0, 2**32, (length, 1), dtype=np.uint32)),
    )


def request(config, *, candidates, kept, seed=0):
    rng, schema = np.random.default_rng(seed), config.schema
    user = aif.UserFeatures(
        ids={"gender": jnp.int32(1), "interests": jnp.array([2, 0])},
        floats=jnp.asarray(rng.normal(size=2), jnp.float32),
        short=behaviours(rng, schema, config.short_length, min(kept, config.short_length)),
        long=behaviours(rng, schema, config.long_length, kept),
    )
    items = aif.ItemFeatures(
        ids={
            "item": jnp.asarray(rng.integers(0, 50, candidates), jnp.int32),
            "category": jnp.asarray(rng.integers(0, 6, candidates), jnp.int32),
            "tags": jnp.asarray(rng.integers(0, 9, (candidates, 3)), jnp.int32),
        },
        floats=jnp.asarray(rng.normal(size=(candidates, 1)), jnp.float32),
        content=jnp.asarray(rng.normal(size=(candidates, 12)), jnp.float32),
        side={"bid": jnp.ones(candidates)},
    )
    return user, items


CONFIGS = {
    "everything": {},
    "codes": {"simtier": "codes", "codes_per_item": 2},
    "codes by cosine": {"simtier": "codes", "codes_by": "cosine"},
    "by action": {"tiers_by_action": True, "simtier": "exact"},
    "base": {"sequence": False, "bridges": 0, "sim_fields": (), "memory": (), "simtier": "off"},
    "one hidden layer": {"head_hidden": (16,)},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("candidates", "kept"), [(1, 20), (30, 20)])
def test_interaction_equals_the_concatenated_head(name, candidates, kept):
    """Split and folded kernels give what an MLP over the plain blocks gives."""
    config = aif.tiny(**CONFIGS[name])
    model = aif.build(config)
    made = jax.jit(model.init)(jax.random.key(0))
    user, items = request(config, candidates=candidates, kept=kept)
    state = jax.jit(model.user)(made, user)
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(made, items)
    eye, every = jnp.eye(config.width), lambda x: jnp.broadcast_to(x, (candidates, config.width))
    blocks = {"user": every(state.vector), "item": rows.vector, "product": state.vector * rows.vector}
    if config.bridges:
        blocks["bridge"] = bridge.combine(rows.bridge, state.bridge)
    for kind, history in state.memory.items():
        query = rows.signature if kind == "lsh" else rows.memory_query
        blocks |= {f"{kind}_mean": every(memory.mean(history)), f"{kind}_deviation": memory.deviation(history, query, eye)}
    for field, cache in state.sim.items():
        blocks[f"sim_{field}"] = sim.lookup(cache, rows.query, rows.sim[field], eye)
        blocks[f"sim_{field}_flags"] = sim.flags(cache, rows.sim[field])
    if state.tiers is not None:
        blocks["tiers"] = interaction.tier_block(state, rows, config=config)
    assert {k: v.shape[1] for k, v in blocks.items()} == interaction.blocks(config)
    expected = head.concatenated(made["interaction"], blocks)
    np.testing.assert_allclose(jax.jit(model.interaction)(made, state, rows), expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(expected))


def test_gradient_of_the_split_form_is_that_of_the_concatenated_form():
    own, rng = params(), np.random.default_rng(2)
    user, item, tiers = (rng.normal(size=s).astype(np.float32) for s in ((4,), (9, 4), (9, 3)))

    def split(own, user, item):
        kernels = own["first"]["kernels"]
        first = (
            own["first"]["bias"]
            + user @ kernels["user"]
            + head.total(head.product(own, user, item) + [(tiers, kernels["tiers"])])
        )
        return head.finish(own, first).sum()

    def whole(own, user, item):
        blocks = {"user": jnp.broadcast_to(user, (9, 4)), "item": item, "product": user * item, "tiers": jnp.asarray(tiers)}
        return head.concatenated(own, blocks).sum()

    for a, b in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f, (0, 1, 2)))(own, jnp.asarray(user), jnp.asarray(item))) for f in (split, whole)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
