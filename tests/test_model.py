"""The model as functions: what crosses a component, what `init` makes and refuses, and components of your own."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import aif_jax as aif
from aif_jax import blocks, item, user
from tests import demo
from tests.refusals import refused


@pytest.fixture(scope="module")
def compiled():
    """The model with every block: its parameters and the jitted joint function."""
    model, params = demo.build()
    return model, params, jax.jit(model.joint)


def test_shapes_of_what_crosses_a_component():
    model, params = demo.build()
    state = jax.eval_shape(model.user, params, demo.user(model.config))
    assert state.vector.shape == (8,)
    assert state.blocks.keys() == {"bea", "lsh_din", "linear_memory", "sim_category", "sim_tier"}
    assert state.blocks["bea"].shape == (4, 8)
    assert state.blocks["lsh_din"].moments.shape == (32, 8)
    assert state.blocks["linear_memory"].moments.shape == (8, 8)
    assert state.blocks["sim_category"].entries.shape == (4, 3, 8)
    assert state.blocks["sim_tier"].signature.shape == (24, 1) and state.blocks["sim_tier"].signature.dtype == jnp.uint32
    rows = jax.eval_shape(jax.vmap(model.item, (None, 0)), params, demo.items(9))
    assert rows.vector.shape == (9, 8) and rows.vector.dtype == jnp.float32
    assert rows.blocks["bea"].shape == (9, 4) and rows.blocks["linear_memory"] == {}  # it reads the item vector
    assert rows.blocks["sim_category"]["query"].shape == (9, 8) and rows.blocks["sim_category"]["value"].shape == (9,)
    assert rows.blocks["lsh_din"] == rows.blocks["sim_tier"] == {}  # they read the shared table
    assert rows.fitted["signatures_32"].shape == (9, 1) and rows.fitted["signatures_32"].dtype == jnp.uint32
    assert rows.side["bid"].shape == (9,)


def test_a_model_without_blocks_has_towers_alone():
    model, params = demo.build(**demo.VARIANTS["base"])
    state = jax.eval_shape(model.user, params, demo.user(model.config))
    row = jax.eval_shape(jax.vmap(model.item, (None, 0)), params, demo.items(2))
    assert state.blocks == row.blocks == row.fitted == {}
    assert params["blocks"] == {} and set(params["fitted"]) == {"fields"} and "position" not in params["user"]
    kernels = params["head"]["first"]["kernels"]["tower"]
    assert {name: kernel.shape for name, kernel in kernels.items()} == dict.fromkeys(("user", "item", "product"), (8, 16))


def test_one_config_has_one_model_and_another_encoding_another():
    config = demo.config(blocks=())
    assert aif.build(config) is aif.build(demo.config(blocks=()))
    for encoding in ("ab12", "cd34", ""):
        other = config.with_encoding(encoding)
        assert other == config and aif.build(other).config.schema.encoding == encoding


def test_init_is_a_function_of_key_and_seed():
    model, catalogue = aif.build(demo.config(blocks=(blocks.LshDin(bits=32),))), demo.catalogue()
    init = jax.jit(lambda key: model.init(key, catalogue, seed=3))
    one, same, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    assert not np.array_equal(one["embedding"]["item"], other["embedding"]["item"])
    fitted = {seed: aif.fit_tables(model.config, catalogue, seed=seed) for seed in (3, 4)}
    jax.tree.map(np.testing.assert_array_equal, one["fitted"], fitted[3])
    assert not np.array_equal(*(fit["signatures_32"]["projection"] for fit in fitted.values()))
    np.testing.assert_array_equal(fitted[3]["fields"]["category"], catalogue.items.ids["category"])


def test_init_takes_fitted_tables_and_fits_on_the_host_under_jit():
    model = aif.build(demo.config())
    fitted = aif.fit_tables(model.config, demo.catalogue())
    make = lambda fitted: jax.eval_shape(lambda key: model.init(key, None, fitted=fitted), jax.random.key(0))  # noqa: E731
    assert jax.tree.structure(make(fitted)["fitted"]) == jax.tree.structure(fitted)
    assert make({}) == make(fitted) | {"fitted": {}}
    under_jit = jax.jit(lambda key: model.init(key, demo.catalogue())["fitted"])(jax.random.key(0))  # fits on the host
    jax.tree.map(np.testing.assert_array_equal, under_jit, fitted)


@pytest.mark.parametrize(("catalogue", "error", "message"), [
    (None, TypeError, "init catalogue: expected a Catalogue, got NoneType"),
    (demo.catalogue().items, TypeError, "init catalogue: expected a Catalogue, got ItemFeatures"),
    (aif.Catalogue(schema=demo.schema(), raw=np.arange(48), items=demo.catalogue().features(np.arange(49))), ValueError,
     "init catalogue: expected a row for each of the 50 items of the schema, got 49"),
    (aif.Catalogue(schema=dataclasses.replace(demo.schema(), content=0), raw=np.arange(49),
                   items=demo.catalogue().features(np.arange(50), content=False)), ValueError,
     "init catalogue: expected content [50, 12], got None"),
], ids=["none", "features", "rows missing", "no content"])  # fmt: skip
def test_init_refuses_a_catalogue_that_does_not_fit(catalogue, error, message):
    model = aif.build(demo.config())
    refused(error, re.escape(message), model.init, jax.random.key(0), catalogue)
    refused(error, re.escape(message), aif.fit_tables, model.config, catalogue)


def test_init_refuses_the_fitted_tables_of_another_config():
    model, other = aif.build(demo.config()), demo.config(blocks=(blocks.LshDin(bits=64),))
    fitted = aif.fit_tables(other, demo.catalogue())
    shorter = jax.tree.map(lambda x: x[:40], aif.fit_tables(model.config, demo.catalogue()))
    for wrong, message in (
        (fitted, r"fitted: expected \['fields', 'signatures_32'\], got \['fields', 'signatures_64'\]"),
        (shorter, r"fitted: expected 50 rows in fields/category, row 0 and one for each item .*, got shape \[40\]"),
        (aif.fit_tables(model.config, demo.catalogue()) | {"signatures_32": {}}, r"50 rows in signatures_32/table, .* got .*"),
    ):
        refused(ValueError, message, model.init, jax.random.key(0), None, fitted=wrong)


def test_assemble_takes_a_tower_of_your_own():
    def own_init(key, config):
        return user.init(key, config) | {"scale": jnp.full((), 2.0)}

    def own_user(params, features, *, config):
        state = user.apply(params, features, config=config)
        return dataclasses.replace(state, vector=state.vector * params["user"]["scale"])

    config = demo.config(**demo.VARIANTS["two_tower"])
    model = aif.assemble(config, user=aif.Component(own_init, own_user), item=aif.Component(item.init, item.apply))
    params, features, items = demo.init(model), demo.user(config), demo.items(3)
    plain = aif.build(config)

    @jax.jit
    def run(params):
        rows = jax.vmap(model.item, (None, 0))(params, items)
        vectors = model.user(params, features).vector, plain.user(params, features).vector
        return *vectors, model.joint(params, features, items), model.interaction(params, model.user(params, features), rows)

    scaled, vector, joint, staged = run(params)
    assert params["user"]["scale"].shape == () and params["user"]["scale"] != 1
    np.testing.assert_allclose(scaled, params["user"]["scale"] * vector, rtol=1e-6)
    np.testing.assert_allclose(joint, staged, rtol=1e-5)


def test_assemble_takes_flax_modules_as_towers():
    """Linen as it is, NNX by its bridge; blocks go on reading the vectors."""

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="last")(nn.gelu(nn.Dense(24, name="first")(x)))

    class Deep(nnx.Module):
        def __init__(self, width_in, width, *, rngs):
            self.linear, self.norm = nnx.Linear(width_in, width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    config = demo.config(**demo.VARIANTS["matching"], sequence=False)
    usual = aif.build(config)  # whose first kernel tells the width of the inputs
    shapes = jax.eval_shape(lambda: usual.init(jax.random.key(0), None, fitted=aif.fit_tables(config, demo.catalogue())))
    inputs = shapes["item"]["tower"]["layer_0"]["kernel"].shape[0]
    model = aif.assemble(config, user=Wide(), item=nnx.bridge.to_linen(Deep, inputs, 8))
    assert model.config.assembled == ("user=Wide", "item=ToLinen")
    params, features, items = demo.init(model), demo.user(config), demo.items(5)
    assert params["user"]["tower"]["first"]["kernel"].shape[1] == 24
    assert params["item"]["tower"]["linear"]["kernel"].shape == (inputs, 8)

    @jax.jit
    def run(params):
        rows = jax.vmap(model.item, (None, 0))(params, items)
        return rows.vector, model.joint(params, features, items), model.interaction(params, model.user(params, features), rows)

    vectors, joint, staged = run(params)
    norm = params["item"]["tower"]["norm"]
    plain = (vectors - norm["bias"][None, :]) / norm["scale"][None, :]
    np.testing.assert_allclose(plain.mean(1), np.zeros(5), atol=1e-5)  # of a layer norm
    np.testing.assert_allclose(joint, staged, rtol=1e-4, atol=1e-5)
    listed = aif.Component(lambda key, config: {"layers": {0: jnp.ones(1)}}, item.apply)  # as `nnx.List` has it
    refused(TypeError, r"item.init: .* keys text .* got {'layers': {0: '", demo.init, aif.assemble(config, item=listed))
    for part in ("user", "item"):
        narrow = aif.assemble(config, **{part: nn.Dense(4)})
        refused(ValueError, rf"{part} tower: expected a vector \[8\]", narrow.joint, demo.init(narrow), features, items)
    for more, got in (
        (nn.BatchNorm(use_running_average=False), "'batch_stats', 'params'"), (nn.Dropout(0.5, deterministic=False), "PRNG"),
        (nnx.bridge.to_linen(nnx.BatchNorm, inputs), "collections"), (nnx.bridge.to_linen(nnx.Dropout, 0.5), "No RngStream"),
    ):  # fmt: skip
        refused(ValueError, rf"Flax module \w+: expected parameters alone, .*{got}", demo.init, aif.assemble(config, item=more))
    mixing, given = aif.assemble(config, item=nn.MultiHeadDotProductAttention(1)), "Flax module Multi.* inputs .* of one user"
    refused(IndexError, given, demo.init, mixing)


def test_each_input_of_the_head_changes_the_scores(compiled):
    """A block whose kernel could be silenced without a change would not be wired."""
    model, params, joint = compiled
    features, items = demo.user(model.config), demo.items(40)
    scores, first = joint(params, features, items), params["head"]["first"]
    for block, kernels in first["kernels"].items():
        for name, kernel in kernels.items():
            silent = first["kernels"] | {block: kernels | {name: jnp.zeros_like(kernel)}}
            changed = params | {"head": params["head"] | {"first": first | {"kernels": silent}}}
            assert np.abs(joint(changed, features, items) - scores).max() > 1e-6, (block, name)


def test_a_history_longer_or_shorter_than_the_model_reads_is_cut_or_taken(compiled):
    model, params, joint = compiled
    features, items = demo.user(model.config, events=24), demo.items(5)
    longer = jax.tree.map(lambda a, b: np.concatenate([a, b]), features.history, demo.history(16, 16, seed=8))
    assert longer.mask.sum() == 40
    longer = dataclasses.replace(features, history=longer)
    np.testing.assert_allclose(joint(params, longer, items), joint(params, features, items), atol=1e-6)
    features = demo.user(model.config, events=5)
    shorter = dataclasses.replace(features, history=jax.tree.map(lambda x: x[:5], features.history))
    np.testing.assert_allclose(joint(params, shorter, items), joint(params, features, items), atol=1e-6)


def test_content_that_a_tower_reads_may_not_be_missing(compiled):
    model, params, joint = compiled
    items = demo.catalogue().features([1, 2], content=False)
    refused(ValueError, r"content float32 \[12\], which the model reads, got", joint, params, demo.user(model.config), items)
