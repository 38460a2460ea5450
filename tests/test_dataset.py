"""Dataset: features gathered from the log, no leakage, what it refuses; and the checks of user features against a schema."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.data.catalogue import Catalogue
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.schema import Attribute, Schema, Vocabulary
from aif_jax.data.validate import check_user_features
from aif_jax.types import Behaviours, UserFeatures

SCHEMA = Schema(
    item_attributes=(
        Attribute(name="item", size=4),
        Attribute(name="category", size=3),
        Attribute(name="tags", size=5, length=2),
    ),
    user_attributes=(Attribute(name="gender", size=3), Attribute(name="interests", size=7, length=2)),
    actions=4,
    user_floats=1,
)


def dataset(user=(1, 1, 1, 1, 2), item=(1, 2, 3, 0, 2), action=(1, 2, 3, 1, 2), time=(10, 20, 20, 30, 5)) -> Dataset:
    return Dataset(
        name="by hand",
        schema=SCHEMA,
        log=EventLog.from_arrays(user, item, action, time, users=4),
        catalogue=Catalogue.from_items(SCHEMA, [7, 8, 9], ids={"category": [1, 2, 1], "tags": [[1, 0], [2, 3], [4, 0]]}),
        user_ids={
            "gender": np.array([0, 1, 2, 1], np.int32),
            "interests": np.array([[0, 0], [1, 2], [3, 0], [6, 5]], np.int32),
        },
        user_floats=np.array([[0], [0.5], [1.5], [2.5]], np.float32),
        users=Vocabulary([100, 200, 300]),
        items=Vocabulary([7, 8, 9]),
    )


SIGNATURE = np.array([[5, 5], [1, 10], [2, 20], [3, 30]], np.uint32)  # row 0 is not zero, as a projection may give


def test_features_of_positions_by_hand():
    data = dataset().with_signatures(SIGNATURE)
    features = data.user_features([3, 2, 0, 4], short=2, long=4)
    assert features.ids["gender"].tolist() == [1, 1, 1, 2]
    assert features.ids["interests"].tolist() == [[1, 2], [1, 2], [1, 2], [3, 0]]
    assert features.floats.tolist() == [[0.5], [0.5], [0.5], [1.5]]
    long = features.long
    assert sorted(long.ids) == ["category", "item"]
    assert long.ids["item"].tolist() == [[3, 2, 1, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert long.ids["category"].tolist() == [[1, 2, 1, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert long.action.tolist() == [[3, 2, 1, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert long.age.tolist() == [[10, 10, 20, 0], [10, 0, 0, 0], [0] * 4, [0] * 4]
    assert long.mask.tolist() == [[True, True, True, False], [True, False, False, False], [False] * 4, [False] * 4]
    assert long.signature is not None
    assert long.signature[0].tolist() == [[3, 30], [2, 20], [1, 10], [0, 0]]
    for got, whole in zip(leaves(features.short), leaves(long), strict=True):
        np.testing.assert_array_equal(got, whole[:, :2])
    check_user_features(SCHEMA, features, batched=True)


def test_features_of_requests_by_hand():
    data = dataset()
    features = data.request_features([1, 1, 0, 3], [31, 20, 99, 99], short=3, long=1)
    assert features.short.ids["item"].tolist() == [[0, 3, 2], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert features.short.mask.tolist() == [
        [True] * 3,
        [True, False, False],
        [False] * 3,
        [False] * 3,
    ]  # item 0: unknown, but an event
    assert features.short.age.tolist() == [[1, 11, 11], [10, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert features.long.ids["item"].tolist() == [[0], [1], [0], [0]]
    assert features.ids["gender"].tolist() == [1, 1, 0, 1]
    assert features.short.signature is None
    check_user_features(SCHEMA, features, batched=True)


def test_a_request_at_the_time_of_an_event_equals_the_sample_of_that_event():
    data = dataset().with_signatures(SIGNATURE)
    at = np.arange(5)
    samples = data.user_features(at, short=2, long=3)
    requests = data.request_features(data.log.user[at], data.log.time[at], short=2, long=3)
    for got, expected in zip(leaves(requests), leaves(samples), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_features_have_the_dtypes_of_the_types():
    features = dataset().with_signatures(SIGNATURE).user_features([0, 1], short=1, long=2)
    for history in (features.short, features.long):
        assert [x.dtype for x in (*history.ids.values(), history.action)] == [np.int32] * 3
        assert (history.age.dtype, history.mask.dtype) == (np.float32, np.bool_)
        assert history.signature is not None and history.signature.dtype == np.uint32
    assert features.floats.dtype == np.float32
    assert not np.shares_memory(features.short.mask, features.long.mask)


def test_no_events_at_all():
    data = dataset([], [], [], [])
    features = data.request_features([0, 2], [5, 5], short=2, long=3)
    assert not features.long.mask.any() and not features.long.age.any()
    assert data.user_features([], short=2, long=3).long.mask.shape == (0, 3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=25))
def test_no_behaviour_ties_with_its_sample_or_is_later(rows):
    """Few moments, so that most events tie. The age of a behaviour is its distance to the sample: a tie would have age 0."""
    data = dataset(*np.array(rows).T)
    log = data.log
    features = data.user_features(np.arange(len(log)), short=2, long=5)
    for history in (features.short, features.long):
        assert np.all(np.asarray(history.age)[history.mask] > 0)
    for at in range(len(log)):
        earlier = [j for j in range(len(log)) if log.user[j] == log.user[at] and log.time[j] < log.time[at]][::-1]
        for history, length in ((features.short, 2), (features.long, 5)):
            kept = earlier[:length]
            padding = [0] * (length - len(kept))
            assert history.ids["item"][at].tolist() == log.item[kept].tolist() + padding
            assert history.action[at].tolist() == log.action[kept].tolist() + padding
            assert history.age[at].tolist() == (log.time[at] - log.time[kept]).tolist() + padding
            assert history.mask[at].tolist() == [True] * len(kept) + [False] * len(padding)


def test_with_content_changes_schema_and_catalogue_together():
    content = np.zeros([4, 6], np.float32)
    data = dataset().with_content(content)
    assert data.schema == data.catalogue.schema == dataclasses.replace(SCHEMA, content=6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"schema": dataclasses.replace(SCHEMA, actions=9)}, ValueError, "Dataset.schema: expected the catalogue's"),
        ({"users": Vocabulary([1])}, ValueError, "Dataset.log.users: expected 2 rows like the vocabulary, got 4"),
        ({"items": Vocabulary([1])}, ValueError, "Dataset.catalogue: expected 2 rows like the vocabulary, got 4"),
        ({"items": Vocabulary([7, 8, 10])}, ValueError, "Dataset.items: expected the raw ids of the catalogue"),
        ({"user_ids": {}}, ValueError, "Dataset.user_ids: expected keys ['gender', 'interests'], got []"),
        ({"user_floats": np.zeros([4, 2], np.float32)}, ValueError, "Dataset.user_floats: expected shape [4, 1], got [4, 2]"),
        ({"user_floats": np.full([4, 1], np.nan, np.float32)}, ValueError, "Dataset.user_floats: expected finite values"),
        (
            {"log": EventLog.from_arrays([1], [4], [1], [1], users=4)},
            ValueError,
            "Dataset.log.item: expected values in [0, 4), got 4",
        ),
        (
            {"log": EventLog.from_arrays([1], [1], [4], [1], users=4)},
            ValueError,
            "Dataset.log.action: expected values in [0, 4), got 4",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        dataclasses.replace(dataset(), **changes)


def test_bad_requests_are_refused():
    data = dataset()
    with pytest.raises(ValueError, match=r"positions: expected values in \[0, 5\), got 5"):
        data.user_features([5], short=1, long=1)
    with pytest.raises(ValueError, match=r"users: expected values in \[0, 4\), got -1"):
        data.request_features([-1], [1], short=1, long=1)
    with pytest.raises(TypeError, match="times: expected integer seconds"):
        data.request_features([1], [1.5], short=1, long=1)
    with pytest.raises(ValueError, match="lengths of at least 1, got short=0, long=1"):
        data.user_features([0], short=0, long=1)


# check_user_features


def leaves(record) -> list[np.ndarray]:
    return jax.tree.leaves(record)


def good(words: int | None = 1) -> UserFeatures:
    """Two users, short histories of 2, long ones of 3; the mask has a hole."""

    def history(length):
        ids = {"item": np.full([2, length], 3, np.int32), "category": np.full([2, length], 2, np.int32)}
        mask = np.arange(length) != 1
        signature = None if words is None else np.zeros([2, length, words], np.uint32)
        return Behaviours(
            ids=ids,
            action=np.full([2, length], 3, np.int32),
            age=np.ones([2, length], np.float32),
            mask=np.stack([mask, mask]),
            signature=signature,
        )

    return UserFeatures(
        ids={"gender": np.array([0, 2], np.int32), "interests": np.array([[0, 6], [1, 2]], np.int32)},
        floats=np.zeros([2, 1], np.float32),
        short=history(2),
        long=history(3),
    )


def test_good_user_features_pass():
    check_user_features(SCHEMA, good(), batched=True)
    check_user_features(SCHEMA, good(words=None), batched=True)
    check_user_features(SCHEMA, jax.tree.map(jnp.asarray, good()), batched=True)
    check_user_features(SCHEMA, jax.tree.map(lambda x: x[0], good()), batched=False)
    check_user_features(SCHEMA, jax.tree.map(lambda x: x[:0], good()), batched=True)


def long(**changes):
    return {"long": dataclasses.replace(good().long, **changes)}


def put(array, position, value):
    array = np.array(array)
    array[position] = value
    return array


LONG = good().long


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"floats": np.zeros([2, 1])}, TypeError, "UserFeatures.floats: expected dtype float32, got float64"),
        ({"floats": np.zeros([2, 2], np.float32)}, ValueError, "UserFeatures.floats: expected shape [any, 1], got [2, 2]"),
        ({"floats": np.full([2, 1], np.inf, np.float32)}, ValueError, "UserFeatures.floats: expected finite values, got inf"),
        ({"ids": {"gender": np.zeros(2, np.int32)}}, ValueError, "UserFeatures.ids: expected keys ['gender', 'interests']"),
        ({"ids": {**good().ids, "age": np.zeros(2)}}, ValueError, "(missing [], extra ['age'])"),
        (
            {"ids": {**good().ids, "gender": np.array([0, 3], np.int32)}},
            ValueError,
            "ids['gender']: expected values in [0, 3), got 3",
        ),
        ({"ids": {**good().ids, "gender": np.zeros(3, np.int32)}}, ValueError, "ids['gender']: expected shape [2], got [3]"),
        ({"short": None}, TypeError, "UserFeatures.short: expected Behaviours, got NoneType"),
        (long(mask=np.ones([2, 3], np.int32)), TypeError, "UserFeatures.long.mask: expected dtype bool, got int32"),
        (long(mask=np.ones([3], bool)), ValueError, "UserFeatures.long.mask: expected shape [2, any], got [3]"),
        (long(mask=np.ones([2, 4], bool)), ValueError, "UserFeatures.long.ids['item']: expected shape [2, 4], got [2, 3]"),
        (long(ids={"item": LONG.ids["item"]}), ValueError, "UserFeatures.long.ids: expected keys ['category', 'item']"),
        (
            long(ids={**LONG.ids, "item": put(LONG.ids["item"], (1, 2), 4)}),
            ValueError,
            "UserFeatures.long.ids['item']: expected values in [0, 4), got 4 at position [1, 2]",
        ),
        (
            long(ids={**LONG.ids, "item": put(LONG.ids["item"], (0, 1), -1)}),
            ValueError,
            "UserFeatures.long.ids['item']: expected values in [0, 4), got -1 at position [0, 1]",
        ),
        (long(action=put(LONG.action, (0, 0), 4)), ValueError, "UserFeatures.long.action: expected values in [0, 4), got 4"),
        (long(action=np.asarray(LONG.action, np.int8)), TypeError, "UserFeatures.long.action: expected dtype int32, got int8"),
        (
            long(age=put(LONG.age, (1, 1), -1)),
            ValueError,
            "long.age: expected finite values of at least 0, got -1.0 at position [1, 1]",
        ),
        (long(age=put(LONG.age, (1, 1), np.nan)), ValueError, "long.age: expected finite values of at least 0, got nan"),
        (long(age=np.ones([2, 3])), TypeError, "UserFeatures.long.age: expected dtype float32, got float64"),
        (long(signature=np.zeros([2, 3, 2], np.uint32)), ValueError, "as many words as short.signature (1), got 2"),
        (long(signature=np.zeros([2, 3], np.uint32)), ValueError, "long.signature: expected shape [2, 3, any], got [2, 3]"),
        (long(signature=np.zeros([2, 3, 1], np.int32)), TypeError, "long.signature: expected dtype uint32, got int32"),
    ],
)
def test_wrong_user_features_are_named(changes, error, message):
    features = dataclasses.replace(good(), **changes)
    with pytest.raises(error, match=re.escape(message)):
        check_user_features(SCHEMA, features, batched=True)


def test_one_user_has_no_leading_axis():
    with pytest.raises(ValueError, match=r"UserFeatures.floats: expected shape \[1\], got \[2, 1\]"):
        check_user_features(SCHEMA, good(), batched=False)
    with pytest.raises(TypeError, match="expected UserFeatures, got Behaviours"):
        check_user_features(SCHEMA, LONG, batched=False)  # pyright: ignore[reportArgumentType]
