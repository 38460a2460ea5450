"""What every block shares: its name, its defaults, the views that it reads, where a fitted value comes from."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks, layers
from aif_jax.blocks.block import by_id, own, recent
from aif_jax.blocks.signatures import Signatures
from tests import demo
from tests.blocks import parts

EVERY = (
    *demo.BLOCKS,
    *demo.EXACT[:2],
    demo.EXACT[3],
    blocks.Sim("item"),
    blocks.SimTierCodes(),
    blocks.DotProduct(),
    blocks.Concatenation(),
)


def test_names():
    assert [block.name for block in EVERY] == [
        "bea", "lsh_din", "linear_memory", "sim_category", "sim_tier", "cross_attention", "target_attention", "cosine_tiers",
        "sim_item", "simtier_codes", "dot_product", "concatenation",
    ]  # fmt: skip


@pytest.mark.parametrize("block", EVERY, ids=lambda block: block.name)
def test_a_block_is_a_value(block):
    assert block == dataclasses.replace(block) and hash(block) == hash(dataclasses.replace(block))
    with pytest.raises(dataclasses.FrozenInstanceError):
        block.tiers = 5
    assert demo.config(blocks=(block,)).blocks == (block,)


@pytest.mark.parametrize("block", EVERY, ids=lambda block: block.name)
def test_kernels_are_given_for_the_widths_alone(block):
    """`score` of a block reads no kernel that `widths` does not name."""
    model, params = demo.build(blocks=(block,))
    kernels = params["head"]["first"]["kernels"].get(block.name, {})
    assert {name: kernel.shape for name, kernel in kernels.items()} == {
        n: (w, 16) for n, w in block.widths(model.config).items()
    }

    def score(params):
        state, rows = model.user(params, demo.user(model.config)), jax.vmap(model.item, (None, 0))(params, demo.items(5))
        return block.score(own(params, block), state, rows, kernels)

    terms = jax.eval_shape(score, params)
    assert terms.logit.shape == ((5,) if isinstance(block, blocks.DotProduct) else ())
    for left, right in terms.pairs:
        assert left.shape[0] == 5 and left.shape[1] == right.shape[0] and right.shape[1] == 16
    assert terms.once.shape in ((), (16,)) and terms.rest.shape in ((), (5, 16))


def test_a_block_that_overrides_nothing_does_nothing():
    plain = blocks.Block()
    assert plain.name == "block" and plain.tables == () and plain.least_history(demo.config()) == 1
    assert plain.widths(demo.config()) == plain.init(jax.random.key(0), demo.config()) == {}
    assert plain.fit(demo.items(1), demo.config(), seed=0) == {}
    assert plain.score({}, None, None, {}) == blocks.HeadInputs() == (0.0, (), 0.0, 0.0)  # type: ignore[arg-type]


def test_own_puts_trained_and_fitted_parameters_together():
    params = {"blocks": {"bea": {"bridges": 1}}, "fitted": {"bea": {"codes": 2}, "sim_tier": {"x": 3}}}
    assert own(params, blocks.Bea()) == {"bridges": 1, "codes": 2}
    assert own(params, blocks.SimTier()) == {"x": 3} and own(params, blocks.Sim()) == {}


def test_recent_cuts_a_longer_history_and_takes_a_shorter_one():
    past = demo.history(10, 8)
    assert recent(past, 3).item.tolist() == past.item[:3].tolist()
    assert recent(past, 99).mask.tolist() == past.mask.tolist()


def test_a_user_view_has_both_histories():
    _, params = demo.build()
    config = demo.config(short_length=3, long_length=5)
    view = parts.view(config, params, demo.user(demo.config()))
    item = view.features.history.item
    assert view.short.item.tolist() == item[:3].tolist() and view.long.item.tolist() == item[:5].tolist()
    np.testing.assert_array_equal(view.embedded, layers.embed_behaviours(params, config.schema, view.long))
    assert view.embedded is view.embedded  # made once, for all blocks
    np.testing.assert_array_equal(view.values(Signatures(32), view.long), params["fitted"]["signatures_32"]["table"][item[:5]])


@pytest.mark.parametrize(("row", "expected"), [(2, [20.0]), (0, [-7.0]), (3, [-7.0]), (-1, [-7.0]), (2**31 - 1, [-7.0])])
def test_a_value_by_id_or_from_content(row, expected):
    """A row of the table, or what the content gives where the id is unknown; without content the unknown row."""
    table, content = jnp.array([[5.0], [10.0], [20.0]]), np.float32([3, 4])
    items = demo.items(1)
    features = dataclasses.replace(items, ids={"item": np.int32(row)}, content=content)
    assert by_id(table, features, lambda c: -c.sum(keepdims=True)).tolist() == expected
    without = dataclasses.replace(features, content=None)
    assert by_id(table, without, lambda c: -c).tolist() == (expected if row == 2 else [5.0])


MANY = aif.Schema(item_attributes=(aif.Attribute(name="item", size=2**31), aif.Attribute(name="category", size=9)), actions=3)


BITS, ASCENDING = "signature bits: expected a multiple of 32 from 32 to 256", "ascending numbers of behaviours, at least 1"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: blocks.DecayedMemory(width=0), "DecayedMemory.width: expected at least 1, got 0"),
    (lambda: blocks.DecayedMemory(shortest=0.0), "DecayedMemory.shortest: expected above 0 and at most longest="),
    (lambda: blocks.DecayedMemory(shortest=9.0, longest=8.0),
     "DecayedMemory.shortest: expected above 0 and at most longest=8.0, got 9.0"),
    (lambda: blocks.DecayedMemory(longest=np.nan), "DecayedMemory.shortest: expected above 0 and at most longest=nan"),
    (lambda: blocks.DecayedSim(half_life=0.0), "DecayedSim.half_life: expected a finite number of seconds above 0, got 0.0"),
    (lambda: blocks.DecayedSim(half_life=-1.0), "DecayedSim.half_life: expected a finite number of seconds above 0, got -1.0"),
    (lambda: blocks.DecayedSim(half_life=np.inf), "DecayedSim.half_life: expected a finite number of seconds above 0, got inf"),
    (lambda: aif.Config(schema=MANY, blocks=(blocks.DecayedSim(),)), "schema: expected at most 2^32 pairs of item and action"),
    (lambda: blocks.CosineTiers(tiers=1), "CosineTiers.tiers: expected 2 to 64, got 1"),
    (lambda: blocks.CosineTiers(windows=(4, 4)), f"CosineTiers.windows: expected {ASCENDING}, got (4, 4)"),
    (lambda: blocks.LinearMemory(width=0), "LinearMemory.width: expected at least 1, got 0"),
    (lambda: blocks.LinearMemory(keys="sharp"), "LinearMemory.keys: expected 'linear' or 'softmax', got 'sharp'"),
    *((lambda bits=bits: blocks.LshDin(bits=bits), f"{BITS}, got {bits}") for bits in (0, 48, 512)),
    *((lambda bits=bits: blocks.Signatures(bits), f"{BITS}, got {bits}") for bits in (0, 31, 48, 288)),
    (lambda: blocks.MatchingStatistics(()), "at least one field, each once, got ()"),
    (lambda: blocks.MatchingStatistics(("item", "item")), "at least one field, each once"),
    (lambda: blocks.MatchingStatistics(recent_events=0), "at least 1, got 0"),
    (lambda: demo.config(blocks=(blocks.MatchingStatistics(("item", "tags")),)),
     "behaviour fields of the schema, ('item', 'category'), got ['tags']"),
    (lambda: blocks.PureSvd(width=0), "PureSvd.width"),
    (lambda: blocks.PureSvd(length=0), "PureSvd.length"),
    (lambda: blocks.PureSvd(decay=-1), "PureSvd.decay"),
    (lambda: blocks.Sim(slots=0), "Sim.slots: expected at least 1, got 0"),
    (lambda: blocks.Sim(length=0), "Sim.length: expected at least 1, got 0"),
    *((lambda name=name: demo.config(blocks=(blocks.Sim(name),)),
       f"Sim.field: expected one of schema.behaviour_fields ('item', 'category'), got '{name}'") for name in ("brand", "tags")),
    (lambda: blocks.SimTier(tiers=1), "SimTier.tiers: expected 2 to 64, got 1"),
    (lambda: blocks.SimTier(tiers=65), "SimTier.tiers: expected 2 to 64, got 65"),
    (lambda: blocks.SimTier(windows=(0,)), f"SimTier.windows: expected {ASCENDING}, got (0,)"),
    (lambda: blocks.SimTier(windows=(8, 8)), f"SimTier.windows: expected {ASCENDING}, got (8, 8)"),
    (lambda: blocks.SimTier(length=0), "SimTier.length: expected None or at least 1, got 0"),
    (lambda: blocks.SimTier(length=8, windows=(2, 8)), "SimTier.length: expected None or at least 9, got 8"),
    (lambda: blocks.SimTier(bits=48), f"{BITS}, got 48"),
    (lambda: blocks.SimTierCodes(codes=0), "SimTierCodes.codes: expected at least 1, got 0"),
    (lambda: blocks.SimTierCodes(codes=4, nearest=5), "SimTierCodes.nearest: expected 1 to codes=4, got 5"),
    (lambda: blocks.SimTierCodes(nearest=0), "SimTierCodes.nearest: expected 1 to codes=256, got 0"),
    (lambda: blocks.SimTierCodes(tiers=1), "SimTierCodes.tiers: expected 2 to 64, got 1"),
    (lambda: blocks.SimTierCodes(windows=(3, 2)), f"SimTierCodes.windows: expected {ASCENDING}, got (3, 2)"),
])  # fmt: skip
def test_wrong_fields_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
