"""Heads: the MLP split by block equals one over the concatenated features; any other head gets these features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks, heads, interaction, layers
from aif_jax.blocks import HeadInputs
from tests import demo, lanes
from tests.refusals import refused

WIDTHS = {"tower": {"user": 4, "item": 4, "product": 4}, "tiers": {"tiers": 3}, "silent": {}}
HIDDEN = (6, 5)


def concatenated(params, inputs):
    """The same head as one MLP over concatenated inputs [C, width] each, by block and name -> logits [C]."""
    kernel = jnp.concatenate([params["first"]["kernels"][block][name] for block in inputs for name in inputs[block]])
    whole = jnp.concatenate([value for named in inputs.values() for value in named.values()], -1)
    return layers.mlp(params["rest"], jax.nn.relu(whole @ kernel + params["first"]["bias"][None, :]))[..., 0]


def test_parameters_have_one_kernel_for_each_input():
    made = heads.Mlp(HIDDEN).init(jax.random.key(0), WIDTHS, 1)
    shapes = {block: {name: kernel.shape for name, kernel in own.items()} for block, own in made["first"]["kernels"].items()}
    assert shapes == {"tower": dict.fromkeys(("user", "item", "product"), (4, 6)), "tiers": {"tiers": (3, 6)}}
    assert made["first"]["bias"].shape == (6,)
    assert [made["rest"][f"layer_{i}"]["kernel"].shape for i in range(2)] == [(6, 5), (5, 1)]
    assert heads.Mlp(HIDDEN).first_layer(made) == heads.FirstLayer(made["first"]["kernels"], made["first"]["bias"])
    wide = heads.Mlp((60,)).init(jax.random.key(0), {"a": {"x": 1000}, "b": {"y": 300, "z": 200}}, 1)["first"]["kernels"]
    spread = np.concatenate([kernel.ravel() for kernel in jax.tree.leaves(wide)])
    np.testing.assert_allclose(spread.std(), 1500**-0.5, rtol=0.05)  # by the whole fan-in, not by the input's


def logits(params, inputs, head):
    """What a head makes of the inputs of some blocks, from item vectors [2, 1]."""
    config, given = demo.config(head=head, blocks=(blocks.DotProduct(),)), {str(place): one for place, one in enumerate(inputs)}
    return interaction.logits(params, given, jnp.array([[3.0], [4.0]]), config=config)


def test_the_sum_of_logits_has_a_bias_alone():
    made = heads.LogitSum().init(jax.random.key(0), {"tower": {"user": 4}}, 1)
    refused(ValueError, "head: expected a Flax module without a name, got 'total'", demo.config, head=FlaxTotal(name="total"))
    assert made.keys() == {"bias"} and made["bias"].shape == () and heads.LogitSum().first_layer(made).kernels == {}
    terms = [HeadInputs(), HeadInputs(logit=jnp.array([1.0, 2.0])), HeadInputs(logit=jnp.array([10.0, 20.0]))]
    assert logits({"bias": jnp.float32(0.5)}, terms, heads.LogitSum()).tolist() == [11.5, 22.5]


def test_every_kind_of_term_enters_by_hand():
    """relu(bias + once + item + pairs + rest), then the layer above it, then what is added to the logit."""
    rest = {"layer_0": {"kernel": jnp.array([[2.0], [1.0]]), "bias": jnp.array([0.5])}}
    own = {"first": {"kernels": {}, "bias": jnp.array([1.0, -100.0])}, "rest": rest}
    terms = [
        HeadInputs(once=jnp.array([10.0, 0.0]), item=jnp.eye(1, 2)),
        HeadInputs(pairs=((jnp.array([[1.0], [2.0]]), jnp.array([[100.0, 0.0]])),)),
        HeadInputs(rest=jnp.array([[1000.0, 0.0], [0.0, 103.0]])),
        HeadInputs(logit=jnp.array([0.25, 0.0])),
        HeadInputs(),
    ]
    assert logits(own, terms, heads.Mlp(HIDDEN)).tolist() == [2 * 1114 + 0.75, 2 * 215 + 3 + 0.5]


MODELS = demo.VARIANTS | {"one hidden layer": {"head": heads.Mlp((16,)), "blocks": demo.BLOCKS[::3]}}
WITH_LAYERS = [name for name in MODELS if MODELS[name].get("head") != heads.LogitSum()]


@pytest.mark.parametrize("name", lanes.but_for(("every block", "matching"), WITH_LAYERS))
def test_interaction_equals_the_concatenated_head(name):
    model, made = demo.build(**MODELS[name])
    config, features = model.config, demo.user(model.config)

    def forms(made, state, items):
        rows, candidates = jax.vmap(model.item, (None, 0))(made, items), items.ids["item"].shape[0]
        inputs, logit = {}, jnp.zeros(candidates)
        user = jnp.broadcast_to(state.vector, (candidates, config.width))
        inputs["tower"] = {"user": user, "item": rows.vector, "product": user * rows.vector}
        for block in config.blocks:
            own = made["blocks"].get(block.name, {}) | made["fitted"].get(block.name, {})
            widths = block.widths(config)
            terms = block.score(own, state, rows, heads.identity(widths))
            logit += jnp.broadcast_to(terms.logit, (candidates,))
            plain = heads.joined([terms], rows.vector)
            ends = np.cumsum([0, *widths.values()])
            inputs[block.name] = {name: plain[:, a:b] for name, a, b in zip(widths, ends, ends[1:], strict=False)}
        shapes = {block: {name: value.shape[1] for name, value in named.items()} for block, named in inputs.items()}
        assert shapes == config.head_features
        return model.interaction(made, state, rows), concatenated(made["head"], inputs) + logit

    @jax.jit
    def run(made, *candidates):
        state = model.user(made, features)
        return [forms(made, state, items) for items in candidates]

    for got, expected in run(made, demo.items(1), demo.items(30)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert np.all(np.isfinite(expected))


@heads.head
class Total(heads.Head):
    def apply(self, params, features):
        return features.sum(-1, keepdims=True)


@heads.head
class FlaxTotal(nn.Module):
    def __call__(self, features):
        assert features.ndim == 1  # of one pair, so that it cannot mix candidates, which serving pads
        return features.sum(-1, keepdims=True)


FIRST = nn.Sequential([lambda inputs: inputs[..., :4]])  # a tower
WITHOUT = {"head": {"head": Total()}, "Flax head": {"head": FlaxTotal()}, "towers": {}}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_parameters_is_the_same_after_a_round_trip(name, tmp_path):
    config = demo.config(**demo.SMALL | WITHOUT[name], item_content=False)
    model = aif.build(config) if WITHOUT[name] else aif.assemble(config, user=FIRST, item=FIRST)
    params = demo.init(model)
    aif.checkpoint.save(tmp_path / "model", aif.Trained(model, params))
    opened = aif.open(tmp_path / "model", model=model)
    expected, got = (jax.jit(model.joint)(of, demo.user(model.config), demo.items(2)) for of in (params, opened.params))
    np.testing.assert_array_equal(got, expected)


def test_logits_are_float32_and_one_for_each_candidate_and_objective(monkeypatch):
    model, params = demo.build(**demo.SMALL | {"head": Total(), "blocks": (blocks.Bea(2),)})
    given = params, demo.user(model.config), demo.items(2)
    monkeypatch.setattr(Total, "apply", lambda self, params, features: features[:, :1].astype(jnp.bfloat16))
    assert model.joint(*given).dtype == jnp.float32
    for made in np.ones((1, 1)), np.ones((2, 2)), None:
        monkeypatch.setattr(Total, "apply", lambda *_, made=made: made)
        refused(ValueError, r"head Total: expected logits of shape \(2, 1\), got \((\d, \d)?\)", model.joint, *given)


def test_what_a_block_gives_is_checked_by_shape(monkeypatch):
    """Also where a sum would broadcast it to all units of the head, or to all candidates."""
    left, right, full = np.ones((2, 8)), np.ones((8, 6)), {"rest": np.ones((2, 6))}
    for given, message in (
        *((given, r"features times the kernels of \['tiers'\], got none; give") for given in ({}, {"logit": np.ones(2)})),
        ({"once": np.ones((2, 6))}, r"once: expected shape \(6,\) for kernels of \['tiers'\], got \(2, 6\)"),
        ({"item": np.ones((2, 6))}, "item: expected shape .4, 6"), ({"rest": np.ones((2, 1))}, "rest: expected shape .2, 6"),
        ({"rest": np.ones((1, 6))}, "rest: expected"), ({"rest": np.ones(6)}, "rest: expected"), ({"once": 1.0}, "once: "),
        *(({"pairs": one}, r"pairs: expected a tuple of pairs, ..left, right.,. for") for one in (None, 0.0, (left, right))),
        ({"pairs": ((left[0], right),)}, "pairs: .* got .*8,"),
        ({"pairs": ((left[:, :4], right),)}, r"pairs: expected shape \(\(\(2, 8\), \(8, 6\)\),\) .* got \(\(\(2, 4\)"),
        (full | {"logit": np.ones((2, 1))}, r"logit: expected shape \(2,\), got \(2, 1\)"),
        ({"offset": np.ones(6)}, "offset:"), (full | {"logit": np.ones(1)}, "logit:"), (full, r"none of \['tiers'\]; give it"),
    ):  # fmt: skip
        model, params = demo.build(**demo.SMALL | {"head": heads.Mlp(HIDDEN), "blocks": (blocks.SimTier(bits=32),)})
        monkeypatch.setattr(blocks.SimTier, "score", lambda *_, given=given: HeadInputs(**given))
        refused(ValueError, f"sim_tier.score.*{message}", model.joint, params, demo.user(model.config), demo.items(2))
    monkeypatch.setattr(blocks.SimTier, "widths", lambda *_: {})
    model, params = demo.build(**demo.SMALL | {"blocks": (blocks.SimTier(bits=32),)})
    refused(ValueError, "no feature; declare it in `widths`", model.joint, params, demo.user(model.config), demo.items(2))


@pytest.mark.parametrize("candidates", [3, 40])
def test_a_head_without_kernels_gets_the_features_next_to_each_other(candidates):
    @heads.head
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, features):
            hidden = nn.relu(nn.Dense(16, name="first")(features))
            return nn.Dense(1, name="last")(nn.relu(nn.Dense(8, name="second")(hidden)))

    split, params = demo.build(**demo.VARIANTS["matching"])
    plain = aif.build(split.config.replace(head=Plain()))
    first, rest = params["head"]["first"], params["head"]["rest"]
    kernel = jnp.concatenate([first["kernels"][b][n] for b, named in split.config.head_features.items() for n in named])
    stacked = {"first": {"kernel": kernel, "bias": first["bias"]}, "second": rest["layer_0"], "last": rest["layer_1"]}
    features, items = demo.user(split.config), demo.items(candidates)
    expected = jax.jit(split.joint)(params, features, items)
    got = jax.jit(plain.joint)(params | {"head": stacked}, features, items)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
