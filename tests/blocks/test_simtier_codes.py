"""SimTier by a codebook: the fitted codes, tiers between them, and the table that candidates read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax.blocks import SimTierCodes
from aif_jax.blocks.simtier_codes import centre_tiers, code_table, fit_centres, nearest_centre, nearest_centres
from tests import demo
from tests.blocks import parts
from tests.reference import simtier as reference


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("tiers", "groups", "length"), [(8, 1, 40), (5, 3, 33), (64, 2, 700), (2, 1, 1)])
def test_codes_are_exact_where_they_cover_the_catalogue(tiers, groups, length):
    """The histogram of the float cosine itself, with behaviours that have no code left out."""
    rng = np.random.default_rng(tiers)
    catalogue = np.concatenate([np.zeros((1, 6)), rng.normal(size=(20, 6))]).astype(np.float32)
    centres = fit_centres(catalogue, codes=24)
    between, item_codes = centre_tiers(centres, tiers=tiers), nearest_centre(catalogue, centres)
    past, group = rng.integers(0, 21, length), rng.integers(0, groups, length).astype(np.int32)
    mask = rng.random(length) < 0.8
    table = jax.jit(code_table, static_argnames=("tiers", "groups"))(
        between, item_codes[past], group, mask, tiers=tiers, groups=groups
    )
    assert table.shape == (24, groups * tiers) and table.dtype == jnp.float32
    counts = reference.cosine_histogram(catalogue[1:], catalogue[past], group, mask & (past > 0), tiers, groups)
    index, weight = jax.jit(jax.vmap(lambda c: nearest_centres(centres, c, count=1, tiers=tiers)))(catalogue[1:])
    assert index.dtype == jnp.int32
    np.testing.assert_allclose(weight, 1.0)
    np.testing.assert_allclose(table[index[:, 0]], np.log1p(counts).reshape(20, -1), rtol=1e-6)


def test_the_table_under_vmap_and_with_nothing_to_count(rng):
    between = rng.integers(0, 4, (7, 7)).astype(np.uint8)
    code, group = rng.integers(-1, 7, (3, 20), dtype=np.int32), rng.integers(0, 2, (3, 20), dtype=np.int32)
    mask = rng.random((3, 20)) < 0.7
    mask[2] = False
    table = jax.jit(jax.vmap(lambda *x: code_table(jnp.asarray(between), *x, tiers=4, groups=2)))(code, group, mask)
    expected = np.zeros((3, 7, 2, 4))
    for b, j in zip(*np.nonzero(mask & (code >= 0)), strict=True):
        expected[b, np.arange(7), group[b, j], between[code[b, j]]] += 1
    np.testing.assert_allclose(table, np.log1p(expected).reshape(3, 7, 8), rtol=1e-6)
    assert not np.any(table[2])


def test_weights_of_several_centres():
    """softmax of the similarity in tiers: cosines 1 and 0 are four of eight tiers apart."""
    centres = jnp.array([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    index, weight = nearest_centres(centres, jnp.array([5.0, 0.0]), count=2, tiers=8)
    assert index.tolist() == [1, 0]
    np.testing.assert_allclose(weight[0] / weight[1], np.exp(4), rtol=1e-5)
    np.testing.assert_allclose(weight.sum(), 1.0, rtol=1e-6)


def test_centres_are_the_catalogue_where_they_cover_it(rng):
    content = rng.normal(size=(5, 8)).astype(np.float32)
    rows = np.concatenate([np.zeros((1, 8)), content, 3 * content])
    centres = fit_centres(rows, codes=12)
    assert centres.shape == (12, 8) and centres.dtype == np.float32
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    assert np.all((centres @ unit.T).max(1) > 1 - 1e-6) and np.all((centres @ unit.T).max(0) > 1 - 1e-6)
    nearest = nearest_centre(rows, centres)
    assert nearest.dtype == np.int32 and nearest[0] == -1
    np.testing.assert_allclose(centres[nearest[1:]], np.concatenate([unit, unit]), rtol=1e-5)


def test_centres_are_means_of_their_rows_and_find_planted_clusters(rng):
    planted = np.linalg.qr(rng.normal(size=(10, 10)))[0][:4]
    content = np.repeat(planted, 50, axis=0) + 0.05 * rng.normal(size=(200, 10))
    content *= rng.uniform(0.1, 9, (200, 1))  # length does not count
    centres = fit_centres(content, codes=4, seed=5)
    assert np.all((planted @ centres.T).max(1) > 0.99)
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    nearest = (unit @ centres.T).argmax(1)
    for r in range(4):
        total = unit[nearest == r].sum(0)
        np.testing.assert_allclose(centres[r], total / np.linalg.norm(total), atol=1e-5)


def test_centres_need_content():
    with pytest.raises(ValueError, match=r"SimTierCodes: expected catalogue rows with content, got \(3, 2\) of zeros"):
        fit_centres(np.zeros((3, 2)), codes=2)


def test_tiers_between_centres_by_hand():
    """Cosines 1, 0, -1 and 0.6 are similarities 1, 0.5, 0 and 0.8: of four tiers the last, third, first and last."""
    centres = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    tiers = centre_tiers(centres, tiers=4)
    assert tiers.dtype == np.uint8
    assert tiers[0].tolist() == [3, 2, 0, 3]
    np.testing.assert_array_equal(tiers, tiers.T)


@pytest.mark.parametrize(("by_action", "windows"), [(False, ()), (True, (2, 6))])
def test_head_inputs_are_those_of_the_definition(by_action, windows):
    """The model's inputs from raw content: codes of a history by item id, candidates weigh the tables of their two codes."""
    block = SimTierCodes(codes=16, nearest=2, tiers=4, by_action=by_action, windows=windows)
    model, params = demo.build(blocks=(block,))
    features, items = demo.user(model.config, events=20), demo.items(7)
    fitted = params["fitted"]["simtier_codes"]

    made = jax.jit(lambda params: parts.head_inputs(block, model, params, features, items))(params)
    table, rows, inputs = jax.tree.map(np.asarray, made)
    row, history, content, centres = (
        rows.blocks[block.name],
        features.history,
        demo.catalogue().content,
        np.asarray(fitted["centres"]),
    )
    unit = content / np.maximum(np.linalg.norm(content, axis=1, keepdims=True), 1e-12)
    code = np.where(np.arange(50) > 0, (unit @ centres.T).argmax(1), -1)
    group = np.asarray(history.action) * by_action
    for end in windows:
        group = group + (np.arange(24) >= end) * (4 if by_action else 1)
    groups = (4 if by_action else 1) * (len(windows) + 1)
    counts = reference.cosine_histogram(centres, centres[code[history.item]], group, history.mask, 4, groups)
    np.testing.assert_allclose(table, np.log1p(counts).reshape(16, -1), rtol=1e-6)
    similarity = (1 + unit[items.ids["item"]] @ centres.T) / 2
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(row["codes"], nearest)
    weights = np.exp(4 * np.take_along_axis(similarity, nearest, 1))
    weights /= weights.sum(1, keepdims=True)
    np.testing.assert_allclose(row["weights"], weights, rtol=1e-5)
    np.testing.assert_allclose(inputs, (weights[..., None] * table[nearest]).sum(1), rtol=1e-5)


def test_what_is_fitted():
    block = SimTierCodes(codes=16, nearest=3, tiers=4)
    fitted = block.fit(demo.catalogue().items, demo.config(), seed=0)
    shapes = {name: (value.shape, value.dtype.name) for name, value in fitted.items()}
    assert shapes == {
        "centres": ((16, 12), "float32"), "between": ((16, 16), "uint8"), "code": ((50,), "int32"),
        "nearest": ((50, 3), "int32"), "weights": ((50, 3), "float32"),
    }  # fmt: skip
    assert fitted["code"][0] == -1  # the unknown item is not counted
    np.testing.assert_array_equal(fitted["nearest"][1:, 0], fitted["code"][1:])
    again, other = (block.fit(demo.catalogue().items, demo.config(), seed=seed) for seed in (0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, fitted, again))
    assert not np.array_equal(fitted["centres"], other["centres"])
