"""The packed tier histogram counts exactly what the definition counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax.blocks import simtier
from aif_jax.blocks.simtier import TierHistory
from tests.reference import blocks as reference

pytestmark = pytest.mark.lane("standing")


def words(rng, *shape):
    """Signatures whose distances spread over all tiers: each row has its own share of ones."""
    share = rng.random((*shape[:-1], 1))
    return np.packbits(rng.random((*shape[:-1], 32 * shape[-1])) < share, axis=-1).view(np.uint32)


def history(rng, length, count, *, kept=0.8):
    return TierHistory(signature=words(rng, length, count), mask=rng.random(length) < kept)


def alike(length):
    """Behaviours of one signature."""
    return TierHistory(signature=np.zeros((length, 2), np.uint32), mask=np.ones(length, bool))


histogram = jax.jit(simtier.histogram, static_argnames="tiers")


@pytest.mark.usefixtures("lightly")
@pytest.mark.parametrize(
    ("bits", "tiers", "length", "candidates"),
    [(32, 4, 24, 5), (64, 8, 70, 9), (96, 5, 33, 4), (256, 64, 65, 3), (32, 64, 7, 3), (64, 2, 1, 1),
     (128, 7, 130, 17), (160, 12, 31, 4), (192, 3, 16, 2), (224, 33, 20, 3)],
)  # fmt: skip
def test_matches_the_reference(bits, tiers, length, candidates):
    rng = np.random.default_rng(bits + tiers)
    past, items = history(rng, length, bits // 32), words(rng, candidates, bits // 32)
    items[0] = past.signature[0]
    made = histogram(items, past, tiers=tiers)
    assert made.dtype == jnp.int32 and made.shape == (candidates, tiers)
    np.testing.assert_array_equal(made, reference.histogram(items, past.signature, past.mask, tiers))


@pytest.mark.usefixtures("lightly")
@pytest.mark.parametrize("length", [15, 16, 255, 256, 700])
def test_counts_above_what_a_field_or_a_byte_holds(length):
    """All behaviours in one tier: partial sums in 4 and in 8 bits must not wrap."""
    counts = histogram(np.array([[0, 0], [0xFFFFFFFF, 0xFFFFFFFF]] * 40, np.uint32), alike(length), tiers=8)
    assert counts[0].tolist() == [0] * 7 + [length]
    assert counts[1].tolist() == [length] + [0] * 7


@pytest.mark.usefixtures("lightly")
def test_empty_history_and_no_candidates():
    rng = np.random.default_rng(2)
    empty = history(rng, 12, 2, kept=0.0)
    assert not np.any(histogram(words(rng, 5, 2), empty, tiers=8))
    assert histogram(np.zeros((0, 2), np.uint32), empty, tiers=8).shape == (0, 8)
    assert not np.any(histogram(words(rng, 5, 2), history(rng, 0, 2), tiers=8))


def test_no_array_of_all_pairs_is_held():
    """At C=1000, L=4096, K=64 the exact form needs less than 3 MiB beside its inputs and outputs; [C, L] bytes are 4 MB."""
    compiled = histogram.lower(jnp.zeros((1000, 2), jnp.uint32), alike(4096), tiers=8).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2**20


@pytest.mark.parametrize(("candidates", "length"), [(1000, 20), (1000, 128), (1000, 4096), (16_384, 600)])
def test_every_pair_is_compared_once(candidates, length):
    """XLA must not copy the comparisons into each of their uses."""
    program = histogram.lower(jnp.zeros((candidates, 2), jnp.uint32), alike(length), tiers=8).compile().as_text()
    assert program.count(" popcnt(") == 2 * simtier.FULL
