"""DIN on LSH in a model: what its halves hold, from raw content to the head. Its sums are in test_linear_memory.py."""

import jax
import numpy as np

from aif_jax import layers
from aif_jax.blocks import LshDin
from tests import demo
from tests.blocks import parts
from tests.reference import lsh, memory


def test_head_inputs_are_those_of_the_definition():
    """Signatures from content one product at a time, every candidate compared with every behaviour."""
    block = LshDin(bits=32)
    model, params = demo.build(blocks=(block,))
    features, items = demo.user(model.config, events=15), demo.items(4)
    assert params["blocks"] == {} and set(params["fitted"]) == {"fields", "signatures_32"}  # a shared table, nothing trained
    assert params["fitted"]["signatures_32"]["table"].shape == (50, 1)

    inputs = np.asarray(jax.jit(lambda params: parts.head_inputs(block, model, params, features, items)[-1])(params))
    embedded = np.asarray(layers.embed_behaviours(params, model.config.schema, features.history))
    words = lsh.signed(demo.catalogue().content, params["fitted"]["signatures_32"])
    mask = np.asarray(features.history.mask)
    read = memory.din(words[items.ids["item"]], words[features.history.item], embedded, mask)
    mean = memory.mean(embedded, mask)
    np.testing.assert_allclose(inputs[:, :8], np.tile(mean, (4, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(inputs[:, 8:] / (2 * 32**0.5) + mean / 2, read, rtol=1e-4, atol=1e-5)
