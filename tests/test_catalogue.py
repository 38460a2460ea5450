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
    items = catalogue.items  # all rows, without a copy
    assert items.floats is catalogue.floats and items.content is catalogue.content and items.encoding == ""
    assert items.ids["category"] is catalogue.ids["category"]
    check_item_features(SCHEMA, items, batched=True)


def test_from_items_adds_the_unknown_row():
    known = parts()
    ids = {name: known["ids"][name][1:].tolist() for name in ("category", "tags")}
    given = dict(floats=known["floats"][1:].astype(np.float64), content=known["content"][1:], side={"bid": [1, 2, 3]})
    catalogue = Catalogue.from_items(SCHEMA, known["raw"], ids=ids, **given)
    expected = Catalogue(**known)
    for got, wanted in ((getattr(one, name) for one in (catalogue, expected)) for name in ("ids", "floats", "content", "side")):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def spoilt(field, position, value, key=None):
    """The parts with one number changed."""
    known = parts()
    (known[field] if key is None else known[field][key])[position] = value
    return known


@pytest.mark.parametrize(("wrong", "error", "message"), [
    (parts() | {"raw": parts()["raw"][:2]}, ValueError, "floats: expected 3 rows (raw ids and the unknown item), got 4"),
    (parts() | {"raw": parts()["raw"][:, None]}, ValueError, "raw: expected integers or strings [N - 1], got int64 [3, 1]"),
    (parts() | {"schema": dataclasses.replace(SCHEMA, content=0)}, ValueError,
     "Catalogue.content: expected None (schema.content is 0), got an array"),
    (spoilt("ids", (2, 1), 9, "tags"), ValueError, "ids['tags']: expected values in [0, 9), got 9 at position [2, 1]"),
    (spoilt("ids", 3, -1, "category"), ValueError, "ids['category']: expected values in [0, 6), got -1 at position [3]"),
    (spoilt("ids", 0, 1, "category"), ValueError, "ids['category']: expected zeros in row 0"),
    (spoilt("floats", (0, 0), 1), ValueError, "floats: expected zeros in row 0"),
    (spoilt("content", (3, 1), -np.inf), ValueError, "content: expected finite values, got -inf at position [3, 1]"),
    (spoilt("content", (0, 1), 1), ValueError, "content: expected zeros in row 0"),
    (spoilt("side", 0, 1, "bid"), ValueError, "side['bid']: expected zeros in row 0"),
])  # fmt: skip
@pytest.mark.parametrize("block", [checks.BLOCK, 2])
def test_a_wrong_table_is_named(monkeypatch, block, wrong, error, message):
    monkeypatch.setattr(checks, "BLOCK", block)
    refused(error, re.escape(message), Catalogue, **wrong)
