"""Linear attention over the long history: sums, events and the plain sum over the history agree; with it, DIN on LSH."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax import layers
from aif_jax.blocks import LinearMemory, LshDin
from aif_jax.blocks.linear_memory import (
    ByEvent,
    Summed,
    cheaper_by_event,
    mean,
    softmax_keys,
    sum_events,
    sum_softmax,
    sum_softmax_trained,
)
from aif_jax.blocks.signatures import signs
from tests import demo
from tests.blocks import parts
from tests.reference import lsh as lsh_reference
from tests.reference import memory as reference

C, L, D, H, K = 5, 11, 6, 3, 7
BLOCKS = {"lsh": LshDin(bits=64), "learned": LinearMemory(width=K, keys="linear")}
KINDS, FORMS = list(BLOCKS), ["sums", "events"]
EVERY_FORM = pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind in KINDS for form in FORMS])
DRAWN = np.random.default_rng(7).normal(size=(D + 1, K)).astype(np.float32)
QUERY = {"kernel": DRAWN[:D], "bias": DRAWN[D]}
"""Parameters of the learned queries, which are an affine map of the item vector."""


def case(kind, *, seed=0, kept=None):
    """Candidates (signatures or item vectors), keys, values, mask, kernel; `kept` behaviours, the rest is padding."""
    rng = np.random.default_rng(seed)
    if kind == "lsh":
        query, keys = (rng.integers(0, 2**32, (n, 2), dtype=np.uint32) for n in (C, L))
    else:
        query, keys = (rng.normal(size=shape).astype(np.float32) for shape in ((C, D), (L, K)))
    values = rng.normal(size=(L, D)).astype(np.float32)
    mask = rng.random(L) < 0.7 if kept is None else np.arange(L) < kept
    return query, keys, values, mask, rng.normal(size=(D, H)).astype(np.float32)


def floats(kind, keys):
    return np.array([lsh_reference.signs(k) for k in keys]) if kind == "lsh" else keys


def history(kind, form, keys, values, mask):
    """The user half in either form."""
    keys, values, mask = jnp.asarray(keys), jnp.asarray(values), jnp.asarray(mask)
    if form == "events":
        return ByEvent(keys=keys, values=values, mask=mask)
    return sum_events(signs(keys).T if kind == "lsh" else keys.T, values, mask)


def deviation(kind, past, query, kernel):
    """The block's share of the head that depends on the candidate, [C, H]."""
    block, query, kernel = BLOCKS[kind], jnp.asarray(query), jnp.asarray(kernel)
    rows = parts.rows(block, vector=query, fitted={"signatures_64": query})
    kernels = {"mean": jnp.zeros_like(kernel), "deviation": kernel}
    return parts.first_layer(block.score({"query": QUERY}, parts.state(block, past), rows, kernels), query)


def run(kind, form, query, keys, values, mask, kernel):
    past = history(kind, form, keys, values, mask)
    return deviation(kind, past, query, kernel), mean(past)


compiled = jax.jit(run, static_argnums=(0, 1))


@EVERY_FORM
def test_the_head_gets_mean_and_deviation_of_the_plain_sum(form, kind):
    query, keys, values, mask, kernel = case(kind)
    made, average = compiled(kind, form, query, keys, values, mask, kernel)
    queries = floats(kind, query) if kind == "lsh" else query @ QUERY["kernel"] + QUERY["bias"]
    expected = reference.deviation(queries, floats(kind, keys), values, mask) @ kernel
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(average, reference.mean(values, mask), rtol=1e-5, atol=1e-6)
    block, past = BLOCKS[kind], history(kind, form, keys, values, mask)
    rows = parts.rows(block, vector=jnp.asarray(query), fitted={"signatures_64": jnp.asarray(query)})
    kernels = {"mean": jnp.asarray(2.0 * kernel), "deviation": jnp.asarray(kernel)}
    terms = block.score({"query": QUERY}, parts.state(block, past), rows, kernels)
    np.testing.assert_allclose(parts.first_layer(terms, query), 2 * (average @ kernel)[None] + made, rtol=1e-4, atol=1e-5)
    assert terms.logit == 0.0


@EVERY_FORM
def test_padding_does_not_leak(form, kind):
    query, keys, values, mask, kernel = case(kind, kept=6)
    other_keys, other_values = keys.copy(), values.copy()
    other_keys[6:] = 77 if kind == "lsh" else 1e30
    other_values[6:] = np.nan if form == "sums" else 1e30
    for clean, dirty, short in zip(
        compiled(kind, form, query, keys, values, mask, kernel),
        compiled(kind, form, query, other_keys, other_values, mask, kernel),
        compiled(kind, form, query, keys[:6], values[:6], mask[:6], kernel),
        strict=True,
    ):
        np.testing.assert_array_equal(clean, dirty)
        np.testing.assert_allclose(clean, short, rtol=1e-5, atol=1e-6)


@EVERY_FORM
def test_an_empty_history_gives_zeros_and_finite_gradients(form, kind):
    query, keys, values, mask, kernel = case(kind, kept=0)

    def total(values, kernel):
        made, average = run(kind, form, query, keys, values, mask, kernel)
        return (made**2).sum() + (average**2).sum()

    value, gradient = jax.jit(jax.value_and_grad(total, (0, 1)))(values, kernel)
    assert value == 0
    assert all(np.all(g == 0) for g in gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_forms_agree(kind):
    query, keys, values, mask, kernel = case(kind, seed=3)
    weights = np.random.default_rng(1).normal(size=(C, H)).astype(np.float32)

    def loss(form, values, kernel, query, keys):
        return (weights * run(kind, form, query, keys, values, mask, kernel)[0]).sum()

    by = (0, 1) if kind == "lsh" else (0, 1, 2, 3)
    one, two = (jax.jit(jax.grad(lambda *a, form=form: loss(form, *a), by))(values, kernel, query, keys) for form in FORMS)
    for a, b in zip(one, two, strict=True):
        assert np.any(np.asarray(a) != 0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_by_values_by_hand():
    """d (f A w / (sqrt(K) n)) / d v_j = (f . g_j) w / (sqrt(K) n): one bit of 32 differs, so f . g = 30."""
    keys, block = np.array([[0], [1]], np.uint32), LshDin(bits=32)

    def loss(values):
        past = sum_events(signs(keys).T, values, jnp.ones(2, bool))
        rows = parts.rows(block, fitted={"signatures_32": jnp.zeros((1, 1), jnp.uint32)})
        return block.score(
            {}, parts.state(block, past), rows, {"mean": jnp.zeros((1, 1)), "deviation": jnp.ones((1, 1))}
        ).rest.sum()

    gradient = jax.jit(jax.grad(loss))(jnp.zeros((2, 1)))
    np.testing.assert_allclose(gradient[:, 0], np.array([32, 30]) / (np.sqrt(32) * 2), rtol=1e-6)


def test_few_candidates_take_the_events():
    assert cheaper_by_event(1, 64)
    assert not cheaper_by_event(1000, 64)
    assert not cheaper_by_event(None, 64)  # serving, where nobody knows


@pytest.mark.parametrize("block", [LshDin(bits=32), LinearMemory(width=32), LinearMemory(width=32, keys="linear")], ids=repr)
def test_the_user_half_is_chosen_by_how_many_candidates_follow(block):
    """Sums in serving and for many candidates, events for few; both give a candidate the same."""
    model, params = demo.build(blocks=(block,))
    features = demo.user(model.config)
    own = params["blocks"].get(block.name, {}) | params["fitted"].get(block.name, {})
    kernel = np.random.default_rng(0).normal(size=(8, H)).astype(np.float32)

    @jax.jit
    def shares(params):
        row = jax.vmap(model.item, (None, 0))(params, demo.items(4))
        hints = {"serving": None, "few": 1, "many": 40}
        states = {name: model.user(params, features, candidates=hint) for name, hint in hints.items()}
        kernels = {"mean": jnp.asarray(kernel), "deviation": jnp.asarray(kernel)}
        given = {name: block.score(own, state, row, kernels) for name, state in states.items()}
        return states, {name: parts.first_layer(terms, row.vector) for name, terms in given.items()}

    states, made = shares(params)
    kinds = {name: type(state.blocks[block.name]) for name, state in states.items()}
    assert kinds == {"serving": Summed, "few": ByEvent, "many": Summed}
    np.testing.assert_allclose(made["serving"], made["many"], rtol=1e-6, atol=1e-6)  # softmax keys have a form for training
    np.testing.assert_allclose(made["serving"], made["few"], rtol=1e-4, atol=1e-5)


def test_sums_do_not_grow_with_the_history():
    rng, shapes = np.random.default_rng(0), set()
    for length in (4, 40):
        keys = rng.integers(0, 2**32, (length, 2), dtype=np.uint32)
        made = history("lsh", "sums", keys, rng.normal(size=(length, D)).astype(np.float32), np.ones(length, bool))
        shapes.add(tuple(x.shape for x in jax.tree.leaves(made)))
        assert made.count == length
    assert shapes == {((64, D), (D,), ())}


def test_softmax_keys_by_hand():
    keys = jnp.log(jnp.array([[1.0, 3.0, 99.0], [1.0, 1.0, 99.0]]))
    shares = softmax_keys(keys, jnp.array([True, True, False]))
    np.testing.assert_allclose(shares, [[0.5, 1.5, 0.0], [1.0, 1.0, 0.0]], rtol=1e-6)  # n = 2 times 1/4, 3/4 and 1/2, 1/2
    assert not softmax_keys(keys, jnp.zeros(3, bool)).any()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_summing_a_softmax_is_summing_its_shares(scale):
    """Values and gradients, for histories of every length down to none; padding holds keys beyond all others."""
    rng = np.random.default_rng(0)
    keys = (scale * rng.normal(size=(4, K, L))).astype(np.float32)
    values = rng.normal(size=(4, L, D)).astype(np.float32)
    mask = np.arange(L) < np.array([L, 6, 1, 0])[:, None]
    keys = np.where(mask[:, None], keys, np.float32(1e30))
    weight = jnp.asarray(rng.normal(size=(K, D)).astype(np.float32))

    def shares(keys, values, mask):
        return sum_events(softmax_keys(keys, mask), values, mask)

    def outputs(summed):
        loss = lambda keys, values: (jnp.tanh(jax.vmap(summed)(keys, values, mask).moments) * weight[None]).sum()  # noqa: E731
        return jax.jit(jax.vmap(summed))(keys, values, mask), jax.jit(jax.grad(loss, (0, 1)))(keys, values)

    (expected, wanted), (got, gradient) = outputs(shares), outputs(sum_softmax)
    for ours, plain in zip(jax.tree.leaves((got, gradient)), jax.tree.leaves((expected, wanted)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert not got.moments[3].any()


@pytest.mark.parametrize("length", [L, 2 * layers.CHUNK + 3])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_form_for_training_has_the_same_values_and_gradients(scale, length):
    """For histories of every length down to none; masked places hold zeros, as embeddings do."""
    rng = np.random.default_rng(1)
    key = {
        "kernel": jnp.asarray(scale * rng.normal(size=(D, K)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=K), jnp.float32),
    }
    mask = np.arange(length) < np.array([length, 6, 1, 0])[:, None]
    values = np.where(mask[..., None], rng.normal(size=(4, length, D)), 0).astype(np.float32)
    weight = jnp.asarray(rng.normal(size=(K, D)), jnp.float32)

    def plain(key, values, mask):
        return sum_softmax(key["kernel"].T @ values.T + key["bias"][:, None], values, mask)

    def outputs(summed):
        def loss(key, values):
            made = jax.vmap(summed, (None, 0, 0))(key, values, mask)
            return (jnp.tanh(made.moments) * weight[None]).sum() + (made.total**2).sum()

        return jax.vmap(summed, (None, 0, 0))(key, values, mask), jax.grad(loss, (0, 1))(key, values)

    (expected, wanted), (got, gradient) = outputs(plain), outputs(sum_softmax_trained)
    for ours, usual in zip(jax.tree.leaves((got, gradient)), jax.tree.leaves((expected, wanted)), strict=True):
        kept = mask[..., None] if ours.shape == values.shape else True  # embeddings of masked places take no gradient
        np.testing.assert_allclose(np.where(kept, ours, 0), np.where(kept, usual, 0), rtol=1e-3, atol=1e-4)
    assert np.all(np.isfinite(gradient[1])) and not got.moments[3].any()


def test_the_dot_product_is_that_of_the_read_and_the_item():
    rng = np.random.default_rng(0)
    item = rng.normal(size=(5, D)).astype(np.float32)
    query = item @ QUERY["kernel"] + QUERY["bias"]
    keys, values = rng.normal(size=(9, K)).astype(np.float32), rng.normal(size=(9, D)).astype(np.float32)
    mask = np.arange(9) < 6
    expected = (query @ keys[:6].T @ values[:6] / (K**0.5 * 6) * item).sum(-1)
    block = LinearMemory(width=K, keys="linear", dot_product=True)
    kernels = {"mean": jnp.zeros((D, H)), "deviation": jnp.zeros((D, H))}
    for form in FORMS:
        past = history("learned", form, keys, values, mask)
        terms = block.score({"query": QUERY}, parts.state(block, past), parts.rows(block, vector=item), kernels)
        np.testing.assert_allclose(terms.logit, expected / D**0.5, rtol=1e-4, atol=1e-5)
