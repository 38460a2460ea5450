"""What every block shares: its name, its defaults, the views that it reads, where a fitted value comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks, layers
from aif_jax.blocks.block import UserView, own
from aif_jax.blocks.signatures import Signatures
from aif_jax.trees import leaves_by_path
from tests import demo

EVERY = (*demo.BLOCKS, *demo.EXACT[:2], blocks.Sim("item"), blocks.DotProduct())


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
    assert plain.score({}, None, None, {}) == blocks.HeadInputs() == (0.0, 0.0, (), 0.0, 0.0, 0.0)  # type: ignore[arg-type]


def test_a_user_view_has_both_histories():
    _, params = demo.build()
    config = demo.config(short_length=3, long_length=5)
    features = demo.user(demo.config())
    view = UserView(config=config, params=params, features=features, history=features.history)
    item = view.features.history.item
    assert view.short.item.tolist() == item[:3].tolist() and view.long.item.tolist() == item[:5].tolist()
    np.testing.assert_array_equal(view.embedded, layers.embed_behaviours(params, config.schema, view.long))
    assert view.embedded is view.embedded  # made once, for all blocks
    np.testing.assert_array_equal(view.values(Signatures(32), view.long), params["fitted"]["signatures_32"]["table"][item[:5]])


@blocks.block
class Fitting(blocks.Block):
    """Fits an array; `kind` says what is wrong with it."""

    kind: str = ""
    per_item = ("table",)

    def fit(self, items, config, *, seed):
        return {"rows" if self.kind == "name" else "table": jnp.zeros(5 if self.kind == "rows" else len(items.ids["item"]))}


@pytest.mark.parametrize("kind", ["name", "rows"])
def test_per_item_names_arrays_with_a_row_for_each_item(kind):
    with pytest.raises(ValueError, match=r"per_item: expected an array 'table' of `fit` with 50 rows, got"):
        demo.build(blocks=(Fitting(kind), blocks.DotProduct()))


def test_what_is_trained_starts_as_float32_under_64_bits():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for name in ("aif", "paper", "two_tower"):
            model = aif.build(getattr(aif.presets, name)(demo.schema()))
            params = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), demo.catalogue()))
            trained = {path: leaf for path, leaf in leaves_by_path(params).items() if not path.startswith("fitted")}
            assert {path for path, leaf in trained.items() if leaf.dtype != jnp.float32} == set()
