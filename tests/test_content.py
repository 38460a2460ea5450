"""Content embeddings: from text, given, clustered."""

import sys

import numpy as np
import pytest

from experiments.datasets.content import clusters, lookup, text_embedding, unit_rows
from tests.refusals import refused

TEXTS = ["space war robots", "space robots", "love story paris", "a love story", "space love"]


def test_similar_texts_are_near():
    e = text_embedding(TEXTS, width=3)
    assert e.dtype == np.float32 and e.shape == (5, 3)
    similarity = e @ e.T
    assert similarity[0, 1] > 0.9 and similarity[2, 3] > 0.9 and abs(similarity[0, 2]) < 0.1
    assert 0.3 < similarity[4, 1] < 0.9
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-6)
    np.testing.assert_array_equal(text_embedding(TEXTS, width=3, seed=4), text_embedding(TEXTS, width=3, seed=4))


def test_full_width_keeps_all_tfidf_similarities():
    from sklearn.feature_extraction.text import TfidfVectorizer

    e = text_embedding(TEXTS, width=9)
    x = TfidfVectorizer(sublinear_tf=True).fit_transform(TEXTS).toarray()
    np.testing.assert_allclose(e @ e.T, x @ x.T, atol=1e-6)
    assert not e[:, 5:].any()  # five texts span five directions


def test_texts_without_words_are_zeros():
    e = text_embedding(["blue sky", "", "! ?", "red sky"], width=2)
    assert not e[1:3].any() and e[0].any() and e[3].any()
    assert text_embedding(["sky", "", "sky"], width=2).tolist() == [[1, 0], [0, 0], [1, 0]]


def test_wrong_texts_widths_and_counts():
    refused(ValueError, "expected texts with words of two letters or more, got none", text_embedding, ["", "a"])
    refused(ValueError, "expected width of at least 1, got 0", text_embedding, TEXTS, width=0)
    for count in (0, 4):
        refused(ValueError, rf"expected a count from 1 to 3 .items., got {count}", clusters, np.eye(3), count)


def test_clusters_find_groups_and_repeat():
    rng = np.random.default_rng(0)
    centre = rng.integers(0, 4, 200)
    points = np.eye(4)[centre] + 0.1 * rng.standard_normal((200, 4))
    found = clusters(points, 4, seed=1)
    assert found.dtype == np.int32 and len({(a, b) for a, b in zip(centre, found, strict=True)}) == 4
    np.testing.assert_array_equal(found, clusters(points, 4, seed=1))


@pytest.mark.parametrize(("module", "call"), [
    ("sklearn.decomposition", lambda: text_embedding(TEXTS)), ("sklearn.cluster", lambda: clusters(np.eye(3), 2)),
])  # fmt: skip
def test_without_scikit_learn_the_extra_is_named(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    refused(ImportError, r'needs scikit-learn: pip install "aif_jax\[experiments\]"', call)


def test_unit_rows():
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]])


def test_lookup_takes_items_in_their_order_and_leaves_others_out(tmp_path):
    content = (np.array([5, 1, 9]), np.array([[5.0], [1.0], [9.0]]))
    assert lookup(content, np.array([1, 5])).tolist() == [[1], [5]]
    assert lookup((np.array(["b", "a"]), np.array([[2.0], [1.0]])), np.array(["a", "b"])).tolist() == [[1], [2]]
    refused(ValueError, "an embedding for each of 3 items, got none for 1: 7", lookup, content, np.array([1, 5, 7]))
    np.savez(tmp_path / "c.npz", movieId=np.array([3, 4]), embedding=np.eye(2, dtype=np.float16))
    assert lookup(tmp_path / "c.npz", np.array([4])).dtype == np.float32
