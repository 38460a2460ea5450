"""LSH signatures: bit layout, similarity, fitted matrices and codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import lsh
from tests.reference import lsh as reference


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def words(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def test_bit_order_by_hand():
    bits = np.zeros(64, bool)
    bits[[0, 31, 33]] = True
    assert lsh.pack(jnp.asarray(bits)).tolist() == [2**31 + 1, 2]
    assert lsh.to_bytes(np.array([2**31 + 1, 2], np.uint32)).tolist() == [1, 0, 0, 128, 2, 0, 0, 0]


@pytest.mark.parametrize("bits", [32, 64, 96, 256])
def test_pack_and_unpack_match_the_reference(rng, bits):
    flags = rng.random((5, bits)) < 0.5
    packed = lsh.pack(jnp.asarray(flags))
    assert packed.dtype == jnp.uint32
    assert packed.tolist() == [reference.pack(row) for row in flags]
    np.testing.assert_array_equal(lsh.unpack(packed), flags)
    np.testing.assert_array_equal(lsh.signs(packed), [reference.signs(row) for row in packed])


def test_byte_layout_is_that_of_numpy_and_faiss(rng):
    flags = rng.random((3, 4, 96)) < 0.5
    packed = np.asarray(lsh.pack(jnp.asarray(flags)))
    octets = lsh.to_bytes(packed)
    np.testing.assert_array_equal(octets, np.packbits(flags, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(lsh.from_bytes(octets), packed)


def test_bytes_of_a_strided_array(rng):
    packed = words(rng, 6, 4)[::2, ::2]
    np.testing.assert_array_equal(lsh.from_bytes(lsh.to_bytes(packed)), packed)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_hamming_and_similarity_match_the_reference(rng, count):
    a, b = words(rng, 4, count), words(rng, 7, count)
    expected = np.array([[reference.differing(x, y) for y in b] for x in a])
    np.testing.assert_array_equal(jax.jit(lsh.hamming)(a[:, None], b[None]), expected)
    np.testing.assert_allclose(lsh.similarity(a, b), 1 - expected / (32 * count), atol=1e-6)
    many = jax.vmap(lsh.similarity, (0, None))(np.stack([a, a[::-1]]), b)
    np.testing.assert_array_equal(many[1], many[0][::-1])


def test_similarity_of_equal_and_opposite_signatures(rng):
    a = words(rng, 3, 2)
    assert np.diag(lsh.similarity(a, a)).tolist() == [1, 1, 1]
    assert np.diag(lsh.similarity(a, ~a)).tolist() == [0, 0, 0]


def test_similarity_is_linear_in_the_signs(rng):
    a, b = words(rng, 5, 2), words(rng, 6, 2)
    np.testing.assert_allclose(lsh.similarity(a, b), 0.5 + lsh.signs(a) @ lsh.signs(b).T / 128, atol=1e-6)


def test_sign_matches_the_reference_alone_in_batches_and_compiled(rng):
    frozen = {
        "projection": rng.normal(size=(12, 64)).astype(np.float32),
        "offset": rng.normal(size=64).astype(np.float32),
    }
    content = rng.normal(size=(9, 12)).astype(np.float32)
    expected = [reference.pack(row) for row in reference.sign(content, **frozen)]
    assert lsh.sign(frozen, content).tolist() == expected
    assert jax.jit(jax.vmap(lsh.sign, (None, 0)))(frozen, content).tolist() == expected


def test_fitted_bits_are_balanced_and_follow_the_data(rng):
    content = rng.normal(size=(2000, 6)) @ rng.normal(size=(6, 40)) + 3.0  # far from the origin, six directions
    fitted = lsh.fit_projection(content, bits=32, seed=1, centre=True)
    np.testing.assert_allclose(fitted["offset"], content.mean(0) @ np.asarray(fitted["projection"]), rtol=1e-3, atol=1e-3)
    share = np.asarray(lsh.unpack(lsh.sign(fitted, jnp.asarray(content, jnp.float32)))).mean(0)
    assert np.all(np.abs(share - 0.5) < 0.1)

    unit = content - content.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = (unit[:100] @ unit[100:300].T).ravel()

    def correlation(frozen):
        signature = lsh.sign(frozen, jnp.asarray(content, jnp.float32))
        return np.corrcoef(cosine, np.asarray(lsh.similarity(signature[:100], signature[100:300])).ravel())[0, 1]

    random = lsh.random_projection(jax.random.key(0), content=40, bits=32)
    assert correlation(fitted) > correlation(random) + 0.05


def test_iterations_bring_rows_nearer_to_corners_and_centre_sets_the_offset(rng):
    """ITQ turns the rotation so that |sign(x) - x| shrinks; without centring there is no offset."""
    content = rng.normal(size=(400, 32)) * np.linspace(0.2, 3, 32) + 1.0

    def gap(fitted):
        x = content @ np.asarray(fitted["projection"]) - np.asarray(fitted["offset"])
        x /= np.abs(x).mean()
        return ((np.sign(x) - x) ** 2).mean()

    for centre in (True, False):
        random, turned = (lsh.fit_projection(content, bits=32, iterations=n, centre=centre) for n in (0, 20))
        assert gap(turned) < 0.97 * gap(random)
        assert np.any(np.asarray(turned["offset"]) != 0) == centre


def test_fit_is_reproducible_and_leaves_unknown_items_out(rng):
    content = rng.normal(size=(50, 8))
    one = lsh.fit_projection(content, bits=32, seed=3, centre=True)
    two = lsh.fit_projection(np.concatenate([np.zeros((5, 8)), content]), bits=32, seed=3, centre=True)
    other = lsh.fit_projection(content, bits=32, seed=4, centre=True)
    for name, shape in {"projection": (8, 32), "offset": (32,)}.items():
        assert one[name].shape == shape and one[name].dtype == jnp.float32
        np.testing.assert_array_equal(one[name], two[name])
        assert not np.array_equal(one[name], other[name])


def test_fit_needs_rows_with_content():
    with pytest.raises(ValueError, match="at least 2 rows with content, got 1"):
        lsh.fit_projection(np.eye(3)[:1], bits=32)


def test_codes_are_the_catalogue_where_they_cover_it(rng):
    signatures = words(rng, 5, 2)
    codes = np.asarray(lsh.fit_codes(np.repeat(signatures, 3, axis=0), codes=8))
    assert codes.shape == (8, 2) and codes.dtype == np.uint32
    assert {tuple(c) for c in codes} == {tuple(s) for s in signatures}


def test_codes_are_bitwise_majorities_of_their_signatures(rng):
    centres = words(rng, 4, 2)
    flips = (rng.random((4, 60, 64)) < 0.05).astype(bool)
    noisy = np.asarray(lsh.pack(lsh.unpack(jnp.asarray(centres))[:, None] ^ flips)).reshape(-1, 2)
    codes = np.asarray(lsh.fit_codes(noisy, codes=4, seed=2, iterations=20))
    nearest = [min(range(4), key=lambda r: (reference.differing(codes[r], s), r)) for s in noisy]
    for r in range(4):
        members = np.array([reference.signs(noisy[i]) for i in range(len(noisy)) if nearest[i] == r])
        votes = members.sum(0)
        decided = votes != 0
        np.testing.assert_array_equal(np.array(reference.signs(codes[r]))[decided], np.sign(votes)[decided])


def test_centres_are_the_catalogue_where_they_cover_it(rng):
    content = rng.normal(size=(5, 8)).astype(np.float32)
    rows = np.concatenate([np.zeros((1, 8)), content, 3 * content])
    centres = lsh.fit_centres(rows, codes=12)
    assert centres.shape == (12, 8) and centres.dtype == np.float32
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    assert np.all((centres @ unit.T).max(1) > 1 - 1e-6) and np.all((centres @ unit.T).max(0) > 1 - 1e-6)
    nearest = lsh.nearest_centre(rows, centres)
    assert nearest.dtype == np.int32 and nearest[0] == -1
    np.testing.assert_allclose(centres[nearest[1:]], np.concatenate([unit, unit]), rtol=1e-5)


def test_centres_are_means_of_their_rows_and_find_planted_clusters(rng):
    planted = np.linalg.qr(rng.normal(size=(10, 10)))[0][:4]
    content = np.repeat(planted, 50, axis=0) + 0.05 * rng.normal(size=(200, 10))
    content *= rng.uniform(0.1, 9, (200, 1))  # length does not count
    centres = lsh.fit_centres(content, codes=4, seed=5)
    assert np.all((planted @ centres.T).max(1) > 0.99)
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    nearest = (unit @ centres.T).argmax(1)
    for r in range(4):
        total = unit[nearest == r].sum(0)
        np.testing.assert_allclose(centres[r], total / np.linalg.norm(total), atol=1e-5)


def test_centres_need_content():
    with pytest.raises(ValueError, match=r"expected rows with content, got \(3, 2\) of zeros"):
        lsh.fit_centres(np.zeros((3, 2)), codes=2)


def test_tiers_between_centres_by_hand():
    """Cosines 1, 0, -1 and 0.6 are similarities 1, 0.5, 0 and 0.8: of four tiers the last, third, first and last."""
    centres = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    made = lsh.centre_tiers(centres, tiers=4)
    assert made.dtype == np.uint8
    assert made[0].tolist() == [3, 2, 0, 3]
    np.testing.assert_array_equal(made, made.T)


def test_codes_by_cosine_need_a_row_for_each_item(rng):
    config = aif.tiny(simtier="codes", codes_by="cosine")
    with pytest.raises(ValueError, match="needs a row for each of the 50 items, got 49"):
        lsh.fit(rng.normal(size=(49, 12)), config)


def test_fit_gives_what_each_config_keeps_fixed(rng):
    content = rng.normal(size=(50, 12)).astype(np.float32)
    assert lsh.fit(content, aif.tiny(memory=(), simtier="off")) == {}
    assert sorted(lsh.fit(content, aif.tiny())) == ["offset", "projection"]
    by_cosine = aif.tiny(simtier="codes", codes_by="cosine", memory=("learned",))
    assert not by_cosine.uses_signatures
    assert sorted(lsh.fit(content, by_cosine)) == ["code_centres", "code_tiers", "item_codes"]
    assert sorted(lsh.fit(content, by_cosine.replace(memory=("lsh",)))) == [
        "code_centres", "code_tiers", "item_codes", "offset", "projection",
    ]  # fmt: skip
    lsh.check_frozen(lsh.random_frozen(jax.random.key(0), by_cosine), by_cosine)
    for config in (by_cosine, aif.tiny(simtier="codes"), aif.tiny(architecture="exact", memory=(), simtier="off")):
        lsh.check_frozen(lsh.fit(content, config), config)
    lsh.check_frozen(lsh.random_frozen(jax.random.key(0), aif.tiny(simtier="codes")), aif.tiny(simtier="codes"))


def test_wrong_content_and_wrong_frozen_parameters_are_named(rng):
    with pytest.raises(ValueError, match=r"expected float \[N, 12\], got shape \(50, 7\)"):
        lsh.fit(rng.normal(size=(50, 7)), aif.tiny())
    frozen = lsh.random_projection(jax.random.key(0), content=12, bits=64)
    with pytest.raises(ValueError, match=r"frozen parameters: expected shapes .*32.*got.*64"):
        lsh.check_frozen(frozen, aif.tiny())
    with pytest.raises(ValueError, match="exact baseline"):
        lsh.random_frozen(jax.random.key(0), aif.tiny(architecture="exact", memory=(), simtier="off"))
