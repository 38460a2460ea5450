"""The file layouts that MovieLens comes in, each read into the same tables.

| layout | files | separator | from |
|---|---|---|---|
| `100k` | u.data, u.item, u.user | tab and vertical bar, latin-1 | GroupLens ml-100k |
| `1m` | ratings.dat, movies.dat, users.dat | "::", latin-1 | GroupLens ml-1m |
| `csv` | ratings.csv, movies.csv, tags.csv (optional) | quoted CSV with header | GroupLens 20M, 25M, 32M, latest |
| `recbole` | *.inter, *.item, *.user (optional) | tab, header of `name:type` | RecBole atomic files |
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from aif_jax.data.text_table import DataError, Kind, number_blocks, text_rows, whole_number

Layout = Literal["100k", "1m", "csv", "recbole"]

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
NO_GENRE = {"unknown", "(no genres listed)", ""}
TITLE_YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ratings:
    """Ratings in the order of the file: n of them."""

    path: Path
    first_line: int  # where rating 0 stands
    user: np.ndarray  # int [n] raw id
    item: np.ndarray  # int [n] raw id
    half_stars: np.ndarray  # int8 [n] twice the rating, 1..10
    time: np.ndarray  # int64 [n] seconds


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Movies:
    """The catalogue in the order of the file."""

    raw: np.ndarray  # int64 [m] raw id
    titles: list[str]
    genres: list[tuple[str, ...]]  # in the order of the file; () where there are none
    years: np.ndarray  # int64 [m] year of release, 0 unknown
    tags: list[str]  # all tags of the movie, space separated


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class People:
    """The users in the order of the file."""

    raw: np.ndarray  # int64 [u] raw id
    gender: list[str]  # "F" or "M"
    age: np.ndarray  # int64 [u] years
    occupation: list[str]  # a word or a code


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """What a folder holds."""

    layout: Layout
    ratings: Ratings
    movies: Movies
    people: People | None


def detect_layout(folder: Path) -> Layout:
    """The layout whose ratings file is there. Raises DataError unless exactly one is."""
    if not folder.is_dir():
        raise DataError(folder, None, "a folder with MovieLens files", "no such folder")
    patterns: dict[Layout, str] = {"100k": "u.data", "1m": "ratings.dat", "csv": "ratings.csv", "recbole": "*.inter"}
    found: list[Layout] = [layout for layout, pattern in patterns.items() if any(folder.glob(pattern))]
    if len(found) != 1:
        got = f"layouts {found}: name one with layout=" if found else f"{sorted(p.name for p in folder.iterdir())[:8]}"
        raise DataError(folder, None, "one of u.data, ratings.dat, ratings.csv, *.inter", got)
    return found[0]


def read_tables(path: str | os.PathLike, *, layout: Layout | None = None, tags: bool = False) -> Tables:
    """Reads the files of a folder.

    Args:
      path: the folder.
      layout: which files to look for; detected where it is None.
      tags: whether to read tags.csv, where there is one.

    Raises:
      DataError: names file, line, what was expected and what came.
      ValueError: unknown layout.
    """
    folder = Path(path)
    layout = detect_layout(folder) if layout is None else layout
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected one of {get_args(Layout)}, got {layout!r}")
    if not folder.is_dir():
        raise DataError(folder, None, "a folder with MovieLens files", "no such folder")
    return {"100k": _read_100k, "1m": _read_1m, "csv": _read_csv, "recbole": _read_recbole}[layout](folder, tags)


def _read_100k(folder: Path, tags: bool) -> Tables:
    columns: dict[str, Kind] = {"user": "id", "item": "id", "rating": "decimal", "time": "integer"}
    ratings = _ratings(folder / "u.data", columns, separator="\t", half_stars=False)
    fields = ("movie id", "title", "release date", "video release date", "IMDb URL", *GENRES_100K)

    def movie(path: Path, line: int, row: list[str]) -> tuple[str, tuple[str, ...], int]:
        for name, flag in zip(GENRES_100K, row[5:], strict=True):
            if flag not in ("0", "1"):
                raise DataError(path, line, f"the genre flag {name!r} to be 0 or 1", repr(flag))
        year = row[2][-4:]
        genres = tuple(name for name, flag in zip(GENRES_100K, row[5:], strict=True) if flag == "1")
        return row[1], genres, int(year) if year.isdigit() else 0

    movies = _movies(folder / "u.item", fields, movie, separator="|", encoding="latin-1")
    people = _people(folder / "u.user", ("id", "age", "gender", "occupation", "zip code"), separator="|", encoding="latin-1")
    return Tables(layout="100k", ratings=ratings, movies=movies, people=people)


def _read_1m(folder: Path, tags: bool) -> Tables:
    columns: dict[str, Kind] = {"UserID": "id", "MovieID": "id", "Rating": "decimal", "Timestamp": "integer"}
    ratings = _ratings(folder / "ratings.dat", columns, separator="::", half_stars=False)
    fields = ("MovieID", "Title", "Genres")
    movies = _movies(folder / "movies.dat", fields, _title_and_genres, separator="::", encoding="latin-1")
    fields = ("UserID", "gender", "age", "occupation", "Zip-code")
    people = _people(folder / "users.dat", fields, separator="::", encoding="latin-1")
    return Tables(layout="1m", ratings=ratings, movies=movies, people=people)


def _read_csv(folder: Path, tags: bool) -> Tables:
    columns: dict[str, Kind] = {"userId": "id", "movieId": "id", "rating": "decimal", "timestamp": "integer"}
    ratings = _ratings(folder / "ratings.csv", columns, separator=",", half_stars=True, header=True)
    fields = ("movieId", "title", "genres")
    movies = _movies(folder / "movies.csv", fields, _title_and_genres, separator=",", header=True, quoted=True)
    if tags and (folder / "tags.csv").is_file():
        movies = dataclasses.replace(movies, tags=_tags(folder / "tags.csv", movies.raw))
    return Tables(layout="csv", ratings=ratings, movies=movies, people=None)


def _read_recbole(folder: Path, tags: bool) -> Tables:
    stems = sorted(path.stem for path in folder.glob("*.inter"))
    if len(stems) != 1:
        raise DataError(folder, None, "one *.inter file", f"{len(stems)}: {stems[:8]}")
    columns: dict[str, Kind] = {"user_id": "id", "item_id": "id", "rating": "decimal", "timestamp": "decimal"}
    ratings = _ratings(folder / f"{stems[0]}.inter", columns, separator="\t", half_stars=True, header=True)

    def movie(path: Path, line: int, row: list[str]) -> tuple[str, tuple[str, ...], int]:
        return row[1], tuple(row[3].split(" ")), int(row[2]) if re.fullmatch(r"\d{4}", row[2]) else 0

    fields = ("item_id", "movie_title", "release_year", "class")
    movies = _movies(folder / f"{stems[0]}.item", fields, movie, separator="\t", header=True)
    users = folder / f"{stems[0]}.user"
    fields = ("user_id", "age", "gender", "occupation")
    people = _people(users, fields, separator="\t", header=True) if users.is_file() else None
    return Tables(layout="recbole", ratings=ratings, movies=movies, people=people)


def _ratings(path: Path, columns: dict[str, Kind], *, separator: str, half_stars: bool, header: bool = False) -> Ratings:
    scale = "0.5, 1, 1.5, ..., 5" if half_stars else "1, 2, 3, 4, 5"
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for first, block in number_blocks(path, columns, separator=separator, header=header):
        user, item, rating, time = block.values()
        doubled = rating * 2
        bad = (doubled != np.rint(doubled)) | (doubled < 1) | (doubled > 10)
        if not half_stars:
            bad |= doubled % 2 != 0
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise DataError(path, first + row, f"a rating of {scale}", f"{rating[row]:g}")
        for part, values in zip(parts, (user, item, doubled.astype(np.int8), time.astype(np.int64)), strict=True):
            part.append(values)
    user, item, doubled, time = (np.concatenate(part) for part in parts)
    return Ratings(path=path, first_line=2 if header else 1, user=user, item=item, half_stars=doubled, time=time)


def _movies(
    path: Path,
    fields: tuple[str, ...],
    parse: Callable[[Path, int, list[str]], tuple[str, tuple[str, ...], int]],
    *,
    separator: str,
    header: bool = False,
    quoted: bool = False,
    encoding: str = "utf-8",
) -> Movies:
    lines: dict[int, int] = {}
    parsed = []
    for line, row in text_rows(path, fields, separator=separator, header=header, quoted=quoted, encoding=encoding):
        _add_once(path, line, fields[0], row[0], lines)
        title, genres, year = parse(path, line, row)
        parsed.append((title, tuple(genre for genre in genres if genre not in NO_GENRE), year))
    if not parsed:
        raise DataError(path, 2, "at least one movie", "the end of the file")
    titles, genres, years = zip(*parsed, strict=True)
    return Movies(
        raw=np.array(list(lines), np.int64),
        titles=list(titles),
        genres=list(genres),
        years=np.array(years, np.int64),
        tags=[""] * len(parsed),
    )


def _title_and_genres(path: Path, line: int, row: list[str]) -> tuple[str, tuple[str, ...], int]:
    year = TITLE_YEAR.search(row[1])
    return row[1], tuple(row[2].split("|")), int(year[1]) if year else 0


def _people(path: Path, fields: tuple[str, ...], *, separator: str, header: bool = False, encoding: str = "utf-8") -> People:
    lines: dict[int, int] = {}
    gender, age, occupation = [], [], []
    for line, row in text_rows(path, fields, separator=separator, header=header, encoding=encoding):
        _add_once(path, line, fields[0], row[0], lines)
        gender.append(row[fields.index("gender")])
        if gender[-1] not in ("F", "M"):
            raise DataError(path, line, "gender to be F or M", repr(gender[-1]))
        age.append(whole_number(path, line, "age", row[fields.index("age")]))
        occupation.append(row[fields.index("occupation")])
    return People(raw=np.array(list(lines), np.int64), gender=gender, age=np.array(age, np.int64), occupation=occupation)


def _tags(path: Path, movies: np.ndarray) -> list[str]:
    tags: dict[int, list[str]] = {int(movie): [] for movie in movies}
    for line, (movie, tag) in text_rows(path, ("movieId", "tag"), header=True, quoted=True):
        number = whole_number(path, line, "movieId", movie)
        if number not in tags:
            raise DataError(path, line, "a movieId that movies.csv has", movie)
        tags[number].append(tag)
    return [" ".join(found) for found in tags.values()]


def _add_once(path: Path, line: int, name: str, text: str, lines: dict[int, int]) -> None:
    raw = whole_number(path, line, name, text)
    if raw in lines:
        raise DataError(path, line, f"each {name} once", f"{raw}, which stands in line {lines[raw]} too")
    lines[raw] = line
