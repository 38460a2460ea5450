"""What AIF approximates: attention against the formulas, pair by pair."""

import jax
import numpy as np

from aif_jax import layers
from aif_jax.blocks import CrossAttention, TargetAttention
from tests import demo
from tests.blocks import parts
from tests.reference import bridge


def test_every_candidate_attends_over_the_whole_history():
    """Inputs of both attention blocks for 5 candidates; target attention adds the mean."""
    blocks = (CrossAttention(), TargetAttention())
    model, params = demo.build(blocks=blocks)
    config, features, items = model.config, demo.user(model.config), demo.items(5)

    @jax.jit
    def run(params):
        embedded = layers.embed_behaviours(params, config.schema, features.history)
        sequence = layers.dense(params["user"]["sequence"], embedded[:6] + params["user"]["position"])
        state, rows = model.user(params, features), jax.vmap(model.item, (None, 0))(params, items)
        query = {b.name: layers.dense(params["blocks"][b.name]["query"], rows.vector) for b in blocks}
        inputs = {b.name: parts.first_layer(b.score({}, state, rows, parts.identity(b, config))) for b in blocks}
        return {"cross_attention": sequence, "target_attention": embedded}, query, inputs

    sequence, query, inputs = jax.tree.map(np.asarray, run(params))
    mask = features.history.mask
    for name, length in (("cross_attention", 6), ("target_attention", 24)):
        expected = [bridge.attend(q, sequence[name][:length], mask[:length]) for q in query[name]]
        np.testing.assert_allclose(inputs[name][:, :8], expected, rtol=1e-4, atol=1e-5)
    mean = sequence["target_attention"][mask].mean(0)
    np.testing.assert_allclose(inputs["target_attention"][:, 8:], np.tile(mean, (5, 1)), rtol=1e-4, atol=1e-6)
    assert inputs["cross_attention"].shape == (5, 8)
