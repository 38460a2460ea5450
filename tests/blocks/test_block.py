"""What every block shares: its name, defaults, views, fitted values; signatures of content; the bias of positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import aif_jax as aif
from aif_jax import blocks, heads, layers, train
from aif_jax.blocks import PositionBias, signatures
from aif_jax.blocks.block import UserView, own
from aif_jax.blocks.signatures import Signatures
from aif_jax.data.pipeline import Pipeline, make_batch
from aif_jax.refreshing.warm import forget_ids
from aif_jax.train import losses
from aif_jax.train.evaluate import predict
from aif_jax.trees import leaves_by_path
from tests import demo
from tests.reference import blocks as reference
from tests.reference.blocks import signed
from tests.refusals import refused
from tests.test_sparse import batch_of

EVERY = (*demo.BLOCKS, *demo.EXACT[:2], blocks.Sim("item"), blocks.DotProduct())


@pytest.mark.parametrize("block", EVERY, ids=lambda block: block.name)
def test_kernels_are_given_for_the_widths_alone(block):
    model, params = demo.build(blocks=(block,))
    kernels = params["head"]["first"]["kernels"].get(block.name, {})
    expected = {name: (width, 16) for name, width in block.widths(model.config).items()}
    assert {name: kernel.shape for name, kernel in kernels.items()} == expected

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
    view = UserView(config=config, params=params, features=demo.user(demo.config()))
    item = view.features.history.item
    assert view.short.item.tolist() == item[:3].tolist() and view.long.item.tolist() == item[:5].tolist()
    np.testing.assert_array_equal(view.embedded, layers.embed_behaviours(params, config.schema, view.long))
    assert view.embedded is view.embedded  # made once, for all blocks
    np.testing.assert_array_equal(view.values(Signatures(32), view.long), params["fitted"]["signatures_32"]["table"][item[:5]])


def test_a_name_that_the_model_has_taken_is_refused():
    expected = "Config.blocks: expected blocks and tables of different names, .* none of tower, fields.* a second block"
    Fields = blocks.block(type("Fields", (blocks.Block,), {"__annotations__": {"name": str}, "name": "fields"}))
    Called = blocks.block(type("Called", (blocks.Block,), {"name": lambda self: "called"}))
    for taken in (Fields(),), (Fields("signatures_64"), blocks.LshDin()), (Fields("a/b"),), (Called(),), (blocks.Bea(),) * 2:
        refused(ValueError, expected, demo.config, blocks=taken)
    for field, got in ("tables", lambda self: ()), ("tables", ([],)), ("per_item", "price"):
        wrong = blocks.block(type("Wrong", (blocks.Block,), {field: got}))
        refused(ValueError, "Wrong: expected attributes or properties `tables`, .*`per_item`", demo.config, blocks=(wrong(),))
    for field in "block", "widths", "name", "revision":
        own = type("Own", (blocks.Block,), {"__annotations__": {field: int}})
        refused(ValueError, rf"Own: expected no field .*, got \['{field}'\]", blocks.block, own)
    refused(ValueError, "Own.revision: expected a whole number", blocks.block, type("Own", (blocks.Block,), {"revision": "1"}))
    own_init = type("Own", (blocks.Block,), {"__init__": lambda self, width: None})
    refused(ValueError, "Own: expected fields such as `width: int = 4`, got its own `__init__`", blocks.block, own_init)
    refused(TypeError, "no `@dataclass`", blocks.block, dataclasses.make_dataclass("Own", (), bases=(blocks.Block,)))
    for add in (blocks.block, heads.head):
        refused(TypeError, "Loose: expected a subclass of one of .*Block|Head.*, got", add, type("Loose", (), {}))
    refused(TypeError, "Loose: .* returns nnx.bridge.to_linen", heads.head, type("Loose", (nnx.Module,), {}))
    untyped = blocks.block(type("Untyped", (blocks.Block,), {"__annotations__": {"sizes": object}}))
    refused(ValueError, "Untyped.sizes: expected a number, .* flat tuple of these", demo.config, blocks=(untyped(np.ones(3)),))


def test_what_a_part_gives_is_refused_by_its_name(monkeypatch):
    def scored():
        model, params = demo.build(**demo.SMALL | dict(head=heads.Mlp((3,)), blocks=(blocks.Bea(2), blocks.ItemOffset())))
        return model.joint(params, demo.user(model.config), demo.items(2))

    ones, listed = jnp.ones(1), [jnp.ones(1)]
    unlike_files = (
        (r"\['float32\[1\]'\]", listed), ("None", None), ("{'table': 1.0}", {"table": 1.0}), ("{'w': {}}", {"w": {}}),
        ("{0: 'fl", {0: ones}), ("{'k': {'a/w': 'fl", {"k": {"a/w": ones}}), (r"{'w': \['float32", {"w": listed}),
        *((f"{{'w': '{np.asarray(at).dtype}", {"w": np.asarray(at)}) for at in (2**40, 0.5, 1j, "a")),
        ("{'w': 'key", {"w": jax.random.key(0)}), ("{'w': '>f4", {"w": np.zeros(1, ">f4")}),
    )  # fmt: skip
    whole = {"tower": dict.fromkeys(("user", "item", "product"), jnp.ones((4, 3))), "bea": {"read": jnp.ones((4, 3))}}
    left_out = whole | {"tower": dict.fromkeys(("user", "item"), jnp.ones((4, 3)))}
    for part, function, given, error, message in (
        (heads.Mlp, "init", {"direct": jnp.zeros(1)}, ValueError, "Mlp: expected no parameter 'direct', which the weights"),
        *((part, function, made, TypeError, rf"{name}.{function}: expected nested dicts .*, none empty, .*, got {got}")
          for part, function, name in ((heads.Mlp, "init", "head Mlp"), (blocks.Bea, "init", "bea"), (blocks.Bea, "fit", "bea"))
          for got, made in unlike_files),
        (blocks.Bea, "init", {"w": jnp.arange(2)}, TypeError, "bea.init: .* of float32, bfloat16, none .*'int32"),
        *((blocks.ItemOffset, "fit", fitted, ValueError, f"fitted: expected 50 rows in item_offset/table, row 0 .*{got}")
          for got, fitted in (("none; there are .*/rows", {"rows": jnp.zeros(50)}), ("shape .5", {"table": jnp.zeros(5)}))),
        *((blocks.Bea, "fit", {"t": jnp.array([1, at])}, ValueError, f"fitted bea/t: expected finite values, got {at} at .*1")
          for at in (np.nan, -np.inf)),
        *((blocks.Bea, half, 1.0, TypeError, f"bea.{half}: expected a pytree .*, got 1.0") for half in ("user", "item")),
        (blocks.Bea, "item", {"a/b": ones}, TypeError, 'bea.item: .* of arrays .*, keys text without "/", got {.a/b'),
        *((blocks.Bea, "widths", w, ValueError, "bea.widths: expected a dict of")
          for w in (3, [3], {"f": 3.0}, {"f": -1}, {1: 3}, {"a/b": 3})),
        (heads.Mlp, "first_layer", {}, TypeError, "head Mlp.first_layer: expected a FirstLayer or None, got dict"),
        *((heads.Mlp, "first_layer", heads.FirstLayer(listed), ValueError, "in dicts of .*tower/user': 4.* bias")
          for listed in (ones, {"tower": {"item": jnp.ones((4, 3))}})),
        *((heads.Mlp, "first_layer", heads.FirstLayer(*first), ValueError, "first_layer: expected kernels .width, H. in dicts")
          for first in (({},), (left_out,), ({"bea": ones},), (whole, jnp.ones(1)), (whole, 1.0), (whole, 0),
                        *((whole | {"bea": {"read": jnp.ones(shape)}},) for shape in ((4,), (4, 1), (3, 3))))),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(part, function, lambda *_, given=given, **__: given)
            refused(error, message, scored)


def test_what_is_trained_starts_as_float32_under_64_bits():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for name in ("aif", "paper", "two_tower"):
            model = aif.build(getattr(aif.presets, name)(demo.schema()))
            params = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), demo.catalogue()))
            trained = {path: leaf for path, leaf in leaves_by_path(params).items() if not path.startswith("fitted")}
            assert {path for path, leaf in trained.items() if leaf.dtype != jnp.float32} == set()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("bits", [32, 64, 96, 256])
def test_signatures_and_signs_match_the_reference(rng, bits):
    flags, axes = rng.random((5, bits)) < 0.5, jnp.eye(bits)
    packed = signatures.sign(axes, jnp.where(flags, 1.0, -1.0))
    assert packed.dtype == jnp.uint32
    np.testing.assert_array_equal(packed, reference.pack(flags))
    assert signatures.signs(packed[:0]).shape == (0, bits) and signatures.sign(axes, axes[:0]).shape == (0, bits // 32)
    np.testing.assert_array_equal(signatures.signs(packed), reference.signs(packed))


def test_fitted_bits_are_balanced_and_follow_the_data(rng):
    content = jnp.asarray(rng.normal(size=(2000, 6)) @ rng.normal(size=(6, 40)), jnp.float32)  # six directions
    fitted = signatures.fit_projection(np.asarray(content), bits=32, seed=1)
    assert np.all(np.abs(np.asarray(signatures.signs(signatures.sign(fitted, content)) > 0).mean(0) - 0.5) < 0.1)
    unit = content / jnp.linalg.norm(content, axis=1, keepdims=True)
    cosine = (unit[:100] @ unit[100:300].T).ravel()

    def correlation(projection):
        signature = signatures.sign(projection, content)
        unequal = jax.lax.population_count(signature[:100, None] ^ signature[None, 100:300]).sum(-1)  # bits of every pair
        return np.corrcoef(cosine, -np.ravel(unequal).astype(int))[0, 1]

    assert correlation(fitted) > correlation(jnp.asarray(rng.normal(size=(40, 32)), jnp.float32)) + 0.05


def test_fit_is_reproducible_and_leaves_unknown_items_out(rng):
    content = rng.normal(size=(50, 8))
    one = signatures.fit_projection(content, bits=32, seed=3)
    assert one.shape == (8, 32) and one.dtype == jnp.float32
    np.testing.assert_array_equal(signatures.fit_projection(np.concatenate([np.zeros((5, 8)), content]), bits=32, seed=3), one)
    assert not np.array_equal(signatures.fit_projection(content, bits=32, seed=4), one)


@pytest.fixture(scope="module")
def model():
    return demo.build(blocks=(blocks.LshDin(bits=32), blocks.SimTier(bits=64, tiers=4)))


@pytest.fixture(scope="module")
def signature_of(model):
    """Items -> their signatures of 32 bits, by the item function."""
    rows = jax.jit(jax.vmap(model[0].item, (None, 0)))
    return lambda params, items: np.asarray(rows(params, items).fitted["signatures_32"])


def test_the_table_holds_the_signature_of_every_row(model):
    """Row 0, the unknown item, is zeros; each number of bits has its own table, shared by all blocks that read it."""
    both, params = model
    assert [table.name for table in both.config.tables] == ["signatures_32", "signatures_64"]
    for bits in (32, 64):
        table = params["fitted"][f"signatures_{bits}"]["table"]
        assert table.dtype == jnp.uint32 and table.shape == (50, bits // 32) and not table[0].any() and table[1:].all()
    assert demo.config(blocks=(blocks.LshDin(bits=64), blocks.SimTier(bits=64))).tables == (blocks.Signatures(64),)


def test_an_item_in_the_table_reads_the_table_whatever_its_content(model, signature_of):
    """A content that changed after the fit counts from the next `fit_tables` on."""
    both, params = model
    catalogue, ids = demo.catalogue(), np.array([3, 7])
    items = catalogue.features(ids)
    changed = dataclasses.replace(items, content=-items.content)
    table = params["fitted"]["signatures_32"]["table"]
    np.testing.assert_array_equal(signature_of(params, changed), table[ids])
    content = catalogue.items.content.copy()
    content[ids] *= -1
    moved = dataclasses.replace(catalogue, items=dataclasses.replace(catalogue.items, content=content))
    again = params | {"fitted": aif.fit_tables(both.config, moved)}
    refitted = again["fitted"]["signatures_32"]
    np.testing.assert_array_equal(signature_of(again, changed), signed(-items.content, refitted))
    assert not np.array_equal(refitted["table"][ids], table[ids])


def test_an_item_newer_than_the_fit_is_signed_from_its_content(model, signature_of):
    _, params = model
    items = demo.items(6)
    unknown = dataclasses.replace(items, ids=items.ids | {"item": np.zeros(6, np.int32)})
    np.testing.assert_array_equal(signature_of(params, unknown), signature_of(params, items))
    fresh = dataclasses.replace(unknown, content=np.random.default_rng(5).normal(size=(6, 12)).astype(np.float32))
    np.testing.assert_array_equal(signature_of(params, fresh), signed(fresh.content, params["fitted"]["signatures_32"]))


def test_without_content_a_row_reads_the_table():
    """Training leaves content out where no tower reads it; an unknown item then has row 0."""
    model, params = demo.build(blocks=(blocks.LshDin(bits=32),), item_content=False)
    assert not model.config.reads_content
    items = demo.catalogue().features(np.array([4, 0]), content=False)
    assert items.content is None
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(params, items)
    np.testing.assert_array_equal(rows.fitted["signatures_32"], params["fitted"]["signatures_32"]["table"][np.array([4, 0])])


def test_places_are_those_of_the_request_in_the_log(tmp_path):
    lines = ["1,3,10,1", "1,1,10,2", "2,2,10,4", "1,2,20,", "2,1,30,0", "1,2,10,7"]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,time,place", *lines]) + "\n")
    items = {"item": [1, 2, 3], "category": [1] * 3}
    columns = aif.Columns(position="place")
    data = aif.read(tmp_path / "events.csv", items=items, columns=columns, progress=False)
    one, two, three = data.items.encode([1, 2, 3])
    at = {(user, time): n for n, (user, time) in enumerate(zip(data.log.user, data.log.time, strict=True))}
    first, later, other = at[1, 10], at[1, 20], at[2, 10]  # any event of a request
    rows = np.array([[three, one, two, 0], [two, one, three, 0], [one, two, 0, three]], np.int32)
    places = data.display_positions_of([first, later, other], rows)
    assert places.tolist() == [[1, 2, 7, 0], [0, 0, 0, 0], [0, 4, 0, 0]] and places.dtype == np.int32
    for more, found in ((), None), ((PositionBias(),), places.tolist()):  # a batch of training has them for the block
        config = demo.config(schema=data.schema, blocks=more)
        batch = make_batch(data, np.array([first, later, other]), rows, np.zeros(rows.shape, np.float32), config=config)
        assert (None if batch.display_positions is None else batch.display_positions.tolist()) == found
    assert columns.of("events", position=False) == aif.Columns().of("events")  # serving needs none
    plain = aif.read(tmp_path / "events.csv", items=items, columns=aif.Columns(), progress=False)
    assert plain.display_positions is None and "position" not in aif.Columns().to_json()
    given = dict(dataset=plain, positions=[first], source=None, batch_size=1, epochs=1)
    message = "expected the places of shown items, for a `training_logit`, got none; name Columns.position"
    refused(ValueError, message, Pipeline, config=demo.config(schema=plain.schema, blocks=(PositionBias(),)), **given)
    message = "Dataset.display_positions: expected those of shown items, got None; give Columns"
    refused(ValueError, message, plain.display_positions_of, [first], rows[:1])
    fewer = forget_ids(data, 20)  # item 3 goes, whose place stays with the event
    assert fewer.display_positions.tolist() == data.display_positions.tolist() and len(fewer.items) == len(data.items) - 1


@pytest.mark.parametrize("objectives", [(), ("click", "like")])
def test_the_bias_is_added_in_training_alone(objectives, monkeypatch):
    part = PositionBias(positions=3)
    changes = dict(blocks=(blocks.DotProduct(), part), head=aif.heads.Mlp((4,)), objectives=objectives)
    model, params = demo.build(**demo.SMALL | changes)
    bias = np.linspace(-1, -2, 2 * max(1, len(objectives))).astype(np.float32).reshape(2, *(objectives and (2,)))
    moved = params | {"blocks": params["blocks"] | {part.name: {"bias": jnp.asarray(bias)}}}
    batch = batch_of(model.config, seed=1)
    served, expected = (next(predict(model, of, [batch])) for of in (moved, params))
    np.testing.assert_array_equal(served, expected)
    places = np.array([[1, 2], [2, 3], [3, 9], [0, 1], [0, 0], [1, 1]], np.int32)
    added = np.concatenate([np.zeros_like(bias), bias])[np.array([[0, 2], [2, 3], [3, 3], [0, 0], [0, 0], [0, 0]])]
    np.testing.assert_array_equal(part.training_logit(moved["blocks"][part.name], places), added)

    squared = losses.term(losses.entries)(lambda scores, labels, where, log_q: jnp.square(scores))
    loss = (lambda scores, labels, *, where: jnp.square(scores).mean()) if objectives else squared
    batch = dataclasses.replace(batch, display_positions=places)
    monkeypatch.setattr("aif_jax.train.step.part_size", lambda *given: 2)
    state, figures = train.make_step(model, optax.sgd(0.1), loss=loss)(train.init_state(moved, optax.sgd(0.1)), batch)
    assert (np.asarray(state.params["blocks"][part.name]["bias"]) > bias).all()  # a squared score falls
    assert float(figures["loss"]) == pytest.approx(np.square(expected + added).mean(), rel=1e-5)


@blocks.block
class Shift(blocks.Block):
    """Adds in training what it has fitted; it has no trained parameters."""

    def fit(self, items, config, *, seed):
        return {"shift": jnp.float32(3)}

    def training_logit(self, params, display_positions):
        return jnp.broadcast_to(params["shift"], display_positions.shape)


@aif.heads.head
class Linear(aif.heads.Head):
    """Its parameters are its first layer, by the names of that."""

    def init(self, key, widths, outputs):
        return aif.heads.Mlp((outputs,)).init(key, widths, outputs)["first"]

    def first_layer(self, params):
        return aif.heads.FirstLayer(**params)

    def apply(self, params, features):
        return features


@pytest.mark.parametrize("objectives", [(), ("click", "like")])
def test_blocks_and_heads_get_the_parameters_that_they_made(objectives):
    model, params = demo.build(**demo.SMALL | dict(blocks=(blocks.DotProduct(), Shift()), head=Linear(), objectives=objectives))
    batch = batch_of(model.config, seed=1)
    scores = next(predict(model, params, [batch]))
    batch = dataclasses.replace(batch, display_positions=np.zeros(batch.where.shape, np.int32))
    step = train.make_step(model, optax.sgd(0.1), loss=lambda scores, labels, *, where: jnp.square(scores).mean())
    state = train.init_state(params, optax.sgd(0.1))
    if objectives:  # a logit for each, of which the block knows nothing
        return refused(ValueError, r"shift.training_logit: expected shape \(6, 2, 2\), got \(6, 2\)", step, state, batch)
    _, figures = step(state, batch)
    assert float(figures["loss"]) == pytest.approx(np.square(scores + 3).mean(), rel=1e-5)
