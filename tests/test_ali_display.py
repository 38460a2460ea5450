"""Ali_Display_Ad_Click: impressions with clicks, behaviours without items, and what a malformed file gets."""

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.data.pipeline import make_batch
from experiments.datasets import ali_display

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
    first, second = ali_display.PAIRS, ali_display.PAIRS + 1
    assert data.items.raw.tolist() == [100, 200, 300, first, second]  # three ads, two pairs of category and brand
    assert data.log.user.tolist() == [1, 1, 2, 2, 2, 2, 2]
    assert data.log.action.tolist() == [3, 2, 3, 6, 1, 2, 4]
    by_raw = dict(zip(data.items.raw.tolist(), range(1, 6), strict=True))
    pair_50_4, pair_60_8 = by_raw[first], by_raw[second]
    assert data.log.item.tolist() == [pair_60_8, by_raw[200], pair_60_8, pair_60_8, by_raw[200], by_raw[100], pair_50_4]


def test_features(tmp_path):
    data = ali_display.read(write(tmp_path), user_id=True)
    ids = data.catalogue.ids
    assert ids["item"].tolist() == [0, 1, 2, 3, 4, 5]
    assert ids["category"].tolist() == [0, 3, 2, 2, 1, 2]  # 50, 60, 70
    assert ids["brand"].tolist() == [0, 0, 2, 1, 1, 2]  # 4, 8; NULL is unknown
    assert ids["campaign"].tolist() == [0, 2, 2, 1, 0, 0] and ids["customer"].tolist() == [0, 2, 1, 3, 0, 0]
    np.testing.assert_allclose(data.catalogue.floats[:, 0], np.log1p([0, 0, 170, 12.5, 0, 0]), rtol=1e-6)
    assert data.user_ids["user"].tolist() == [0, 1, 2]
    assert data.user_ids["final_gender_code"].tolist() == [0, 0, 1]  # user 5 has no profile
    assert data.user_ids["pvalue_level"].tolist() == [0, 0, 0]  # empty
    assert data.user_ids["new_user_class_level"].tolist() == [0, 0, 1]
    assert data.schema.behaviour_fields == ("item", "category", "brand") and data.schema.actions == 7


def test_samples_are_impressions_and_histories_are_what_came_before(tmp_path):
    data = ali_display.read(write(tmp_path))
    positions, labels = ali_display.impressions(data)
    assert positions.tolist() == [1, 4, 5] and labels.tolist() == [1, 0, 1]
    config = aif.Config(schema=data.schema, blocks=(aif.blocks.Sim("category"), aif.blocks.Sim("brand")))
    batch = make_batch(data, positions, data.log.item[positions][:, None], labels[:, None], config=config)
    history = batch.users.history
    assert history.mask.sum(1).tolist() == [1, 2, 3]
    assert history.action[2, :3].tolist() == [1, 6, 3]  # shown, buy, pv; the cart ties with the sample and is left out
    assert history.item[2, :3].tolist() == [2, 5, 5]  # the ad, then twice the pair
    assert data.catalogue.ids["category"][history.item[2, :3]].tolist() == [2, 2, 2]


def test_without_behaviours(tmp_path):
    write(tmp_path)
    (tmp_path / "behavior_log.csv").unlink()
    data = ali_display.read(tmp_path, behaviours=False)
    assert data.items.raw.tolist() == [100, 200, 300] and len(data.log) == 3
    with pytest.raises(FileNotFoundError, match="behavior_log.csv: expected a file, got no such file"):
        ali_display.read(tmp_path)


@pytest.mark.parametrize(("file", "old", "new", "place", "expected", "got"), [
    ("raw_sample", "7,1494137644,200", "7,1494137644,201", ", line 2, column 'adgroup_id'",
     "an ad that ad_feature.csv has", "201"),
    ("raw_sample", "1007,1,0", "1007,0,0", ", line 2, column 'clk'", "0 where nonclk is 1, 1 where it is 0", "'0'"),
    ("raw_sample", "1007,1,0", "1007,1,2", ", line 2, column 'clk'", "one of 0, 1", "'2'"),
    ("raw_sample", "nonclk,clk", "clk", ", column 'nonclk'", "a column of this name",
     "the columns 'user', 'time_stamp', 'adgroup_id', 'pid', 'clk'"),
    ("ad_feature", "300,60", "200,60", ", line 4, column 'adgroup_id'", "every id once", "200, which is in line 2 too"),
    ("ad_feature", "12.5", "cheap", ", line 4, column 'price'", "a number", "'cheap'"),
    ("ad_feature", "12.5", "-1", ", line 4, column 'price'", "0 or more", "-1"),
    ("ad_feature", "100,70", "100,NULL", ", line 3, column 'cate_id'", "a whole number of 0 or more", "'NULL'"),
    ("user_profile", "6,1,5", "7,1,5", ", line 3, column 'userid'", "every id once", "7, which is in line 2 too"),
    ("user_profile", "6,1,5", "6,one,5", ", line 3, column 'cms_segid'", "a whole number of 0 or more", "'one'"),
    ("behavior_log", "buy", "sell", ", line 3, column 'btag'", "one of pv, cart, fav, buy, ipv", "'sell'"),
])  # fmt: skip
def test_malformed_files_are_named(tmp_path, file, old, new, place, expected, got):
    text = FILES[f"{file}.csv"]
    assert old in text
    write(tmp_path, **{file: text.replace(old, new, 1)})
    with pytest.raises(ValueError) as error:
        ali_display.read(tmp_path)
    start, end = f"{tmp_path / file}.csv{place}: ", f": expected {expected}, got {got}"
    assert any(line.startswith(start) and line.endswith(end) for line in str(error.value).splitlines())
