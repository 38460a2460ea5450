"""Content signatures: bit layout, similarity, the fitted matrix, and where an item's signature comes from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks
from aif_jax.blocks import signatures
from tests import demo
from tests.reference import lsh as reference
from tests.reference.lsh import signed


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def similarity(a, b):
    """The share of equal bits of every pair: uint32 [C, W], [L, W] -> float32 [C, L]."""
    return 1 - jax.lax.population_count(a[:, None] ^ b[None]).sum(-1) / (signatures.WORD * a.shape[-1])


@pytest.mark.parametrize("bits", [32, 64, 96, 256])
def test_pack_and_unpack_match_the_reference(rng, bits):
    flags = rng.random((5, bits)) < 0.5
    packed = signatures.pack(jnp.asarray(flags))
    assert packed.dtype == jnp.uint32
    assert packed.tolist() == [reference.pack(row) for row in flags]
    np.testing.assert_array_equal(signatures.unpack(packed), flags)
    assert signatures.unpack(packed[:0]).shape == (0, bits) and signatures.pack(jnp.asarray(flags[:0])).shape == (0, bits // 32)
    np.testing.assert_array_equal(signatures.signs(packed), [reference.signs(row) for row in packed])


def test_fitted_bits_are_balanced_and_follow_the_data(rng):
    content = jnp.asarray(rng.normal(size=(2000, 6)) @ rng.normal(size=(6, 40)), jnp.float32)  # six directions
    fitted = signatures.fit_projection(np.asarray(content), bits=32, seed=1)
    share = np.asarray(signatures.unpack(signatures.sign(fitted, content))).mean(0)
    assert np.all(np.abs(share - 0.5) < 0.1)
    unit = content / jnp.linalg.norm(content, axis=1, keepdims=True)
    cosine = (unit[:100] @ unit[100:300].T).ravel()

    def correlation(projection):
        signature = signatures.sign(projection, content)
        return np.corrcoef(cosine, np.asarray(similarity(signature[:100], signature[100:300])).ravel())[0, 1]

    assert correlation(fitted) > correlation(jnp.asarray(rng.normal(size=(40, 32)), jnp.float32)) + 0.05


def test_fit_is_reproducible_and_leaves_unknown_items_out(rng):
    content = rng.normal(size=(50, 8))
    one = signatures.fit_projection(content, bits=32, seed=3)
    assert one.shape == (8, 32) and one.dtype == jnp.float32
    unknown = np.concatenate([np.zeros((5, 8)), content])
    np.testing.assert_array_equal(signatures.fit_projection(unknown, bits=32, seed=3), one)
    assert not np.array_equal(signatures.fit_projection(content, bits=32, seed=4), one)


@pytest.fixture(scope="module")
def model():
    """A model that reads signatures of 32 and of 64 bits, and its parameters."""
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
    shared = demo.config(blocks=(blocks.LshDin(bits=64), blocks.SimTier(bits=64)))
    assert shared.tables == (blocks.Signatures(64),)


def test_an_item_in_the_table_reads_the_table_whatever_its_content(model, signature_of):
    """A content that changed after the fit counts from the next `fit_tables` on."""
    both, params = model
    catalogue, ids = demo.catalogue(), np.array([3, 7])
    items = catalogue.features(ids)
    changed = dataclasses.replace(items, content=-items.content)
    table = params["fitted"]["signatures_32"]["table"]
    np.testing.assert_array_equal(signature_of(params, changed), table[ids])
    content = catalogue.content.copy()
    content[ids] *= -1
    again = params | {"fitted": aif.fit_tables(both.config, dataclasses.replace(catalogue, content=content))}
    refitted = again["fitted"]["signatures_32"]
    np.testing.assert_array_equal(signature_of(again, changed), signed(-items.content, refitted))
    assert not np.array_equal(refitted["table"][ids], table[ids])


def test_an_item_newer_than_the_fit_is_signed_from_its_content(model, signature_of):
    """By the same projection, so that it has the signature that it would have in the table."""
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
