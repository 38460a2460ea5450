"""Hashes of ids of text: those of the first release, in memory that follows the characters; and the bound of ids."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aif_jax.encoding.vocabulary import MOST_CHARACTERS, Vocabulary, as_ids
from aif_jax.export.consume import ids as consume
from aif_jax.index import ids
from aif_jax.serving.requests import Candidates
from tests.refusals import refused

LONG = "x" * (MOST_CHARACTERS + 1)
texts = st.lists(st.text(st.characters(codec="utf-32", exclude_categories=()), max_size=12), max_size=60)


def key_of(text):
    """The key (int64) of an id of text in an index: one character at a time, in Python's integers."""
    mixed = 0xCBF29CE484222325
    for character in map(ord, text):
        mixed = (mixed ^ character) * 0x9E3779B97F4A7C15 % 2**64
        mixed ^= mixed >> 32
    mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed ^= mixed >> 32
    signed = mixed - 2**64 if mixed >= 2**63 else mixed
    return 0 if signed == -(2**63) else signed


@given(texts, st.integers(0, 40))
def test_hashes_are_those_of_the_loop(strings, repeats):
    strings = [text * (repeats if number % 7 == 0 else 1) for number, text in enumerate(strings)]
    assert consume.hashes(strings).tolist() == [key_of(text) for text in strings]


def test_memory_follows_the_characters():
    """No array as wide as a long text for every other string."""
    strings = ["long" * 5_000, *(f"item {number}" for number in range(20_000))]
    tracemalloc.start()
    try:
        keys = consume.hashes(strings)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20  # padded: 1.6 GB
    finally:
        tracemalloc.stop()
    assert keys[0] == key_of(strings[0]) and keys[1:].tolist() == consume.hashes(strings[1:]).tolist()


@pytest.mark.parametrize("take", [
    lambda values: as_ids(values, "ids"),
    lambda values: ids.raw_keys(values, "ids"),
    Candidates.of,
])  # fmt: skip
def test_ids_are_bounded(take):
    message = rf"expected ids of at most {MOST_CHARACTERS} characters, got {MOST_CHARACTERS + 1} at position 1; give long ones"
    for values in (["a", LONG], np.array(["a", LONG]), np.array(["a", LONG], np.dtypes.StringDType())):
        refused(ValueError, message, take, values)
    take(["a", LONG[1:]])
    # categories are not bounded
    assert Vocabulary([LONG, "a"]).encode([LONG, "b"]).tolist() == [2, 0]
