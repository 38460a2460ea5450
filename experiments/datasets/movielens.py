"""MovieLens as a `Dataset`.

Data: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM TiiS 5, 4. The files are
GroupLens's, under its terms (research use, no commercial use); `fetch` gets them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from aif_jax.data import content as contents
from aif_jax.data.catalogue import Catalogue
from aif_jax.data.content import Content
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.movielens_files import Layout, Movies, People, Ratings, Tables, read_tables
from aif_jax.data.schema import Attribute, Schema, Vocabulary
from aif_jax.data.text_table import DataError

MAX_GENRES = 6
ACTIONS = 11  # rows: unknown, then half stars 1..10
AGE_GROUPS = (18, 25, 35, 45, 50, 56)  # lower bounds: the codes of MovieLens 1M
FIRST_YEAR, LAST_YEAR, YEARS_PER_BUCKET = 1920, 2030, 5


def read(
    path: str | os.PathLike,
    *,
    layout: Layout | None = None,
    content: Content | Literal["text"] | None = None,
    content_width: int = 64,
    category: Literal["genre", "content"] = "genre",
    categories: int = 128,
    user_id: bool = False,
    seed: int = 0,
) -> Dataset:
    """Reads MovieLens in any of its layouts.

    | feature | values |
    |---|---|
    | item `item` | every movie of the movies file, rated or not |
    | item `category` | the first genre listed, or the cluster of the content embedding |
    | item `genres` | bag of the first 6 genres listed |
    | item `year` | year of release in steps of 5 years; the first and the last step are open |
    | user `gender`, `age`, `occupation` | in 100K, 1M and RecBole files with users; age in the groups of MovieLens 1M |
    | user `user` | the user's row, with `user_id` |
    | action | twice the rating: 1 for half a star to 10 for five stars |

    There are no float features: means of ratings would have to be those of the training slice.

    Args:
      path: the folder with the files.
      layout: "100k", "1m", "csv" or "recbole"; detected where it is None.
      content: content embedding: None for none; "text" for TF-IDF and truncated SVD of titles, genres and tags (tags carry the
        time of their writing, which is not looked at); a path to an .npz with `movieId` and `embedding`; or
        (raw movie ids [n], embeddings [n, E]).
      content_width: E for "text".
      category: "genre", or "content" for k-means clusters of the content embedding: a more selective field for SIM.
      categories: how many clusters.
      user_id: adds the user's own row as a user attribute.
      seed: of the text embedding and the clusters.

    Returns:
      The data set; user and movie rows follow the ascending raw ids.

    Raises:
      DataError: a file is missing or malformed: names file, line, what was expected and what came.
      ValueError: wrong option, or a content embedding that does not fit.
      ImportError: "text" or clusters without scikit-learn.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\\n1,5,4.5,100\\n1,9,3,50\\n")
      >>> _ = (folder / "movies.csv").write_text("movieId,title,genres\\n5,Heat (1995),Crime|Drama\\n9,Babe (1995),Comedy\\n")
      >>> data = read(folder)
      >>> data.log.item.tolist(), data.log.action.tolist()
      ([2, 1], [6, 9])
    """
    if category not in ("genre", "content"):
        raise ValueError(f"category: expected 'genre' or 'content', got {category!r}")
    if category == "content" and content is None:
        raise ValueError("category='content': expected a content embedding (content=), got None")
    text = isinstance(content, str) and content == "text"
    tables = read_tables(path, layout=layout, tags=text)
    movies = tables.movies
    items = Vocabulary(movies.raw)
    order = np.argsort(movies.raw)
    embedding = None
    if text:
        embedding = contents.text_embedding([_text(movies, i) for i in order], width=content_width, seed=seed)
    elif content is not None:
        embedding = contents.align(content, items.raw)

    genres = Vocabulary([genre for listed in movies.genres for genre in listed])
    bags = _bags(movies, genres)[order]
    groups, group_of = max(len(genres), 2), bags[:, 0]
    if category == "content" and embedding is not None:
        groups, group_of = categories + 1, contents.clusters(embedding, categories, seed=seed) + 1
    users, user_attributes, user_ids = _users(tables, user_id)
    schema = Schema(
        item_attributes=(
            Attribute(name="item", size=max(len(items), 2)),
            Attribute(name="category", size=groups),
            Attribute(name="genres", size=max(len(genres), 2), length=MAX_GENRES),
            Attribute(name="year", size=(LAST_YEAR - FIRST_YEAR) // YEARS_PER_BUCKET + 3),
        ),
        user_attributes=user_attributes,
        actions=ACTIONS,
        content=0 if embedding is None else embedding.shape[1],
    )
    ids = {"category": group_of, "genres": bags, "year": _year_buckets(movies.years[order])}
    return Dataset(
        name=Path(path).name,
        schema=schema,
        log=_log(tables.ratings, users, items),
        catalogue=Catalogue.from_items(schema, items.raw, ids=ids, content=embedding),
        user_ids=user_ids,
        user_floats=np.zeros((len(users), 0), np.float32),
        users=users,
        items=items,
    )


def _log(ratings: Ratings, users: Vocabulary, items: Vocabulary) -> EventLog:
    rows = {}
    for name, raw, vocabulary in (("user", ratings.user, users), ("movie", ratings.item, items)):
        rows[name] = vocabulary.encode(raw)
        unknown = np.flatnonzero(rows[name] == 0)
        if unknown.size:
            line = ratings.first_line + int(unknown[0])
            raise DataError(ratings.path, line, f"a {name} that the {name}s' file has", f"{name} {raw[unknown[0]]}")
    return EventLog.from_arrays(
        user=rows["user"], item=rows["movie"], action=ratings.half_stars.astype(np.int32), time=ratings.time, users=len(users)
    )


def _bags(movies: Movies, genres: Vocabulary) -> np.ndarray:
    """int32 [m, MAX_GENRES] genre rows in the order listed, padded with 0."""
    listed = [genre[:MAX_GENRES] for genre in movies.genres]
    lengths = np.array([len(genre) for genre in listed])
    bags = np.zeros((len(listed), MAX_GENRES), np.int32)
    bags[np.arange(MAX_GENRES) < lengths[:, None]] = genres.encode([name for genre in listed for name in genre])
    return bags


def _year_buckets(years: np.ndarray) -> np.ndarray:
    """int32 [m]: 0 unknown, 1 before FIRST_YEAR, then 5 years each, the last one from LAST_YEAR on."""
    bounds = np.arange(FIRST_YEAR, LAST_YEAR + 1, YEARS_PER_BUCKET)
    return np.where(years > 0, np.searchsorted(bounds, years, side="right") + 1, 0).astype(np.int32)


def _users(tables: Tables, user_id: bool) -> tuple[Vocabulary, tuple[Attribute, ...], dict[str, np.ndarray]]:
    """The user vocabulary, the attributes that there are, and their ids [U]."""
    people = tables.people
    users = Vocabulary(np.unique(tables.ratings.user) if people is None else people.raw)
    columns = {"user": (len(users), np.arange(1, len(users)))} if user_id else {}
    if people is not None:
        columns |= _profile(people, np.argsort(people.raw))
    attributes = tuple(Attribute(name=name, size=max(size, 2)) for name, (size, _) in columns.items())
    return users, attributes, {name: np.append(0, rows).astype(np.int32) for name, (_, rows) in columns.items()}


def _profile(people: People, order: np.ndarray) -> dict[str, tuple[int, np.ndarray]]:
    gender, occupation = Vocabulary(["F", "M"]), Vocabulary(people.occupation)
    age = np.searchsorted(AGE_GROUPS, people.age, side="right") + 1
    return {
        "gender": (len(gender), gender.encode(people.gender)[order]),
        "age": (len(AGE_GROUPS) + 2, age[order]),
        "occupation": (len(occupation), occupation.encode(people.occupation)[order]),
    }


def _text(movies: Movies, i: int) -> str:
    return f"{movies.titles[i]}. {' '.join(movies.genres[i])}. {movies.tags[i]}"
