"""Content embeddings: given, clustered."""

import sys

import numpy as np

from experiments.datasets.content import clusters, lookup, unit_rows
from tests.refusals import refused


def test_clusters_find_groups_and_repeat():
    rng = np.random.default_rng(0)
    centre = rng.integers(0, 4, 200)
    points = np.eye(4)[centre] + 0.1 * rng.standard_normal((200, 4))
    found = clusters(points, 4)
    assert found.dtype == np.int32 and len({(a, b) for a, b in zip(centre, found, strict=True)}) == 4
    np.testing.assert_array_equal(found, clusters(points, 4))


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    refused(ImportError, r'needs scikit-learn: pip install "aif_jax\[experiments\]"', clusters, np.eye(3), 2)


def test_unit_rows_and_lookup_by_ids_of_text():
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]])
    assert lookup((np.array(["b", "a"]), np.array([[2.0], [1.0]])), np.array(["a", "b"])).tolist() == [[1], [2]]
