"""Builds the folders of public data that the figures are of, from the files of their publishers.

Command   python -m experiments.datasets.recipes movielens NEWEST OLDER OLDEST --out DIR/movielens-small-merged
          python -m experiments.datasets.recipes taobao UserBehavior.csv --out DIR/taobao-userbehavior-head100k
Time      seconds; with --embed minutes
Gives     the files of SHA256; what is not equal is named, and the exit code is 1

MovieLens: the folders of three *ml-latest-small* releases of GroupLens, of September 2018, October 2016 and April 2015, the
newest first. GroupLens offers the current one only; older ones are in web archives. A user of an older release who shares a
rating, film and second, with a user of a newer one is the same person and is left out. Users are numbered in that order,
ratings sorted by user, time and film; films without a rating are left out, the others are as in the newest release that lists
them. The rules are what the merged files show: the checksums tell. `--embed FOLDER` adds `content.npz`: the embedding of
"title. genres. tags" by the model all-MiniLM-L6-v2 in that folder (needs sentence-transformers); it has no checksum.

Taobao: the first 100,001 rows of UserBehavior.csv (Tianchi data set 649), which is grouped by user.

Both are under their publishers' terms: research, no redistribution.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from aif_jax.store.folders import new_folder

HEAD = 100_001  # rows of Taobao
SHA256 = {
    "movielens": {
        "ratings.csv": "8811a60c0435576370c79d5e394260ddde8a480a3520c1364924e9c863659116",
        "movies.csv": "8e81a571cf86e2de54fc1adb5ed38ff2ccb5cabf00b076c252654f0bd2e2034e",
        "tags.csv": "7c75c704b20c3111be01bcfaea64ea27f331165f090aa001cdda2f013c202fe5",
    },
    "taobao": {"UserBehavior_head100k.csv": "0c6c279e05316abe5990536bff9b88e606383f2d242dd9ff330cfccaf1d5b125"},
}
"""The files that the figures of docs/results.md are of."""


def movielens(releases: Sequence[Path], out: Path, *, embed: Callable[[list[str]], np.ndarray] | None = None) -> None:
    """Merge releases, folders with ratings.csv, movies.csv and tags.csv, the newest first, into the new folder `out`.

    `embed` gives embeddings of unit length [n, E] of texts, for `content.npz`; None writes none. Raises FileNotFoundError,
    FileExistsError (`out` is there), and ValueError for a file without the columns or a rated film that no movies.csv has.
    """
    ratings, movies, tags = [], {}, set()
    known: set[tuple[int, int]] = set()  # second and film of each rating so far
    users = 0
    for folder in releases:
        by_user: dict[int, list[tuple[int, int, str]]] = {}
        for row in _rows(folder / "ratings.csv", "userId", "movieId", "rating", "timestamp"):
            by_user.setdefault(int(row["userId"]), []).append((int(row["timestamp"]), int(row["movieId"]), row["rating"]))
        fresh = {user: events for user, events in sorted(by_user.items()) if not known & {event[:2] for event in events}}
        known |= {event[:2] for events in by_user.values() for event in events}
        for events in fresh.values():
            users += 1
            ratings += [(users, film, rating, second) for second, film, rating in sorted(events)]
        for row in _rows(folder / "movies.csv", "movieId", "title", "genres"):
            movies.setdefault(int(row["movieId"]), (row["title"], row["genres"]))
        tags |= {(int(row["movieId"]), row["tag"]) for row in _rows(folder / "tags.csv", "movieId", "tag")}
    rated = {film for _, film, _, _ in ratings}
    films = sorted(rated)
    if missing := [film for film in films if film not in movies]:
        raise ValueError(f"movies.csv: expected every rated film in one of the releases, got none of {missing[:5]}")
    tags = {(film, tag) for film, tag in tags if film in rated}
    with new_folder(out) as work:
        _write(work / "ratings.csv", ("userId", "movieId", "rating", "timestamp"), ratings)
        _write(work / "movies.csv", ("movieId", "title", "genres"), ((film, *movies[film]) for film in films))
        _write(work / "tags.csv", ("movieId", "tag"), sorted(tags))
        if embed is not None:
            of_film: dict[int, list[str]] = {}
            for film, tag in sorted(tags):
                of_film.setdefault(film, []).append(tag)
            texts = [f"{movies[film][0]}. {movies[film][1]}. {' '.join(of_film.get(film, []))}" for film in films]
            embedding = np.asarray(embed(texts), np.float16)
            np.savez(work / "content.npz", movieId=np.array(films, np.int32), embedding=embedding)


def taobao(file: Path, out: Path, *, rows: int = HEAD) -> None:
    """Write the first rows of UserBehavior.csv into the new folder `out`; ValueError for fewer, or not of five columns."""
    with open(file, encoding="utf-8", newline="") as source:
        head = [line.rstrip("\r\n") for line in islice(source, rows)]
    if len(head) < rows or head[0].count(",") != 4:
        columns = "user, item, category, behaviour, second"
        raise ValueError(f"{file}: expected at least {rows:,} rows of {columns}, got {len(head):,}, the first {head[:1]}")
    with new_folder(out) as work:
        (work / "UserBehavior_head100k.csv").write_bytes("".join(f"{line}\r\n" for line in head).encode())


def differing(name: str, folder: Path) -> list[str]:
    """Return files of a recipe that are not those of the figures."""
    sums = ((file, wanted, hashlib.sha256((folder / file).read_bytes()).hexdigest()) for file, wanted in SHA256[name].items())
    return [f"{file}: expected SHA-256 {wanted}, got {got}" for file, wanted, got in sums if got != wanted]


def sentence_embedding(model: str) -> Callable[[list[str]], np.ndarray]:
    """Return unit embeddings by a sentence-transformers model in a folder."""
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

    return lambda texts: SentenceTransformer(model, local_files_only=True).encode(texts, normalize_embeddings=True)


def _rows(path: Path, *columns: str) -> Iterable[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not set(columns) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: expected the columns {list(columns)}, got {reader.fieldnames}")
        yield from reader


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def main(arguments: list[str] | None = None) -> None:
    """Build a folder and compare it with that of the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="name", required=True)
    one = commands.add_parser("movielens", help="merge three releases of ml-latest-small", allow_abbrev=False)
    one.add_argument("releases", metavar="RELEASE", nargs="+", type=Path, help="folders, the newest first")
    one.add_argument("--embed", metavar="FOLDER", help="a sentence-transformers model, for content.npz")
    two = commands.add_parser("taobao", help="the head of UserBehavior.csv", allow_abbrev=False)
    two.add_argument("file", metavar="FILE", type=Path, help="UserBehavior.csv")
    for command in (one, two):
        command.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
    options = parser.parse_args(arguments)
    if options.name == "movielens":
        movielens(options.releases, options.out, embed=sentence_embedding(options.embed) if options.embed else None)
    else:
        taobao(options.file, options.out)
    problems = differing(options.name, options.out)
    print("\n".join(problems) or f"{options.out}: equal to the files of the figures")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
