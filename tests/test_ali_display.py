"""Ali_Display_Ad_Click: impressions with clicks, behaviours without items, and what a malformed file gets."""

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.data import ali_display
from aif_jax.data.batches import make_batch
from aif_jax.data.text_table import DataError

FILES = {
    "raw_sample.csv": """user,time_stamp,adgroup_id,pid,nonclk,clk
7,1494137644,200,430548_1007,1,0
7,1494137700,100,430539_1007,0,1
5,1494137650,200,430548_1007,0,1
""",
    "ad_feature.csv": """adgroup_id,cate_id,campaign_id,customer,brand,price
200,60,9,31,8,170.0
100,70,9,32,NULL,0
300,60,8,33,4,12.5
""",
    # the header ends in a space, pvalue_level may be empty
    "user_profile.csv": (
        "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation,"
        "new_user_class_level \n"
        "7,0,5,2,5,,3,0,3\n"
        "6,1,5,1,5,1,3,0,2\n"
    ),
    "behavior_log.csv": """user,time_stamp,btag,cate,brand
7,1494000000,pv,60,8
7,1494000001,buy,60,8
7,1494137700,cart,50,4
6,1494000000,pv,60,8
5,1494000000,ipv,60,8
""",
}  # fmt: skip


def write(folder, **changed):
    for name, text in FILES.items():
        (folder / name).write_text(changed.get(name.removesuffix(".csv"), text))
    return folder


def test_impressions_and_behaviours_are_one_log(tmp_path):
    data = ali_display.read(write(tmp_path))
    assert data.users.raw.tolist() == [5, 7]  # user 6 was shown nothing
    assert data.items.raw.tolist() == [-2, -1, 100, 200, 300]  # two pairs of category and brand, three ads
    assert data.log.user.tolist() == [1, 1, 2, 2, 2, 2, 2]
    assert data.log.action.tolist() == [3, 2, 3, 6, 1, 2, 4]
    by_raw = dict(zip(data.items.raw.tolist(), range(1, 6), strict=True))
    pair_60_8, pair_50_4 = by_raw[-2], by_raw[-1]
    assert data.log.item.tolist() == [pair_60_8, by_raw[200], pair_60_8, pair_60_8, by_raw[200], by_raw[100], pair_50_4]


def test_features(tmp_path):
    data = ali_display.read(write(tmp_path), user_id=True)
    ids = data.catalogue.ids
    assert ids["item"].tolist() == [0, 0, 0, 3, 4, 5]  # a behaviour's item is not known
    assert ids["category"].tolist() == [0, 2, 1, 3, 2, 2]  # 50, 60, 70
    assert ids["brand"].tolist() == [0, 2, 1, 0, 2, 1]  # 4, 8; NULL is unknown
    assert ids["campaign"].tolist() == [0, 0, 0, 2, 2, 1] and ids["customer"].tolist() == [0, 0, 0, 2, 1, 3]
    np.testing.assert_allclose(data.catalogue.floats[:, 0], np.log1p([0, 0, 0, 0, 170, 12.5]), rtol=1e-6)
    assert data.user_ids["user"].tolist() == [0, 1, 2]
    assert data.user_ids["final_gender_code"].tolist() == [0, 0, 1]  # user 5 has no profile
    assert data.user_ids["pvalue_level"].tolist() == [0, 0, 0]  # empty
    assert data.user_ids["new_user_class_level"].tolist() == [0, 0, 1]
    assert data.schema.behaviour_fields == ("item", "category", "brand") and data.schema.actions == 7


def test_samples_are_impressions_and_histories_are_what_came_before(tmp_path):
    data = ali_display.read(write(tmp_path))
    positions, labels = ali_display.impressions(data)
    assert positions.tolist() == [1, 4, 5] and labels.tolist() == [1, 0, 1]
    config = aif.tiny(data.schema, memory=(), simtier="off", sim_fields=("category", "brand"))
    batch = make_batch(data, positions, data.log.item[positions][:, None], labels[:, None], config=config)
    history = batch.users.long
    assert history.mask.sum(1).tolist() == [1, 2, 3]
    assert history.action[2, :3].tolist() == [1, 6, 3]  # shown, buy, pv; the cart ties with the sample and is left out
    assert history.ids["category"][2, :3].tolist() == [2, 2, 2] and history.ids["item"][2, :3].tolist() == [4, 0, 0]


def test_without_behaviours(tmp_path):
    write(tmp_path)
    (tmp_path / "behavior_log.csv").unlink()
    data = ali_display.read(tmp_path, behaviours=False)
    assert data.items.raw.tolist() == [100, 200, 300] and len(data.log) == 3
    with pytest.raises(DataError, match=r"behavior_log.csv: expected a file with user, .*, got no such file"):
        ali_display.read(tmp_path)


@pytest.mark.parametrize(("file", "old", "new", "line", "expected", "got"), [
    ("raw_sample", "7,1494137644,200", "7,1494137644,201", 2, "an adgroup_id that ad_feature.csv has", "201"),
    ("raw_sample", "1007,1,0", "1007,0,0", 2, "nonclk and clk to be 0 and 1 or 1 and 0", "0 and 0"),
    ("raw_sample", "1007,1,0", "1007,1,2", 2, "clk to be one of 0, 1", "'2'"),
    ("raw_sample", "nonclk,clk", "clk", 1, "a header with a column 'nonclk'",
     "no such name in 'user,time_stamp,adgroup_id,pid,clk'"),
    ("ad_feature", "300,60", "200,60", 4, "each adgroup_id once", "200, which stands in line 2 too"),
    ("ad_feature", "12.5", "cheap", 4, "price to be a number of 0 or more", "'cheap'"),
    ("ad_feature", "100,70", "100,NULL", 3, "cate_id to be a non-negative whole number", "'NULL'"),
    ("user_profile", "6,1,5", "7,1,5", 3, "each userid once", "7, which stands in line 2 too"),
    ("user_profile", "6,1,5", "6,one,5", 3, "cms_segid to be a non-negative whole number", "'one'"),
    ("behavior_log", "buy", "sell", 3, "btag to be one of pv, cart, fav, buy, ipv", "'sell'"),
])  # fmt: skip
def test_malformed_files_are_named(tmp_path, file, old, new, line, expected, got):
    text = FILES[f"{file}.csv"]
    assert old in text
    write(tmp_path, **{file: text.replace(old, new, 1)})
    with pytest.raises(DataError) as error:
        ali_display.read(tmp_path)
    assert str(error.value) == f"{tmp_path / file}.csv, line {line}: expected {expected}, got {got}"
