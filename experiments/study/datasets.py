"""The data sets of the study, each with its split.

They are made from their files in a few seconds, and are always the same.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from aif_jax.data import Dataset, Split, split_by_time
from aif_jax.data.statistics import ItemStatistics
from experiments.datasets import movielens, taobao
from experiments.datasets.content import unit_rows
from experiments.datasets.synthetic import synthetic_world

CONTENT = 64  # width that wide content embeddings are reduced to
FOLDERS = {"movielens": "movielens-small-merged", "taobao": "taobao-userbehavior-head100k"}
NAMES = ("movielens", "taobao", "smoke")
HALF_LIVES = (86_400, 30 * 86_400)  # of item statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyData:
    """A data set ready for the study."""

    name: str
    dataset: Dataset
    split: Split  # by time
    sim_fields: tuple[str, ...] = ("item", "category")  # with a SIM cache

    @property
    def repeats(self) -> bool:
        """Whether users come back to items: they stay candidates of the catalogue then."""
        return bool(self.dataset.repeats)


def load(name: str, folder: Path | None = None) -> StudyData:
    """Return a data set by a name of NAMES; `folder` holds its own folder, see FOLDERS, which smoke runs do not need."""
    if name in FOLDERS:
        if folder is None:
            raise ValueError(f"data set {name!r}: expected --data DIR, the folder that holds {FOLDERS[name]}, got none")
        if name == "movielens":
            files = folder / FOLDERS[name]
            dataset = movielens.read(files, content=files / "content.npz", behaviour_fields=("year",))
            split = split_by_time(dataset.log)
            dataset, fields = with_content(dataset, reduced(np.asarray(dataset.catalogue.items.content))), ("category", "year")
            return StudyData(name=name, dataset=dataset, split=split, sim_fields=fields)
        dataset = taobao.read(folder / FOLDERS[name], between=taobao.WINDOW)
        split = split_by_time(dataset.log)
        return StudyData(name=name, dataset=with_content(dataset, _company(dataset, split.train)), split=split)
    if name != "smoke":
        raise ValueError(f"data set: expected one of {NAMES}, got {name!r}")
    world = synthetic_world(0, users=60, items=200, topics=10, categories=10, events_per_user=80, interests=3)
    return StudyData(name=name, dataset=world.dataset, split=split_by_time(world.dataset.log))


def with_statistics(data: StudyData) -> StudyData:
    """Return the data with item statistics as of each request among the inputs."""
    dataset, before = data.dataset, data.dataset.encoder
    assert before is not None
    columns = dataclasses.replace(before.columns, item_statistics=HALF_LIVES)
    encoder = dataclasses.replace(before, columns=columns)
    latest = ItemStatistics(encoder.schema, dataset.log).at(np.arange(len(dataset.catalogue)), dataset.log.time.max() + 1)
    items = dataset.catalogue.items
    items = dataclasses.replace(items, floats=np.concatenate([items.floats, latest], 1))
    catalogue = dataclasses.replace(dataset.catalogue, schema=encoder.schema, items=items)
    dataset = dataclasses.replace(dataset, catalogue=catalogue, encoder=encoder)
    return dataclasses.replace(data, dataset=dataset)


def with_content(dataset: Dataset, content: np.ndarray) -> Dataset:
    """Return the data set with another content embedding float32 [N, E]."""
    schema = dataclasses.replace(dataset.schema, content=content.shape[1], encoding="")
    encoder = dataset.encoder and dataclasses.replace(dataset.encoder, content=content.shape[1])
    items = dataclasses.replace(dataset.catalogue.items, content=content)
    catalogue = dataclasses.replace(dataset.catalogue, schema=schema, items=items)
    return dataclasses.replace(dataset, catalogue=catalogue, encoder=encoder)


def _company(dataset: Dataset, positions: np.ndarray) -> np.ndarray:
    """Return content for items that come without: which categories their category is met with, float32 [N, CONTENT].

    Categories of one user's training events are counted in pairs; the main directions of the positive pointwise mutual
    information represent the category, and a short random direction tells the items of a category apart.
    """
    log, category = dataset.log, dataset.catalogue.items.ids["category"]
    size = int(category.max()) + 1
    met = np.zeros((log.users, size), np.float32)
    met[log.user[positions], category[log.item[positions]]] = 1
    pairs = (met.T @ met).astype(np.float64)
    own = np.maximum(np.diag(pairs).copy(), 1)
    information = np.log(np.maximum(pairs * len(met) / np.outer(own, own), 1.0))
    values, vectors = np.linalg.eigh(information)
    top = np.argsort(-np.abs(values))[:CONTENT]
    direction = unit_rows(vectors[:, top] * np.sqrt(np.abs(values[top])))
    rng = np.random.default_rng(0)
    unmet = ~direction.any(1)
    direction[unmet] = unit_rows(rng.normal(size=(int(unmet.sum()), CONTENT)))
    content = direction[category] + 0.5 * unit_rows(rng.normal(size=(len(category), CONTENT)))
    content[0] = 0
    return unit_rows(content)


def reduced(content: np.ndarray, width: int = CONTENT) -> np.ndarray:
    """Return the main directions about the origin, rows of unit length: float32 [N, width]. Looks at the catalogue alone."""
    if content.shape[1] <= width:
        return unit_rows(content)
    values, vectors = np.linalg.eigh(content.T.astype(np.float64) @ content)
    return unit_rows(content @ vectors[:, np.argsort(values)[::-1][:width]])
