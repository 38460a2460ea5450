"""Hashes of ids of text: those of the first release, in time and memory that follow the characters; and the bound of ids."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aif_jax.encoding.vocabulary import MOST_CHARACTERS, Vocabulary, as_ids
from aif_jax.export.consume import ids as consume
from aif_jax.index import ids
from aif_jax.serving.requests import Candidates
from tests.reference import characters as reference
from tests.refusals import refused

LONG = "x" * (MOST_CHARACTERS + 1)
texts = st.lists(st.text(st.characters(codec="utf-32", exclude_categories=()), max_size=12), max_size=60)


@given(texts, st.integers(0, 40))
def test_hashes_are_those_of_the_loop(strings, repeats):
    strings = [text * (repeats if number % 7 == 0 else 1) for number, text in enumerate(strings)]
    keys, marks = consume.hashes(strings)
    expected = [reference.key(text) for text in strings]
    assert list(zip(keys.tolist(), marks.tolist(), strict=True)) == expected


@pytest.mark.parametrize("count", [1, consume.FEW, consume.FEW + 1, 3 * consume.FEW])
def test_every_length_around_the_change_from_arrays_to_integers(count):
    for strings in (["ab" * 9] * count, ["x" * number for number in range(count)], ["", *["é\0y" * count] * count]):
        assert consume.hashes(strings)[0].tolist() == [reference.key(text)[0] for text in strings]


def test_a_long_text_costs_its_characters(monkeypatch):
    """No array operation for each of its characters, no array as wide as it for every other string."""
    calls = 0

    def counted(step):
        def called(*state):
            nonlocal calls
            calls += 1
            return step(*state)

        return called

    monkeypatch.setattr(consume, "_step", counted(consume._step))
    strings = ["long" * 50_000, *(f"item {number}" for number in range(2000))]
    tracemalloc.start()
    try:
        keys, _ = consume.hashes(strings)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20  # padded: 1.6 GB
    finally:
        tracemalloc.stop()
    assert calls <= len("item 1999")
    assert keys[0] == reference.key(strings[0])[0] and keys[1:].tolist() == consume.hashes(strings[1:])[0].tolist()


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
