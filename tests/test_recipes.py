"""Folders of the figures, built from generated releases, and rebuilt from the shared data if they are there."""

import csv
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets import movielens, recipes, taobao
from tests.refusals import refused

pytestmark = pytest.mark.lane("experiments")
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


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
    texts = {path.name: path.read_bytes().decode() for path in (tmp_path / "merged").iterdir()}
    assert texts == {
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
    with pytest.raises(ValueError, match=r"movies.csv: expected every rated film in one of the releases, got none of \[99\]"):
        recipes.movielens(releases, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_head_of_taobao(tmp_path):
    rows = [f"{row // 10},{row},3,pv,{1511544070 + row}" for row in range(30)]
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    recipes.taobao(tmp_path / "all.csv", tmp_path / "head", rows=25)
    (file,) = (tmp_path / "head").iterdir()
    assert file.read_bytes() == "".join(f"{row}\r\n" for row in rows[:25]).encode()
    assert len(taobao.read(file).log) == 25
    with pytest.raises(ValueError, match="expected at least 31 rows of user, .*, got 30"):
        recipes.taobao(tmp_path / "all.csv", tmp_path / "more", rows=31)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_shared_folders_come_out_of_the_recipes_again(tmp_path):
    """The merged users, dealt to three releases with other ids, 12 of them in two, and the films in another order."""
    merged = SHARED / "movielens-small-merged"
    tables = {
        name: list(csv.reader((merged / f"{name}.csv").read_text(encoding="utf-8").splitlines(keepends=True)))[1:]
        for name in ("ratings", "movies", "tags")
    }
    movies = {int(film): rest for film, *rest in tables["movies"][::-1]}
    tags = [(1, film, tag, 5) for film, tag in tables["tags"]]
    folders = []
    for number, (first, last, again) in enumerate([(1, 610, ()), (611, 1281, (5, 600)), (1282, 1975, range(700, 710))]):
        ratings = [
            (int(user) + 3000 * (int(user) in again), film, rating, second)
            for user, film, rating, second in tables["ratings"][::-1]
            if first <= int(user) <= last or int(user) in again
        ]
        folders.append(release(tmp_path / str(number), ratings, movies, tags))
    refused(SystemExit, "0", recipes.main, ["movielens", *map(str, folders), "--out", str(tmp_path / "merged")])
    head = SHARED / "taobao-userbehavior-head100k" / "UserBehavior_head100k.csv"
    refused(SystemExit, "0", recipes.main, ["taobao", str(head), "--out", str(tmp_path / "head")])
