"""Building blocks of the components, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import layers
from tests import demo


def test_attention_by_hand():
    keys = jnp.array([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    values = jnp.array([[1.0], [5.0], [100.0]])
    got = layers.attention(jnp.array([jnp.log(3.0), 0.0, 0.0, 0.0]), keys, values, jnp.array([True, True, False]))
    np.testing.assert_allclose(got, [0.75 * 1 + 0.25 * 5], rtol=1e-6)  # weights 3/4 and 1/4
    keys = jnp.ones((3, 2))  # over nothing
    value, gradient = jax.value_and_grad(lambda q: layers.attention(q, keys, keys, jnp.zeros(3, bool)).sum())(jnp.ones(2))
    assert value == 0 and not gradient.any()
    got = layers.masked_softmax(jnp.array([1e30, 1e30, -1e30, 5.0]), jnp.array([True, True, True, False]))
    np.testing.assert_allclose(got, [0.5, 0.5, 0.0, 0.0])


def test_masked_mean_and_buckets_of_ages():
    values = jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 7.0]])
    np.testing.assert_allclose(layers.masked_mean(values, jnp.array([True, True, False])), [2.0, 3.0])
    np.testing.assert_allclose(layers.masked_mean(values, jnp.zeros(3, bool)), [0.0, 0.0])
    seconds = jnp.array([0, 0.9, 1, 3, 86400, 2.0**31, 2.0**40, -5, np.nan])
    assert layers.age_bucket(seconds).tolist() == [0, 0, 1, 2, 16, 31, 31, 0, 0]


@pytest.mark.parametrize("wrong", [3, -1, 2**31 - 1, -(2**31)])
def test_lookup_out_of_range_reads_row_0(wrong):
    got = jax.jit(layers.lookup)(jnp.arange(6.0).reshape(3, 2), jnp.array([2, wrong, 1]))
    np.testing.assert_array_equal(got, [[4, 5], [0, 1], [2, 3]])
    codes = np.array([7, 8], np.int32)  # fitted tables are NumPy arrays of any dtype, of one value for each item or of several
    np.testing.assert_array_equal(layers.lookup(codes, jnp.array([[1, 0], [wrong, 1]])), [[8, 7], [7, 8]])
    assert layers.lookup(np.zeros((2, 3), np.uint32), jnp.array([1])).dtype == jnp.uint32


def test_lookup_in_the_rows_of_a_batch():
    """Training puts `Rows` in the place of a table: the same ids read the same rows, ids out of range row 0."""
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    ids, slot = np.array([[4, 2], [0, 4]], np.int32), np.full(6, 77, np.int32)
    slot[[0, 2, 4]] = [0, 1, 2]
    rows = layers.Rows(table=table[[0, 2, 4]], ids=np.array([0, 2, 4], np.int32), slot=slot)
    np.testing.assert_array_equal(jax.jit(layers.lookup)(rows, ids), table[ids])
    np.testing.assert_array_equal(layers.lookup(rows, jnp.array([-1, 6])), table[[0, 0]])
    np.testing.assert_array_equal(rows[ids], table[ids])  # for blocks of yours, which may index a table


@pytest.mark.parametrize("size", [5, layers.CHUNK, layers.CHUNK + 1, 3 * layers.CHUNK])
def test_a_fold_ends_with_the_longest_history(size):
    """Totals and values by place are those of the whole history; chunks after the last event are not computed."""
    rng = np.random.default_rng(size)
    kept = np.array([size // 2, 1, 0])
    mask, values = np.arange(size) < kept[:, None], rng.normal(size=(3, size, 2)).astype(np.float32)
    scale, own = jnp.float32(3.0), rng.normal(size=3).astype(np.float32)

    def step(scale, own, chunk, total):
        values, mask = chunk
        kept = jnp.where(mask[:, None], values, 0.0)
        return (total[0] + scale * own * kept.sum(0), total[1] + 1), scale * kept

    def fold(scale, own, values, mask):
        return layers.fold_events(step, scale, own, (values, mask), mask, (jnp.zeros(2), jnp.int32(0)))

    expected = 3 * np.where(mask[..., None], values, 0)
    (total, chunks), out = jax.jit(jax.vmap(fold, (None, 0, 0, 0)))(scale, own, values, mask)
    np.testing.assert_allclose(total, expected.sum(1) * own[:, None], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert chunks.tolist() == [-(-int(kept.max()) // min(layers.CHUNK, size))] * 3
    (alone, _), _ = jax.jit(fold)(scale, own[0], values[0], mask[0])
    np.testing.assert_allclose(alone, total[0], rtol=1e-6)
    (models, _), _ = jax.jit(jax.vmap(fold, (0, None, None, None)))(jnp.array([3.0, 6.0]), own[0], values[0], mask[0])
    np.testing.assert_allclose(models, [total[0], 2 * total[0]], rtol=1e-5)


@pytest.mark.parametrize("few", [True, False])
def test_small_tables_that_are_joined_give_the_same_embeddings_and_gradients(few, monkeypatch):
    monkeypatch.setattr(layers, "JOINED_ROWS", 4096 if few else 3)
    model, params = demo.build(**demo.VARIANTS["every block"])
    schema = model.config.schema
    history = jax.tree.map(np.array, demo.user(model.config, events=12, seed=3).history)
    history.item[:3] = [-1, 10**6, 0]
    history.action[:3] = [-1, 10**6, 0]

    def outputs(joined):
        def loss(embedding):
            z = layers.embed_behaviours(params | {"embedding": embedding}, schema, history, joined=joined)
            return (jnp.sin(z) * jnp.arange(1.0, 1.0 + z.shape[1])[None]).sum(), z

        return jax.value_and_grad(loss, has_aux=True)(params["embedding"])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), outputs(True), outputs(False))


def test_embed_attributes_averages_the_known_ids_of_a_bag():
    embedding = {"tags": jnp.array([[9.0], [1.0], [3.0]])}
    tags = aif.Attribute(name="tags", size=3, length=3)
    (got,) = layers.embed_attributes(embedding, (tags,), {"tags": jnp.array([1, 2, 0])})
    np.testing.assert_allclose(got, [2.0])
    (empty,) = layers.embed_attributes(embedding, (tags,), {"tags": jnp.zeros(3, jnp.int32)})
    np.testing.assert_allclose(empty, [0.0])


def test_mlp_and_layer_norm_by_hand():
    last = {"kernel": jnp.array([[2.0], [10.0]]), "bias": jnp.array([1.0])}
    params = {"layer_0": {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([0.0, 0.5])}, "layer_1": last}
    np.testing.assert_allclose(layers.mlp(params, jnp.array([[3.0], [-2.0]])), [[7.0], [26.0]])  # relu, then 2a + 10b + 1
    params = {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, 10.0])}
    np.testing.assert_allclose(layers.apply_module(layers.NORM, params, jnp.array([[1.0, 3.0]])), [[-1.0, 12.0]], atol=1e-5)


def test_fields_of_a_behaviour_come_from_the_catalogue():
    """The item is the history's, every other field is looked up by it; an id out of range has the unknown item's."""
    schema, catalogue = demo.schema(), demo.catalogue()
    params = {"fitted": {"fields": {"category": catalogue.items.ids["category"]}}}
    item = np.array([3, 0, 49, 50, -2], np.int32)
    fields = layers.behaviour_fields(params, schema, item)
    np.testing.assert_array_equal(fields["item"], item)
    np.testing.assert_array_equal(fields["category"], catalogue.items.ids["category"][[3, 0, 49, 0, 0]])


def test_a_behaviour_is_the_sum_of_its_embeddings():
    """Item, category, action and age; zeros where there is no event, whatever is there."""
    _, params = demo.build(**demo.VARIANTS["base"])
    past = demo.history(6, 4)
    past = dataclasses.replace(past, item=past.item + 7 * ~past.mask, age=np.where(past.mask, past.age, np.float32(np.nan)))
    got = jax.jit(lambda params: layers.embed_behaviours(params, demo.schema(), past))(params)
    tables, category = jax.tree.map(np.asarray, params["embedding"]), demo.catalogue().items.ids["category"]
    for place in range(4):
        item, bucket = past.item[place], int(np.floor(np.log2(1 + past.age[place])))
        parts = tables["item"][item], tables["category"][category[item]], tables["behaviour.action"][past.action[place]]
        np.testing.assert_allclose(got[place], sum(parts) + tables["behaviour.age"][bucket], rtol=1e-5, atol=1e-6)
    assert not got[4:].any()
