"""Taobao UserBehavior: events, categories, and what a malformed file gets."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets import taobao

DATA = Path(os.environ.get("AIF_JAX_DATA", Path(__file__).parents[2] / "shared" / "data"))
HEAD = DATA / "taobao-userbehavior-head100k"
needs_head = pytest.mark.skipif(not HEAD.is_dir(), reason=f"needs the head of Taobao UserBehavior in {HEAD} (AIF_JAX_DATA)")

ROWS = "5,200,70,pv,1511544070\n5,100,60,cart,1511544000\n2,200,70,fav,1511600000\n2,100,60,buy,1511600000\n"


def write(folder, text=ROWS):
    (folder / "UserBehavior.csv").write_text(text)
    return folder / "UserBehavior.csv"


def test_events_and_categories(tmp_path):
    data = taobao.read(write(tmp_path))
    assert data.users.raw.tolist() == [2, 5] and data.items.raw.tolist() == [100, 200]
    assert data.log.user.tolist() == [1, 1, 2, 2]
    assert data.log.item.tolist() == [1, 2, 1, 2]  # ties are ordered by item
    assert data.log.action.tolist() == [4, 3, 2, 1]  # buy, fav, cart, pv
    assert data.log.time.tolist() == [1511600000, 1511600000, 1511544000, 1511544070]
    assert data.catalogue.ids["category"].tolist() == [0, 1, 2]
    assert data.schema.actions == 5 and data.schema.user_attributes == () and data.name == "UserBehavior"


def test_a_folder_with_one_csv_will_do(tmp_path):
    write(tmp_path)
    assert len(taobao.read(tmp_path).log) == 4
    (tmp_path / "other.csv").write_text(ROWS)
    with pytest.raises(ValueError, match=r"expected one file \*\.csv, got 2: \['UserBehavior.csv', 'other.csv'\]"):
        taobao.read(tmp_path)


def test_user_id_is_an_option(tmp_path):
    data = taobao.read(write(tmp_path), user_id=True)
    assert data.user_ids["user"].tolist() == [0, 1, 2] and data.schema.user_attribute("user").size == 3


def test_item_under_two_categories_gets_that_of_its_last_event(tmp_path, caplog):
    path = write(tmp_path, "1,9,50,pv,300\n1,9,40,pv,200\n1,8,40,pv,100\n")
    assert taobao.read(path).catalogue.ids["category"].tolist() == [0, 1, 2]
    assert "1 of 2 items have more than one category" in caplog.text


def test_no_warning_where_categories_agree(tmp_path, caplog):
    taobao.read(write(tmp_path))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_between_keeps_the_days_asked_for(tmp_path):
    data = taobao.read(write(tmp_path), between=(1511544070, 1511600000))
    assert data.log.time.tolist() == [1511544070] and data.items.raw.tolist() == [200]
    with pytest.raises(ValueError, match=r"expected events with times in \(1, 2\), got none"):
        taobao.read(tmp_path, between=(1, 2))


def test_times_before_1970_are_read(tmp_path):
    assert taobao.read(write(tmp_path, "1,2,3,pv,-5\n")).log.time.tolist() == [-5]


def test_content_follows_the_items(tmp_path):
    data = taobao.read(write(tmp_path), content=(np.array([200, 100]), np.eye(2)))
    assert data.catalogue.content.tolist() == [[0, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize(("old", "new", "place", "expected", "got"), [
    (",fav,", ",like,", ", line 3, column 'behaviour'", "one of pv, cart, fav, buy", "'like'"),
    (",fav,", ",", ", line 3", "5", "4 in '2,200,70,1511600000'"),
    ("2,200,70,fav", "2,-200,70,fav", ", line 3, column 'item'", "0 or more", "-200"),
    ("2,200,70,fav", "2,200,x,fav", ", line 3, column 'category'", "a whole number of 0 or more", "'x'"),
    ("1511544000", "2017-11-25", ", line 2, column 'time'", "a whole number", "'2017-11-25'"),
    ("buy,1511600000\n", "buy,15116", "", "a line end after the last line", "'2,100,60,buy,15116'"),
    ("5,200,70,pv", "user,item,category,behaviour,time\n5,200,70,pv", ", line 1, column 'time'", "a whole number", "'time'"),
    (ROWS, "", "", "text without a header in utf8", "ArrowInvalid: Empty CSV file"),
])  # fmt: skip
def test_malformed_files_are_named(tmp_path, old, new, place, expected, got):
    assert old in ROWS
    path = write(tmp_path, ROWS.replace(old, new))
    with pytest.raises(ValueError) as error:
        taobao.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}{place}: ") and message.endswith(f": expected {expected}, got {got}")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.csv: expected a file, got no such file"):
        taobao.read(tmp_path / "no.csv")


def test_raw_events_are_encoded_as_the_log_is(tmp_path):
    data = taobao.read(write(tmp_path))
    raw = {"item": [200, 100], "behaviour": ["pv", "cart"], "time": [1511544070, 1511544000]}
    history = data.encoder.user(None, raw, 1511544080).history
    assert history.item[:3].tolist() == [2, 1, 0] and history.action[:3].tolist() == [1, 2, 0]


@needs_head
def test_real_data():
    data = taobao.read(HEAD)
    assert (len(data.users) - 1, len(data.items) - 1, len(data.log)) == (983, 64_467, 100_001)
    assert data.schema.item_attribute("category").size == 3129
    assert np.bincount(data.log.action).tolist() == [0, 89_710, 5_446, 2_744, 2_101]
    lengths = np.diff(data.log.offsets)[1:]
    assert (np.median(lengths), lengths.max()) == (74, 539)
    inside = taobao.read(HEAD, between=taobao.WINDOW)
    assert 0.999 < len(inside.log) / len(data.log) < 1
