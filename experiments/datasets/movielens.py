"""MovieLens as a `Dataset`, in the file layouts that it comes in.

| layout | files | separator | from |
|---|---|---|---|
| `100k` | u.data, u.item, u.user | tab and vertical bar, latin-1 | GroupLens ml-100k |
| `1m` | ratings.dat, movies.dat, users.dat | "::", latin-1 | GroupLens ml-1m |
| `csv` | ratings.csv, movies.csv | quoted CSV with header | GroupLens 20M, 25M, 32M, latest |
| `recbole` | *.inter, *.item, *.user (optional) | tab, header of `name:type` | RecBole atomic files |

Data: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM TiiS 5, 4. The files are
GroupLens's, under its terms (research use, no commercial use); `fetch` gets them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from aif_jax import Columns, Dataset, Vocabulary
from experiments.datasets.content import clusters, lookup
from experiments.datasets.tables import UNKNOWN, Table, dataset, one_file

Layout = Literal["100k", "1m", "csv", "recbole"]
RATINGS: dict[Layout, str] = {"100k": "u.data", "1m": "ratings.dat", "csv": "ratings.csv", "recbole": "*.inter"}
"""The ratings file of each layout."""
FORMS: dict[Layout, dict[str, Any]] = {
    "100k": {"separator": "|", "encoding": "latin-1", "quoted": False},
    "1m": {"separator": "::", "encoding": "latin-1", "quoted": False},
    "csv": {},
    "recbole": {"separator": "\t", "quoted": False},
}
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
NO_GENRE = {"unknown", "(no genres listed)", UNKNOWN}
TITLE_YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)\s*$")
MAX_GENRES = 6
CLUSTERS = 128  # of the content embedding
AGE_GROUPS = (1, 18, 25, 35, 45, 50, 56)  # lower bounds: the codes of MovieLens 1M
FIRST_YEAR, LAST_YEAR, STEP = 1920, 2030, 5
BEFORE = FIRST_YEAR - STEP
"""The step of all years before the first one."""


class Movies(NamedTuple):
    """The catalogue in the order of its file."""

    ids: np.ndarray  # int64 [m]
    genres: list[list[str]]  # in the order of the file; [] where there are none
    years: list[int]  # of release, 0 unknown


def read(path: str | os.PathLike, *, content: Path | None = None, behaviour_fields: tuple[str, ...] = ()) -> Dataset:
    """Read MovieLens in any of its layouts.

    | feature | values |
    |---|---|
    | item `item` | every movie of the movies file, rated or not |
    | item `category` | the first genre listed; with a content embedding one of 128 clusters of it, more selective for SIM |
    | item `year` | first year of the step of 5 years in which it was released; the first and the last step are open |
    | item `genres` | bag of the first 6 genres listed |
    | user `gender`, `age`, `occupation` | in 100K, 1M and RecBole files with users; age in the groups of MovieLens 1M |
    | action `half_stars` | twice the rating: 1 for half a star to 10 for five stars |

    There are no float features: means of ratings would have to be those of the training slice.

    Args:
      content: an .npz with `embedding` and the ids of its movies. Needs scikit-learn.
      behaviour_fields: by what a behaviour is embedded after item and category: () or ("year",).
    """
    folder = Path(path)
    layout = detect_layout(folder)
    movies = _movies(folder, layout)
    users = _users(folder, layout)
    events = _ratings(folder, layout, movies, users)
    genres = Vocabulary([genre for listed in movies.genres for genre in listed])
    first: Any = [listed[0] if listed else UNKNOWN for listed in movies.genres]
    vocabularies = {"genres": genres, "category": genres, "year": Vocabulary(range(BEFORE, LAST_YEAR + 1, STEP))}
    items: dict[str, Any] = {"movieId": movies.ids, "genres": movies.genres, "year": [year_step(year) for year in movies.years]}
    if content is not None:
        order, items["content"] = np.argsort(movies.ids), lookup(content, movies.ids)
        first = np.empty(len(order), np.int64)
        first[order] = clusters(items["content"][order], min(CLUSTERS, len(order))) + 1
        vocabularies["category"] = Vocabulary(range(1, first.max() + 1))
    if users is not None:
        vocabularies |= {"gender": Vocabulary(["F", "M"]), "age": Vocabulary(AGE_GROUPS)}
    profile = ("gender", "age", "occupation") if users is not None else ()
    columns = Columns(
        user="userId", item="movieId", time="timestamp", action="half_stars", actions=tuple(range(1, 11)),
        item_attributes=("year",), item_bags=("genres",), bag_length=MAX_GENRES, behaviour_fields=behaviour_fields,
        user_attributes=profile, content=None if content is None else "content",
    )  # fmt: skip
    tables: dict[str, Any] = {"events": events, "items": items | {"category": first}, "users": users}
    return dataset(folder.name, columns=columns, vocabularies=vocabularies, **tables)


def detect_layout(folder: Path) -> Layout:
    """Return the layout whose ratings file is there. Raises ValueError unless exactly one is."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with MovieLens files, got no such folder")
    found: list[Layout] = [layout for layout, pattern in RATINGS.items() if any(folder.glob(pattern))]
    if len(found) != 1:
        got = f"layouts {found}" if found else f"{sorted(p.name for p in folder.iterdir())[:8]}"
        raise ValueError(f"{folder}: expected one of {', '.join(RATINGS.values())}, got {got}")
    return found[0]


def year_step(year: int) -> int | None:
    """Return first year of a year's step, BEFORE for all before FIRST_YEAR; None for 0, an unknown year."""
    return min(max(year - year % STEP, BEFORE), LAST_YEAR) if year else None


def _ratings(folder: Path, layout: Layout, movies: Movies, users: dict[str, Any] | None) -> dict[str, np.ndarray]:
    columns, form = ("userId", "movieId", "rating", "timestamp"), FORMS[layout]
    if layout == "recbole":
        columns = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    elif layout != "csv":
        form = {**form, "names": columns} | ({"separator": "\t"} if layout == "100k" else {})
    user, movie, stars, time = columns
    kinds = {user: "integer", movie: "integer", stars: "float", time: "integer"}
    table = Table(one_file(folder, RATINGS[layout]), kinds, **form)
    doubled = table[stars] * 2
    good = (doubled == np.rint(doubled)) & (doubled >= 1) & (doubled <= 10)
    if layout in ("100k", "1m"):
        table.expect(good & (doubled % 2 == 0), stars, "a rating of 1, 2, 3, 4, 5")
    table.expect(good, stars, "a rating of 0.5, 1, 1.5, ..., 5")
    table.expect(np.isin(table[movie], movies.ids), movie, "a movie that the movies' file has")
    if users is not None:
        table.expect(np.isin(table[user], users["userId"]), user, "a user that the users' file has")
    values = table[user], table[movie], doubled.astype(np.int64), table[time]
    return dict(zip(("userId", "movieId", "half_stars", "timestamp"), values, strict=True))


def _movies(folder: Path, layout: Layout) -> Movies:
    if layout == "100k":
        names = ("movieId", "title", "release date", "video release date", "IMDb URL", *GENRES_100K)
        kinds = {"movieId": "integer"} | dict.fromkeys(("release date", *GENRES_100K), "text")
        table = Table(folder / "u.item", kinds, names=names, **FORMS[layout])
        for name in GENRES_100K:
            table.expect(np.isin(table[name], ["0", "1"]), name, "a genre flag of 0 or 1")
        flags = np.stack([table[name] == "1" for name in GENRES_100K], axis=1)
        genres = [[GENRES_100K[i] for i in np.flatnonzero(row)] for row in flags]
        return _checked(table, "movieId", genres, (date[-4:] for date in table["release date"]))
    if layout == "recbole":
        columns = ("item_id:token", "release_year:token", "class:token_seq")
        kinds = {columns[0]: "integer"} | dict.fromkeys(columns[1:], "text")
        table = Table(one_file(folder, "*.inter").with_suffix(".item"), kinds, **FORMS[layout])
        genres = [text.split(" ") for text in table[columns[2]]]
        return _checked(table, columns[0], genres, table[columns[1]])
    kinds = {"movieId": "integer", "title": "text", "genres": "text"}
    path, names = (folder / "movies.dat", tuple(kinds)) if layout == "1m" else (folder / "movies.csv", ())
    table = Table(path, kinds, names=names, **FORMS[layout])
    found = map(TITLE_YEAR.search, table["title"])
    genres = [text.split("|") for text in table["genres"]]
    return _checked(table, "movieId", genres, (year[1] if year else UNKNOWN for year in found))


def _checked(table: Table, column: str, genres: list[list[str]], years: Iterable[str]) -> Movies:
    table.expect_once(column)
    known = [[genre for genre in listed if genre not in NO_GENRE] for listed in genres]
    numbers = [int(year) if re.fullmatch(r"\d{4}", year) else 0 for year in years]
    return Movies(table[column], known, numbers)


def _users(folder: Path, layout: Layout) -> dict[str, Any] | None:
    """Return raw values of the users; None where the layout has none."""
    if layout == "csv":
        return None
    columns = ("userId", "gender", "age", "occupation")
    path, names = folder / "users.dat", (*columns, "zip code")
    if layout == "recbole":
        if not any(folder.glob("*.user")):
            return None
        columns = ("user_id:token", "gender:token", "age:token", "occupation:token")
        path, names = one_file(folder, "*.user"), ()
    elif layout == "100k":
        path, names = folder / "u.user", ("userId", "age", "gender", "occupation", "zip code")
    user, gender, age, occupation = columns
    kinds = {user: "integer", gender: "text", age: "integer", occupation: "text"}
    table = Table(path, kinds, names=names, **FORMS[layout])
    table.expect_once(user)
    table.expect(np.isin(table[gender], ["F", "M"]), gender, "F or M")
    group = np.array(AGE_GROUPS)[np.searchsorted(AGE_GROUPS[1:], table[age], side="right")]
    return {"userId": table[user], "gender": table[gender], "age": group, "occupation": table[occupation]}
