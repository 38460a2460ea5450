"""KuaiRand: impressions and their signals, quoted tags, and what a malformed file gets."""

import numpy as np
import pytest

from experiments.datasets import kuairand

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
VIDEO = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag\n"
)
FILES = {
    "log_standard_4_08_to_4_21_1k": LOG
    + "0,30,20220408,1200,1649390400999,1,0,0,0,0,0,1,9000,10000,0,0,0,0,1\n"
    + "0,10,20220408,1200,1649390400100,0,0,0,0,0,0,0,10,10000,0,0,0,0,1\n"
    + "4,10,20220409,1200,1649476800000,1,1,0,0,0,0,0,10,10000,0,0,0,0,1\n",
    "log_random_4_22_to_5_08_1k": LOG + "0,20,20220422,1200,1650600000000,0,0,0,0,0,1,0,10,10000,0,0,0,1,1\n",
    "video_features_basic_1k": VIDEO
    + '10,7,NORMAL,2022-04-01,ShortImport,0,10000.0,720,1280,55.0,9.0,"12,65"\n'
    + "20,7,AD,2022-04-01,LongImport,0,,720,1280,55.0,9.0,\n"
    + "30,8,NORMAL,2022-04-01,ShortImport,0,1000.0,720,1280,,4.0,65\n"
    + "99,6,NORMAL,2022-04-01,Web,0,1000.0,720,1280,,4.0,7\n",
    "user_features_1k": "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,register_days_range\n"
    + "0,full_active,0,-124,1,31-60\n"
    + "4,middle_active,0,0,,61-90\n"
    + "8,full_active,0,0,1,61-90\n",
}


def write(folder, **changed):
    for name, text in FILES.items():
        (folder / f"{name}.csv").write_text(changed.get(name, text))
    return folder


def test_events_of_all_logs(tmp_path):
    data = kuairand.read(write(tmp_path))
    assert data.users.raw.tolist() == [0, 4] and data.items.raw.tolist() == [10, 20, 30]  # video 99 was not shown
    assert data.log.user.tolist() == [1, 1, 1, 2]
    assert data.log.item.tolist() == [1, 3, 2, 1]  # the first two tie within a second and are ordered by their milliseconds
    assert data.log.time.tolist() == [1649390400, 1649390400, 1650600000, 1649476800]
    assert data.log.action.tolist() == [1, 4, 25, 6]  # nothing; click and long view; hated at random; click and like


def test_labels(tmp_path):
    data = kuairand.read(write(tmp_path))
    everything = np.arange(len(data.log))
    expected = {"is_click": [0, 1, 0, 1], "long_view": [0, 1, 0, 0], "is_like": [0, 0, 0, 1], "is_hate": [0, 0, 1, 0]}
    for signal, labels in expected.items():
        assert kuairand.labels(data, everything, signal).tolist() == labels, signal
    assert kuairand.labels(data, everything, "is_rand").tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="signal: expected one of is_click, .*, got 'is_follow'"):
        kuairand.labels(data, everything, "is_follow")


def test_exposure(tmp_path):
    write(tmp_path)
    assert len(kuairand.read(tmp_path, exposure="standard").log) == 3
    random = kuairand.read(tmp_path, exposure="random")
    assert random.log.time.tolist() == [1650600000] and random.items.raw.tolist() == [20]
    with pytest.raises(ValueError, match="exposure: expected 'all', 'standard' or 'random', got 'rand'"):
        kuairand.read(tmp_path, exposure="rand")


def test_features(tmp_path):
    data = kuairand.read(write(tmp_path), user_id=True)
    ids = data.catalogue.ids
    assert ids["tags"].tolist() == [[0] * 4, [1, 2, 0, 0], [0] * 4, [2, 0, 0, 0]]  # 12, 65; none; 65
    assert ids["category"].tolist() == [0, 1, 0, 2]
    assert ids["author"].tolist() == [0, 1, 1, 2]
    assert ids["video_type"].tolist() == [0, 2, 1, 2]  # AD, NORMAL
    assert ids["upload_type"].tolist() == [0, 2, 1, 2] and ids["music_type"].tolist() == [0, 2, 2, 1]
    np.testing.assert_allclose(data.catalogue.floats[:, 0], np.log1p([0, 10, 0, 1]), rtol=1e-6)
    assert data.user_ids["user"].tolist() == [0, 1, 2]
    assert data.user_ids["user_active_degree"].tolist() == [0, 1, 2]
    assert data.user_ids["is_live_streamer"].tolist() == [0, 1, 2]  # -124, 0
    assert data.user_ids["is_video_author"].tolist() == [0, 1, 0]  # the second is empty
    assert data.user_ids["register_days_range"].tolist() == [0, 1, 2]  # a column that not every version has
    assert data.schema.behaviour_fields == ("item", "category", "author") and data.schema.actions == 33


@pytest.mark.parametrize(("file", "old", "new", "place", "expected", "got"), [
    ("log_standard_4_08_to_4_21_1k", "4,10,20220409", "4,11,20220409", ", line 4, column 'video_id'",
     "one that video_features_basic_1k.csv has", "11"),
    ("log_random_4_22_to_5_08_1k", "0,20,20220422", "5,20,20220422", ", line 2, column 'user_id'",
     "one that user_features_1k.csv has", "5"),
    ("log_standard_4_08_to_4_21_1k", "1649390400100,0", "1649390400100,2", ", line 3, column 'is_click'",
     "one of 0, 1", "'2'"),
    ("log_standard_4_08_to_4_21_1k", "1649390400100", "noon", ", line 3, column 'time_ms'",
     "a whole number of 0 or more", "'noon'"),
    ("log_random_4_22_to_5_08_1k", ",1,1\n", ",1\n", ", line 2", "19",
     "18 in '0,20,20220422,1200,1650600000000,0,0,0,0,0,1,0,10,10000,0,0,0,1'"),
    ("video_features_basic_1k", '"12,65"', '"12,6x"', ", line 2, column 'tag'", "whole numbers, or nothing", "'12,6x'"),
    ("video_features_basic_1k", '"12,65"', "12,65", ", line 2", "12",
     "13 in '10,7,NORMAL,2022-04-01,ShortImport,0,10000.0,720,1280,55.0,9.0,12,65'"),
    ("video_features_basic_1k", "10000.0", "long", ", line 2, column 'video_duration'",
     "a number of 0 or more, or nothing", "'long'"),
    ("video_features_basic_1k", "30,8", "10,8", ", line 4, column 'video_id'", "every id once", "10, which is in line 2 too"),
    ("user_features_1k", "4,middle", "0,middle", ", line 3, column 'user_id'", "every id once", "0, which is in line 2 too"),
])  # fmt: skip
def test_malformed_files_are_named(tmp_path, file, old, new, place, expected, got):
    text = FILES[file]
    assert old in text
    write(tmp_path, **{file: text.replace(old, new, 1)})
    with pytest.raises(ValueError) as error:
        kuairand.read(tmp_path)
    start, end = f"{tmp_path / file}.csv{place}: ", f": expected {expected}, got {got}"
    assert any(line.startswith(start) and line.endswith(end) for line in str(error.value).splitlines())


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected files log_\*.csv, got no such folder"):
        kuairand.read(tmp_path / "no")
    write(tmp_path)
    (tmp_path / "user_features_1k.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected files user_features_\*.csv, got \['log_random"):
        kuairand.read(tmp_path)
