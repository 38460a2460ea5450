"""Vocabularies: raw ids to rows and back, by value and by kind; hashes of ids of text, as of the first release."""

import re
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.encoding.vocabulary import MOST_CHARACTERS, Vocabulary, as_ids
from aif_jax.export.consume import ids as consume
from aif_jax.index import ids
from aif_jax.serving.requests import Candidates
from tests.refusals import refused


@pytest.mark.parametrize(("raw", "ids", "rows"), [
    ([30, 10, 20, 10], [[10, 30], [31, 9], [25, 20]], [[1, 3], [0, 0], [0, 2]]),
    (["shoe", "hat"], ["hat", "shoes", "", "shoe"], [1, 0, 0, 2]),
    (["7", "07"], ["07", "7", "007"], [1, 2, 0]),  # text of digits is text
    ([f"id {number}" for number in range(30)], [["id 7"], ["id 77"]], [[28], [0]]),
    (np.zeros(0, np.int64), [1, 2], [0, 0]),
])  # fmt: skip
def test_vocabulary_by_hand(raw, ids, rows):
    vocabulary = Vocabulary(raw)
    assert vocabulary.raw.tolist() == sorted(set(raw)) and len(vocabulary) == 1 + len(set(raw))
    encoded = vocabulary.encode(np.array(ids))
    assert encoded.dtype == np.int32 and encoded.tolist() == vocabulary.encode(ids).tolist() == rows


@pytest.mark.parametrize(("ids", "forms"), [
    (st.integers(-(2**63), 2**63 - 1), (np.int64,)),
    (st.text(st.characters(exclude_categories=["Cs"]), max_size=4), (object, np.dtypes.StringDType())),
])  # fmt: skip
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_vocabulary_equals_a_dict(ids, forms, data):
    raw, more = (data.draw(st.lists(ids, max_size=20)) for _ in range(2))
    rows = {value: row for row, value in enumerate(sorted(set(raw)), start=1)}
    given_ids, vocabulary = more + raw, Vocabulary(raw)
    for form in (given_ids, *(np.array(given_ids, form) for form in forms)):
        assert vocabulary.encode(form).tolist() == [rows.get(value, 0) for value in given_ids]
    assert Vocabulary(consume.Ids(vocabulary.to_arrays(), "").raw) == vocabulary
    assert vocabulary.ids_of(np.arange(1, len(vocabulary))).tolist() == sorted(set(raw))


@pytest.mark.parametrize("spread", [1, 10**9])  # a direct table, a search
def test_integers_of_any_dtype_shape_and_container(spread):
    vocabulary = Vocabulary([3 * spread, spread, 5 * spread])
    assert vocabulary.encode(np.array([[spread, 2 * spread], [5 * spread, 3 * spread]])).tolist() == [[1, 0], [3, 2]]
    assert vocabulary.encode([[spread], [-spread]]).tolist() == [[1], [0]]
    assert vocabulary.encode((5 * spread,)).tolist() == [3] and vocabulary.encode(spread).tolist() == 1
    assert vocabulary.encode(np.array([spread], np.uint64)).tolist() == [1]
    assert vocabulary.encode([np.int32(7), 5 * spread]).tolist() == [0, 3]
    assert vocabulary.encode([-(2**63), 2**63 - 1]).tolist() == [0, 0]
    assert vocabulary.encode(np.zeros((0, 2), np.int64)).shape == (0, 2)


def test_one_long_id_costs_its_own_length():
    vocabulary = Vocabulary([f"item {number}" for number in range(10_000)] + ["x" * 2_000])
    assert sum(array.nbytes for array in vocabulary.to_arrays().values()) < 250_000
    assert vocabulary.raw.nbytes + sys.getsizeof("x" * 2_000) < 250_000
    assert vocabulary.encode(["x" * 2_000]).tolist() == [10_001]


@pytest.mark.parametrize(("given_ids", "message"), [
    ([None], "got NoneType at position 0"),
    (["a", None], "got str, then NoneType at position 1"),
    ([1, None], "got int, then NoneType at position 1"),
    ([1, "a"], "got int, then str at position 1"),
    (["a", 1], "got str, then int at position 1"),
    ([1, 1.5], "got int, then float at position 1"),
    (np.array(["a", None], object), "got str, then NoneType at position 1"),
    (np.array(["2026-01-01"], "M8[ns]"), "got dtype datetime64"),
    (np.array([1.5, 2.5]), "got dtype float64"),
    ([True, False], "got dtype bool"),
    ([7, True], "got int, then bool at position 1"),
    ([True, 7], "got bool at position 0"),
    ([b"a"], "got dtype"),
    ([2**63], "expected integers from -2^63 to below 2^63, got 9223372036854775808"),
    (np.array([2**63], np.uint64), "expected integers below 2^63, got 9223372036854775808"),
    ([2**64, 1], "got 18446744073709551616"),
])  # fmt: skip
@pytest.mark.parametrize("known", [[1, 2], ["a", "b"], []])
def test_what_is_no_id_is_refused_and_never_unknown(known, given_ids, message):
    refused(TypeError, re.escape(message), Vocabulary(known).encode, given_ids)
    refused(TypeError, "", Vocabulary, given_ids)


def test_equality_digest_and_arrays():
    one, same, other = Vocabulary([3, 1]), Vocabulary(np.array([1, 3, 3], np.int8)), Vocabulary(["1", "3"])
    assert one == same and hash(one) == hash(same) and one.digest == same.digest
    assert one != other and one != Vocabulary([1, 3, 4]) and one != [1, 3]
    assert Vocabulary(["ab", "c"]).digest != Vocabulary(["a", "bc"]).digest
    assert one.to_arrays()["ids"].dtype == np.int64
    assert Vocabulary([]) == Vocabulary(np.zeros(0, np.int64)) == Vocabulary(consume.Ids(Vocabulary([]).to_arrays(), "").raw)
    assert len(one.digest) == 64 and repr(one) == "Vocabulary(2 ids + unknown)"
    assert (one.kind, other.kind, Vocabulary([]).kind) == ("integers", "strings", None)
    refused(ValueError, "arrays ids, keys and marks, or utf8 and offsets", consume.Ids, {"utf8": np.zeros(0, np.uint8)}, "")
    # as of the first release
    assert Vocabulary([3, 1]).digest.startswith("6ee9e86bd9e1") and set(Vocabulary([3, 1]).to_arrays()) == {"ids"}
    assert Vocabulary(["b", "a"]).digest.startswith("a274a3a5ece9")


LONG = "x" * (MOST_CHARACTERS + 1)
texts = st.lists(st.text(st.characters(codec="utf-32", exclude_categories=()), max_size=12), max_size=60)


def key_of(text):
    """The hashes (int64, uint32) of an id of text in an index: one character at a time, in Python's integers."""
    mixed, mark = 0xCBF29CE484222325, 0x811C9DC5
    for character in map(ord, text):
        mixed = (mixed ^ character) * 0x9E3779B97F4A7C15 % 2**64
        mixed ^= mixed >> 32
        mark = (mark ^ character) * 0x01000193 % 2**32
    mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed ^= mixed >> 32
    signed = mixed - 2**64 if mixed >= 2**63 else mixed
    return (0 if signed == -(2**63) else signed), mark


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
    assert keys[0].item() == key_of(strings[0]) and keys[1:].tolist() == consume.hashes(strings[1:]).tolist()


@pytest.mark.parametrize("take", [
    lambda values: as_ids(values, "ids"),
    lambda values: ids.raw_keys(values, "ids"),
    Candidates,
])  # fmt: skip
def test_ids_are_bounded(take):
    message = rf"expected ids of at most {MOST_CHARACTERS} characters, got {MOST_CHARACTERS + 1} at position 1; give long ones"
    for values in (["a", LONG], np.array(["a", LONG]), np.array(["a", LONG], np.dtypes.StringDType())):
        refused(ValueError, message, take, values)
    take(["a", LONG[1:]])
    # categories are not bounded
    assert Vocabulary([LONG, "a"]).encode([LONG, "b"]).tolist() == [2, 0]
