"""Score expressions: what is parsed, what is refused, and how the engine ranks by them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aif_jax as aif
from aif_jax import scores as aif_scores
from aif_jax.scores import over_all
from aif_jax.serving import Candidates, NonFiniteScores, Request, ServingConfig
from aif_jax.serving.programs import orders_of
from tests import demo
from tests.serving_world import bids_for

OBJECTIVES = ("click", "conversion|click", "like")
SIDE = ("bid", "value")


def parse(text: str) -> aif_scores.Expression:
    return aif_scores.parse_expression(text, objectives=OBJECTIVES, side=SIDE)


# the language


@pytest.mark.parametrize(("text", "expected"), [
    ("p.click * bid", 0.5 * 3),
    ("p.conversion * value + 0.1 * p.like", 0.1 * 40 + 0.1 * 0.9),
    ('p.click * p["conversion|click"] * value', 0.5 * 0.2 * 40),
    ("-(p.click - 1) ** 2 / 4", -0.0625),
    ("max(p.click, p.like) - min(bid, value)", 0.9 - 3),
    ("log(exp(p.like)) + sqrt(value * 10) * 0 + +p.click", 0.9 + 0.5),
    (" 2 * p.like ", 1.8),
    ("p.click ** 2 ** 0.5", 0.5**2**0.5),
])  # fmt: skip
def test_values_are_those_of_arithmetic(text, expected):
    each = {"click": 0.5, "conversion": 0.1, "conversion|click": 0.2, "like": 0.9}
    p = {name: np.full(4, value, np.float32) for name, value in each.items()}
    side = {"bid": np.full(4, 3, np.float32), "value": np.full(4, 40, np.float32)}
    made = parse(text)
    got = jax.jit(lambda p, side: made(p, side))(p, side)
    assert got.dtype == jnp.float32 and got.shape == (4,)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_an_expression_says_what_it_reads():
    made = parse("p.click * value + p.like * bid")
    assert made.side == ("bid", "value") and made == parse("p.click * value + p.like * bid") and hash(made)
    assert aif_scores.parse_expression("p", side=()).side == ()
    assert aif_scores.parse_expression("p * 2", objectives=("click",))({"click": jnp.ones(2)}, {}).tolist() == [2, 2]


@pytest.mark.parametrize(("text", "message"), [
    ("__import__('os').system('true')", "expected numbers, names"),
    ("p.click.__class__", "expected numbers, names"),
    ("value.real * p.click", "expected numbers, names"),
    ("[p.click for p in value]", "expected numbers, names"),
    ("p.click if bid else 0", "expected numbers, names"),
    ("(lambda: p.click)()", "expected numbers, names"),
    ("p['click']", "expected numbers, names"),
    ("p.click; bid", "expected an expression"),
    ("p.click = 3", "expected an expression"),
    ("p.click @ bid", "expected numbers, names"),
    ("p.click > bid", "expected numbers, names"),
    ("p.click * True", "expected numbers, names"),
    ("p.click * 'x'", "expected numbers, names"),
    ("p.click * 2j", "expected numbers, names"),
    ("p.click * 1e300", "expected numbers below 1e30"),
    ("p.click * " + "9" * 400, "expected numbers below 1e30"),
    ("abs(p.click)", "expected numbers, names"),
    ("min(p.click)", "expected 2 arguments of min, got 1"),
    ("log(p.click, 2)", "expected 1 argument of log, got 2"),
    ("min(*p.click, 2)", "expected numbers, names"),
    ("max(a=p.click, b=2)", "expected numbers, names"),
    ("p.share * bid", r'expected one of p.click, p.conversion, p.like, p\["conversion\|click"\], got p.share'),
    ("p['share|click']", r'expected one of p.click, p.conversion, p.like, p\["conversion\|click"\], got p\[.share'),
    ("p * bid", "expected one of p.click, .*, got p alone"),
    ("p.click * price", r"expected p.click, .* or side values among \['bid', 'value'\], got 'price'"),
    ("click * bid", r"expected p.click, .* or side values among \['bid', 'value'\], got 'click'"),
    ("p['a|b'].real", "expected numbers, names"),
    ("bid['conversion|click']", "expected numbers, names"),
    ("bid * value", "expected p or p.NAME, got none"),
    ("", "expected an expression"),
    ("p.click" + " + p.click" * 60, "expected at most 500 characters"),
    ("(" * 400 + "p.click" + ")" * 80, "expected an expression"),
])  # fmt: skip
def test_nothing_else_is_let_through(text, message):
    with pytest.raises(ValueError, match=f"score expression.*{message}"):
        parse(text)
    with pytest.raises(ValueError, match="score expression: expected text such as 'p . bid', got 3"):
        parse(3)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="pclikevaubd.*+-/()0123456789 _,[]'\"=:;\\\n", max_size=40))
def test_any_text_is_an_expression_or_a_value_error(text):
    try:
        made = parse(text)
    except ValueError as error:
        assert "score expression" in str(error)
    else:
        assert set(made.side) <= set(SIDE)


def test_a_name_means_what_the_report_means_by_it():
    """`p.conversion` is the product, as the figures of `evaluate` under that name; what is conditional is written out."""
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    for xp in (np, jnp):
        p = aif_scores.probabilities({}, logits, OBJECTIVES, xp)
        assert list(p) == ["click", "conversion", "like", "conversion|click"]
        for name in ("click", "conversion", "like"):
            np.testing.assert_allclose(p[name], sigmoid(over_all(logits, OBJECTIVES, name, np)), rtol=1e-5)
        np.testing.assert_allclose(p["conversion|click"], sigmoid(logits[:, 1]), rtol=1e-5)
        np.testing.assert_allclose(p["conversion"], p["click"] * p["conversion|click"], rtol=1e-6)
        np.testing.assert_allclose(parse("p.conversion * bid")(p, {"bid": 2.0}), 2 * p["conversion"], rtol=1e-6)


# the engine


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


async def test_the_engine_ranks_by_its_orders_and_a_publish_changes_them(world):
    ids = world.ids[:50]
    p, row_bids = sigmoid(world.logits(3, ids)), np.asarray(world.features.side["bid"])[:50].astype(np.float64)
    given = bids_for(ids).bids

    def best(value) -> list[int]:
        return ids[np.argsort(-value, kind="stable")[:6]].tolist()

    async with world.engine(orders={"square": "p * bid ** 2", "shy": "-p"}, order="square", buckets=(64,)) as engine:
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
        with pytest.raises(ValueError, match=r"Request.order: expected one of .*'square', 'shy'\], got 'x'"):
            await engine.rank(Request(user=3, context=ids, order="x"), 6)
        with pytest.raises(ValueError, match="expected p or side values among"):
            await engine.publish(aif.Trained(engine.model, world.params), world.index, orders={"square": "p * price"})
        with pytest.raises(ValueError, match="Request.order: expected one of .*, got 'square'"):
            await engine.publish(
                aif.Trained(engine.model, world.params), world.index, orders={"other": "p"}
            )  # what requests take by default must stay
        with pytest.raises(NonFiniteScores, match="order 'square': log.* of all 64 probe items is NaN or infinite"):
            await engine.publish(aif.Trained(engine.model, world.params), world.index, orders={"square": "log(0 - p)"})
        assert (await engine.rank(Request(user=3, context=ids), 6)).ids.tolist() == best(p * row_bids**2)  # nothing changed
        compiled = engine.metrics()["counters"]["compiled_score_functions"]
        name = await engine.publish(aif.Trained(engine.model, world.params), world.index, orders={"square": "p / bid"})
        assert name == world.index.version and engine.metrics()["counters"]["compiled_score_functions"] > compiled
        assert (await engine.rank(Request(user=3, context=ids), 6)).ids.tolist() == best(p / row_bids)
        await engine.publish(aif.Trained(engine.model, world.params), world.index)  # keeps them
        await engine.update_index(world.index)
        assert (await engine.rank(Request(user=3, context=ids), 6)).ids.tolist() == best(p / row_bids)


async def test_values_that_are_not_finite_are_not_ranked(world):
    """An item whose expression is NaN counts as `non_finite`; the others are ranked."""
    ids = world.ids[:20]
    bids = np.where(np.arange(20) < 15, 2.0, 0.0).astype(np.float32)
    async with world.engine(orders={"ratio": "p / bid"}) as engine:
        answer = await engine.rank(Request(user=3, context=Candidates(ids, bids), order="ratio"), 8)
        assert answer.non_finite == 5 and answer.mask.all() and set(answer.ids) <= set(ids[:15])


def test_orders_that_do_not_fit_are_refused_at_the_start():
    config = demo.config(objectives=("click", "like"))
    orders = orders_of(config, "bid", {"both": "p.click + p.like"})
    assert orders.names == ("bid", "both") and orders.expressions[0].text == "p.click * bid" and orders.in_row
    with pytest.raises(ValueError, match="orders: expected another name than 'logit'"):
        orders_of(config, "bid", {"logit": "p.click"})
    with pytest.raises(ValueError, match="orders: expected score expressions by name, got list"):
        orders_of(config, "bid", ["p.click"])  # type: ignore[arg-type]
    without = config.replace(schema=dataclasses.replace(config.schema, side=()))
    orders = orders_of(without, "bid", {})
    orders.expect("bid", given=True)
    with pytest.raises(ValueError, match="order 'bid': expected bids with the candidates or 'bid' in schema.side, got neither"):
        orders.expect("bid", given=False)
    own = orders_of(config, "bid", {"bid": "p.like * bid"})  # may be replaced
    assert own.names == ("bid",) and own.expressions[0].text == "p.like * bid"
    model, params = demo.build(objectives=("click", "like"), **demo.VARIANTS["base"])
    for changes in ({"orders": {"x": "p"}}, {"order": "x"}):
        with pytest.raises(ValueError, match="score expression|Request.order"):
            aif.AsyncPreRanker(aif.Trained(model, params), None, features=print, config=ServingConfig(**changes))
