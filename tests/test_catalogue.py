"""Catalogue: row 0, look-ups, what it refuses."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from aif_jax import checks
from aif_jax.catalogue import Catalogue
from aif_jax.features import check_item_features
from tests import demo
from tests.refusals import refused

SCHEMA = dataclasses.replace(demo.schema(), content=2)  # item 50, category 6, tags 9 x 3; one float; side "bid"


def parts() -> dict:
    return {
        "schema": SCHEMA,
        "raw": np.array([11, 22, 33]),
        "ids": {
            "item": np.array([0, 1, 2, 3], np.int32),
            "category": np.array([0, 5, 4, 5], np.int32),
            "tags": np.array([[0, 0, 0], [1, 0, 0], [2, 8, 0], [3, 4, 5]], np.int32),
        },
        "floats": np.array([[0], [0.5], [-1], [2]], np.float32),
        "content": np.array([[0, 0], [1, 2], [3, 4], [5, 6]], np.float32),
        "side": {"bid": np.array([0, 1, 2, 3], np.float32)},
    }


def test_features_of_rows_by_hand():
    catalogue = Catalogue(**parts())
    assert len(catalogue) == 4
    features = catalogue.features([2, 0])
    assert features.ids["item"].tolist() == [2, 0]
    assert features.ids["category"].tolist() == [4, 0]
    assert features.ids["tags"].tolist() == [[2, 8, 0], [0, 0, 0]]
    assert features.floats.tolist() == [[-1], [0]]
    assert features.content is not None and features.content.tolist() == [[3, 4], [0, 0]]
    assert features.side["bid"].tolist() == [2, 0]
    check_item_features(SCHEMA, features, batched=True)
    check_item_features(SCHEMA, catalogue.features(3), batched=False)
    assert catalogue.features(np.array([[1, 2], [3, 0]])).floats.shape == (2, 2, 1)
    assert catalogue.features([]).floats.shape == (0, 1)


def test_from_items_adds_the_unknown_row():
    known = parts()
    ids = {name: known["ids"][name][1:].tolist() for name in ("category", "tags")}
    given = dict(floats=known["floats"][1:].astype(np.float64), content=known["content"][1:], side={"bid": [1, 2, 3]})
    catalogue = Catalogue.from_items(SCHEMA, known["raw"], ids=ids, **given)
    expected = Catalogue(**known)
    for got, wanted in ((getattr(one, name) for one in (catalogue, expected)) for name in ("ids", "floats", "content", "side")):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def wrong(field, value, key=None):
    def change(known):
        old = known[field]
        if key is None:
            return known | {field: value(old)}
        others = {name: array for name, array in old.items() if name != key}
        return known | {field: others | ({key: value(old[key])} if value else {})}

    return change


def at(position, value):
    """A change of one number."""

    def change(array):
        array = array.copy()
        array[position] = value
        return array

    return change


@pytest.mark.parametrize(("change", "error", "message"), [
    (wrong("raw", lambda raw: raw[:2]), ValueError, "floats: expected 3 rows (raw ids and the unknown item), got 4"),
    (wrong("raw", lambda raw: raw[:, None]), ValueError, "raw: expected integers or strings [N - 1], got int64 [3, 1]"),
    (wrong("content", lambda x: None), ValueError, "Catalogue.content: expected float32 [..., 2], got None"),
    (wrong("schema", lambda schema: dataclasses.replace(schema, content=0)), ValueError,
     "Catalogue.content: expected None (schema.content is 0), got an array"),
    (wrong("ids", None, "category"), ValueError, "(missing ['category'], extra [])"),
    (wrong("ids", lambda ids: {**ids, "shop": ids["item"]}), ValueError, "(missing [], extra ['shop'])"),
    (wrong("ids", lambda ids: ids.astype(np.int64), "item"), TypeError, "ids['item']: expected dtype int32, got int64"),
    (wrong("ids", lambda ids: ids[:, :2], "tags"), ValueError, "ids['tags']: expected shape [4, 3], got [4, 2]"),
    (wrong("ids", at((2, 1), 9), "tags"), ValueError, "ids['tags']: expected values in [0, 9), got 9 at position [2, 1]"),
    (wrong("ids", at(3, -1), "category"), ValueError, "ids['category']: expected values in [0, 6), got -1 at position [3]"),
    (wrong("ids", at(0, 1), "category"), ValueError, "ids['category']: expected zeros in row 0"),
    (wrong("floats", lambda x: x[:, :0]), ValueError, "floats: expected shape [4, 1], got [4, 0]"),
    (wrong("floats", at((1, 0), np.nan)), ValueError, "floats: expected finite values, got nan at position [1, 0]"),
    (wrong("floats", at((0, 0), 1)), ValueError, "floats: expected zeros in row 0"),
    (wrong("content", at((3, 1), -np.inf)), ValueError, "content: expected finite values, got -inf at position [3, 1]"),
    (wrong("content", lambda x: x.astype(np.float16)), TypeError, "content: expected dtype float32, got float16"),
    (wrong("content", at((0, 1), 1)), ValueError, "content: expected zeros in row 0"),
    (wrong("side", None, "bid"), ValueError, "(missing ['bid'], extra [])"),
    (wrong("side", at(2, np.nan), "bid"), ValueError, "side['bid']: expected finite values, got nan at position [2]"),
    (wrong("side", at(0, 1), "bid"), ValueError, "side['bid']: expected zeros in row 0"),
])  # fmt: skip
@pytest.mark.parametrize("block", [checks.BLOCK, 2])
def test_a_wrong_table_is_named(monkeypatch, block, change, error, message):
    monkeypatch.setattr(checks, "BLOCK", block)
    refused(error, re.escape(message), Catalogue, **change(parts()))


def test_features_without_content():
    """Training leaves content out where no tower reads it."""
    features = Catalogue(**parts()).features([1, 2], content=False)
    assert features.content is None and features.ids["item"].tolist() == [1, 2]


def test_items_are_all_rows_without_a_copy():
    catalogue = Catalogue(**parts())
    assert catalogue.items.floats is catalogue.floats and catalogue.items.content is catalogue.content
    assert catalogue.items.ids["category"] is catalogue.ids["category"] and catalogue.items.encoding == ""
    check_item_features(SCHEMA, catalogue.items, batched=True)


def test_raw_ids_may_be_strings():
    assert len(Catalogue(**{**parts(), "raw": np.array(["a", "b", "c"])})) == 4


def test_with_content_leaves_the_old_one_alone():
    catalogue = Catalogue(**parts())
    richer = catalogue.with_content(np.pad(np.ones([3, 5], np.float32), ((1, 0), (0, 0))))
    assert richer.schema == dataclasses.replace(SCHEMA, content=5) and richer.content.shape == (4, 5)
    assert catalogue.schema == SCHEMA and catalogue.content.shape == (4, 2)
    for content, message in (
        (np.zeros(4, np.float32), r"content: expected shape \[4, E\], got \[4\]"),
        (np.zeros([3, 5], np.float32), r"content: expected shape \[4, 5\], got \[3, 5\]"),
        (np.ones([4, 5], np.float32), "content: expected zeros in row 0"),
    ):
        refused(ValueError, message, catalogue.with_content, content)
