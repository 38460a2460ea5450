"""Orders: what functions are refused, what they are given, and how the engine ranks by them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit as sigmoid

import aif_jax as aif
from aif_jax import export
from aif_jax import scores as aif_scores
from aif_jax.scores import over_all
from aif_jax.serving import Candidates, NonFiniteScores, Request, ServingConfig
from aif_jax.serving.programs import orders_of
from tests import demo
from tests.refusals import refused, refused_later
from tests.serving_world import bids_for

OBJECTIVES = ("click", "conversion|click", "like")


@pytest.mark.parametrize(("order", "message"), [
    ("p.click * bid", r"""expected a function f\(p, bid\), got 'p.click \* bid'; write lambda p, bid: p\["click"\] \* bid"""),
    (lambda p, bid: p["share"] * bid, r"p, with \['click', 'conversion', 'conversion\|click', 'like'\].*got KeyError: 'share'"),
    (lambda p: p["click"], "expected a JAX function .* got TypeError"),
    (lambda p, bid: float(p["click"][0]), "expected a JAX function .* got ConcretizationTypeError"),
    (lambda p, bid: (p["click"] * bid).sum(), r"to float32 \[C\], got shape \[\] for C = 3"),
    (lambda p, bid: p["click"][:2], r"to float32 \[C\], got shape \[2\] for C = 3"),
    (lambda p, bid: p, "expected a JAX function .* got TypeError"),
    (lambda p, bid: jnp.ones(bid.shape), "got one that reads neither; write lambda"),
])  # fmt: skip
def test_what_is_no_order_is_refused(order, message):
    refused(ValueError, f"orders 'x': .*{message}", aif_scores.reads_bid, "x", order, OBJECTIVES)


def test_whether_an_order_reads_the_bid():
    def reads(order, objectives=OBJECTIVES) -> bool:
        return aif_scores.reads_bid("x", order, objectives)

    assert reads(lambda p, bid: p["click"] * bid) and reads(lambda p, bid: bid)
    assert not reads(lambda p, bid: jnp.maximum(p["conversion|click"], p["like"]) ** 0.5)
    assert not reads(lambda p, bid: p["click"], ("click",)) and reads(lambda p, bid: p[""] * bid, ())


def test_a_name_means_what_the_report_means_by_it():
    """`p["conversion"]` is the product, as the figures of `evaluate` under that name; what is conditional is written out."""
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    for xp in (np, jnp):
        p = aif_scores.probabilities({}, logits, OBJECTIVES, xp)
        assert list(p) == ["click", "conversion", "like", "conversion|click"]
        for name in ("click", "conversion", "like"):
            np.testing.assert_allclose(p[name], sigmoid(over_all(logits, OBJECTIVES, name, np)), rtol=1e-5)
        np.testing.assert_allclose(p["conversion|click"], sigmoid(logits[:, 1]), rtol=1e-5)
        np.testing.assert_allclose(p["conversion"], p["click"] * p["conversion|click"], rtol=1e-6)


async def test_the_engine_ranks_by_its_orders_and_a_publish_changes_them(world):
    ids = world.ids[:50]
    p, row_bids = sigmoid(world.logits(3, ids)), np.asarray(world.features.side["bid"])[:50].astype(np.float64)
    given = bids_for(ids).bids

    orders = {"square": lambda p, bid: p[""] * bid**2, "shy": lambda p, bid: -p[""]}

    def best(value) -> list[int]:
        return ids[np.argsort(-value, kind="stable")[:6]].tolist()

    async with world.engine(orders=orders, order="square", buckets=(64,)) as engine:
        for request, value in (
            (Request(user=3, context=ids), p * row_bids**2),
            (Request(user=3, context=Candidates(ids, given)), p * given.astype(np.float64) ** 2),
            (Request(user=3, context=ids, order="bid"), p * row_bids),
            (Request(user=3, context=ids, order="shy"), -p),
            (Request(user=3, context=ids, order="logit"), np.log(p / (1 - p))),
        ):
            answer = await engine.rank(request, 6)
            assert answer.ids.tolist() == best(value)
            np.testing.assert_allclose(answer.scores, np.sort(value)[::-1][:6], rtol=1e-4, atol=1e-5)
        for order in ("x", ""):
            message = rf"Request.order: expected one of .*'square', 'shy'\], got '{order}'"
            await refused_later(ValueError, message, engine.rank(Request(user=3, context=ids, order=order), 6))
        trained = aif.Trained(engine.model, world.params)
        price = engine.publish(trained, world.index, orders={"square": lambda p, bid: p["price"] * bid})
        await refused_later(ValueError, "orders 'square': expected .* got KeyError: 'price'", price)
        other = engine.publish(trained, world.index, orders={"other": lambda p, bid: p[""]})
        await refused_later(ValueError, "^ServingConfig.order: expected one of .*, got 'square'", other)  # the default stays
        with pytest.raises(NonFiniteScores, match="order 'square': the values of all 64 probe items are NaN or infinite"):
            await engine.publish(trained, world.index, orders={"square": lambda p, bid: jnp.log(0 - p[""])})
        assert (await engine.rank(Request(user=3, context=ids), 6)).ids.tolist() == best(p * row_bids**2)  # nothing changed
        compiled = engine.metrics()["counters"]["compiled_score_functions"]
        name = await engine.publish(trained, world.index, orders={"square": lambda p, bid: p[""] / bid})
        assert name == world.index.version and engine.metrics()["counters"]["compiled_score_functions"] > compiled
        assert (await engine.rank(Request(user=3, context=ids), 6)).ids.tolist() == best(p / row_bids)
        compiled = engine.metrics()["counters"]["compiled_score_functions"]
        await engine.publish(trained, world.index)  # keeps them
        assert engine.metrics()["counters"]["compiled_score_functions"] == compiled
        await engine.update_index(world.index)
        assert (await engine.rank(Request(user=3, context=ids), 6)).ids.tolist() == best(p / row_bids)


async def test_values_that_are_not_finite_are_not_ranked(world):
    ids, bids = world.ids[:20], np.where(np.arange(20) < 15, 2.0, 0.0).astype(np.float32)
    orders = {"ratio": lambda p, bid: p[""] / bid, "log": lambda p, bid: p[""] + jnp.log(bid - 1)}
    async with world.engine(orders=orders) as engine:
        for order in orders:
            answer = await engine.rank(Request(user=3, context=Candidates(ids, bids), order=order), 8)
            assert answer.non_finite == 5 and answer.mask.all() and set(answer.ids) <= set(ids[:15])


def test_orders_that_do_not_fit_are_refused_at_the_start():
    config = demo.config(objectives=("click", "like"))

    def both(p, bid):
        return p["click"] + p["like"]

    orders = orders_of(config, ServingConfig(orders={"both": both}))
    assert orders.names == ("bid", "both") and orders.functions[0]({"click": 2}, 3) == 6 and not orders.need_bids
    assert orders == orders_of(config, ServingConfig(orders={"both": both})) and hash(orders)  # so that engines share programs
    refused(ValueError, "orders: expected another name than 'logit'", orders_of, config, ServingConfig(orders={"logit": both}))
    orders = orders_of(config.replace(schema=dataclasses.replace(config.schema, side=())), ServingConfig(orders={"both": both}))
    assert orders.need_bids == {"bid"}
    orders.expect("bid", given=True)
    orders.expect("both", given=False)
    message = "Request.order: expected for 'bid' bids with the candidates, or a model whose items have the side value 'bid'"
    refused(ValueError, message, orders.expect, "bid", given=False)
    own = orders_of(config, ServingConfig(orders={"bid": both}))  # may be replaced
    assert own.names == ("bid",) and own.functions == (both,)
    model, params = demo.build(objectives=("click", "like"), **demo.VARIANTS["base"])
    for changes in ({"orders": {"x": lambda p, bid: p[""]}}, {"order": "x"}):
        engine = {"features": print, "config": ServingConfig(**changes)}
        refused(ValueError, "^orders 'x'|^ServingConfig.order", aif.AsyncPreRanker, aif.Trained(model, params), None, **engine)
    for texts in ({"x": "p.click * bid"}, ["p.click"]):
        refused(ValueError, r"Config.orders: expected functions f\(p, bid\) by name, .* got", ServingConfig, orders=texts)


def test_orders_of_two_versions_are_one_compiled_function(tmp_path):
    """A service compiles nothing again for a version that the same script exported; batches of requests have orders too."""
    model, params = demo.build(objectives=OBJECTIVES, **demo.SMALL | {"head": aif.heads.Mlp((8,))})
    moved = jax.tree.map(lambda leaf: leaf * 1.01 if leaf.dtype == np.float32 else leaf, params)
    orders, read = {"value": lambda p, bid: p["conversion|click"] * bid**2}, []
    for name, leaves in (("one", params), ("two", moved)):
        export.save(tmp_path / name, aif.Trained(model, leaves), platforms=("cpu",), orders=orders)
        read.append(export.restore(tmp_path / name).orders)
    assert read[0] == read[1] and hash(read[0]["value"]) == hash(read[1]["value"])
    assert len({orders_of(model.config, ServingConfig(orders=each)) for each in read}) == 1
    rng = np.random.default_rng(0)
    p = {name: rng.random((2, 5), np.float32) for name in ("click", "conversion", "like", "conversion|click")}
    bid = rng.random((2, 5), np.float32)
    expected = p["conversion|click"] * bid**2
    np.testing.assert_allclose(jax.vmap(read[0]["value"])(p, bid), expected, rtol=1e-6)
    np.testing.assert_allclose(read[1]["value"](jax.tree.map(lambda part: part[1], p), bid[1]), expected[1], rtol=1e-6)
