import numpy as np
import pytest

from aif_jax.encoding import hashing
from aif_jax.encoding.vocabulary import Vocabulary


def splitmix64(x: int) -> int:
    """The published finaliser on Python integers."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_rows_by_the_formula():
    salt = splitmix64((5 + 0x9E3779B97F4A7C15) % 2**64)
    expected = [splitmix64((raw + salt) % 2**64) % 999 + 1 for raw in (0, 1, 2**40, -1 % 2**64)]
    assert hashing.hash_ids(np.array([0, 1, 2**40, -1]), 1000, seed=5).tolist() == expected


@pytest.mark.parametrize("ids, size", [(2000, 1000), (5000, 50_001), (20_000, 100_000)])
def test_the_stated_collision_rate_is_the_one_of_simulation(ids, size):
    shares = []
    for seed in range(20):
        _, inverse, counts = np.unique(
            hashing.hash_ids(np.arange(ids) * 7 + 3, size, seed=seed), return_inverse=True, return_counts=True
        )
        shares.append((counts[inverse] > 1).mean())
    error = np.std(shares) / len(shares) ** 0.5
    assert abs(np.mean(shares) - hashing.collision_rate(ids, size)) < 4 * error + 1e-4


def test_small_tables_by_hand():
    assert hashing.collision_rate(1, 10) == 0 and hashing.collision_rate(2, 2) == 1
    assert hashing.collision_rate(2, 5) == pytest.approx(1 / 4)  # the other id falls into the same of four rows
    assert hashing.collision_rate(3, 3) == pytest.approx(3 / 4)  # one of two others


def test_rows_are_even_and_leave_row_0():
    counts = np.bincount(hashing.hash_ids(np.arange(100_000), 101), minlength=101)
    assert counts[0] == 0
    chi_squared = ((counts[1:] - 1000) ** 2 / 1000).sum()
    assert chi_squared < 99 + 5 * (2 * 99) ** 0.5


def test_strings_do_not_depend_on_the_width_of_the_array():
    one, wide = hashing.hash_ids(["ab"], 10**6), hashing.hash_ids(["ab", "a much longer one", "", "ba"], 10**6)
    assert one[0] == wide[0] and len(set(wide.tolist())) == 4
    assert hashing.hash_ids(np.array([["x"], ["y"]]), 50).shape == (2, 1)


def test_equal_integers_of_any_dtype_have_one_row():
    rows = {tuple(hashing.hash_ids(np.array([3, 77], dtype), 999)) for dtype in (np.int8, np.uint16, np.int64, np.uint64)}
    assert len(rows) == 1
    assert hashing.hash_ids([], 9).shape == (0,)


def test_vocabulary_first_the_rest_hashed_behind_it():
    vocabulary = Vocabulary(np.arange(0, 1000, 10))
    raw = np.arange(1000)
    rows = hashing.hash_rest(vocabulary, raw, 300)
    np.testing.assert_array_equal(rows[::10], np.arange(1, 101))
    rest = np.delete(rows, np.arange(0, 1000, 10))
    assert rest.min() == 101 and rest.max() == 299
