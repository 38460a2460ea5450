"""A catalogue through Ray Data and through Spark, against `ItemIndex.build` in one process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet

import aif_jax as aif
from aif_jax.encoding.encoder import schema_of
from aif_jax.jobs import ItemJob
from aif_jax.output import Bar
from experiments import drawn

ROWS, SMOKE_ROWS = 10**6, 8192
KNOWN = 100_000  # items of the vocabulary; the others are new, which costs the same
FILES = 4  # a task of Spark adds about 0.11 s to its work, as much as 60,000 items: few large files
RUNS = 16  # of the item function for what an engine hands over at once
CORES = 2
PLAIN = {"compression": "none", "parquet.enable.dictionary#row": "false"}  # rows do not repeat
COLUMNS = aif.Columns(item_attributes=("brand",), item_floats=("price", "rating", "sales", "days"), side=("bid",))


class World(NamedTuple):
    """A raw catalogue in Parquet files, and a model of it."""

    files: list[Path]
    rows: int
    model: aif.PreRanker
    params: Any
    encoder: aif.Encoder

    @property
    def trained(self) -> aif.Trained:
        """The model with its encoder."""
        return aif.Trained(self.model, self.params, self.encoder)

    @property
    def batch(self) -> int:
        """Rows of a row group, and of what an engine hands over at once."""
        return min(RUNS * 1024, self.rows // 8)

    def job(self) -> ItemJob:
        """The catalogue job, its model by value."""
        return ItemJob(self.trained)


class Through(NamedTuple):
    """What became of a catalogue in an engine whose workers were warm."""

    index: aif.ItemIndex
    rows_per_s: float  # from the raw file to encoded rows outside the engine
    index_rows_per_s: float  # to the merged index
    more: dict[str, Any] = {}  # figures of another way


def measure(smoke: bool = False, *, rows: int | None = None) -> dict[str, Any]:
    """A catalogue from its raw file to an index: in one process, and through each engine.

    Returns:
      `build_rows_per_s`, `merge_rows_per_s`; for "ray" and "spark" `NAME_equal`, `NAME_rows_per_s` (to encoded rows),
      `NAME_index_rows_per_s` (to the merged index) and `NAME_over_build`, None where it is not installed; `missing`: what is
      not installed. Those of Spark are of files that tasks read and write; `spark_frame_*` are of a `DataFrame`.
    """
    missing = {name: [need for need in needs if not present(need)] for name, (needs, _) in ENGINES.items()}
    with tempfile.TemporaryDirectory() as folder:
        world = make(Path(folder), rows=rows or (SMOKE_ROWS if smoke else ROWS))
        build(world, "index, which compiles")
        index, seconds = build(world, "index in this process")
        figures: dict[str, Any] = {"catalogue_rows": world.rows, "build_rows_per_s": world.rows / seconds}
        for name, (_, run) in ENGINES.items():
            got = None if missing[name] else run(world, Path(folder))
            figures[f"{name}_equal"] = None if got is None else same(got.index, index)
            figures[f"{name}_rows_per_s"] = None if got is None else got.rows_per_s
            figures[f"{name}_index_rows_per_s"] = None if got is None else got.index_rows_per_s
            figures[f"{name}_over_build"] = None if got is None else got.rows_per_s / figures["build_rows_per_s"]
            figures |= {} if got is None else got.more
        figures["merge_rows_per_s"] = merge_rate(world)
    return figures | {"missing": sorted({need for needs in missing.values() for need in needs})}


def present(need: str) -> bool:
    """Whether a package can be imported, or Java be run."""
    return shutil.which("java") is not None if need == "java" else importlib.util.find_spec(need) is not None


def make(folder: Path, *, rows: int) -> World:
    """Draws a catalogue and writes it; the weights are as initialised."""
    rng, known = np.random.default_rng(0), min(KNOWN, rows // 2)
    columns: dict[str, Any] = {
        "item": np.arange(rows, dtype=np.int64),
        "category": rng.integers(0, 500, rows),
        "brand": rng.integers(0, 5000, rows),
        "bid": rng.uniform(0.1, 2, rows).astype(np.float32),
    }
    columns |= {name: rng.normal(size=rows).astype(np.float32) for name in COLUMNS.item_floats}
    vocabularies = {"user": [0], "item": range(known), "category": range(500), "brand": range(5000)}
    made = {name: aif.Vocabulary(list(ids)) for name, ids in vocabularies.items()}
    encoder = aif.Encoder(schema=schema_of(COLUMNS, made), columns=COLUMNS, vocabularies=made)
    model = aif.build(aif.presets.aif(encoder.schema, long_length=64))
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), drawn.catalogue(encoder.schema)))
    table, size = pa.table(columns), -(-rows // FILES)
    files = [folder / f"items-{number:02}.parquet" for number in range(FILES)]
    world = World(files, rows, model, params, encoder)
    for number, file in enumerate(files):
        parquet.write_table(table.slice(number * size, size), file, row_group_size=world.batch)
    return world


def build(world: World, label: str) -> tuple[aif.ItemIndex, float]:
    """The index as one process builds it, and the seconds that it took."""
    start = time.perf_counter()
    index = aif.ItemIndex.build(world.trained, shown(read(world), world, label), progress=False)
    ready(index)
    return index, time.perf_counter() - start


def read(world: World) -> Iterator[Any]:
    """The raw catalogue in Arrow batches."""
    for file in world.files:
        with parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(world.batch)


def shown(batches: Iterable[Any], world: World, label: str) -> Iterator[Any]:
    """The batches, with a progress bar."""
    with Bar(world.rows, label=label, unit="items") as bar:
        for batch in batches:
            yield batch
            bar.update(batch.num_rows)


def merge(world: World, parts: Any) -> aif.ItemIndex:
    """The index of encoded parts."""
    index = aif.ItemIndex.from_parts(world.trained, parts, items=world.rows, progress=False)
    ready(index)
    return index


def ready(index: aif.ItemIndex) -> None:
    """Returns when all rows are in the table."""
    with index.reading() as table:
        jax.block_until_ready(table)


def merge_rate(world: World) -> float:
    """Rows a second of the merge by itself, of parts in memory."""
    parts = list(shown(world.job()(read(world)), world, "parts"))
    start = time.perf_counter()
    merge(world, parts)
    return world.rows / (time.perf_counter() - start)


def through_ray(world: World, folder: Path) -> Through:
    """By an actor of Ray; its rate is that from the first rows that it gave to the last."""
    import ray

    from aif_jax.engines import ray_data

    ray.init(address="local", num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        encoded = ray_data.encode_items(
            ray.data.read_parquet([str(file) for file in world.files], override_num_blocks=len(world.files)),
            world.job(),
            batch_size=world.batch // 1024 * 1024,
        )
        rates, index = [], None
        for to_index in (False, True):
            started = Stopwatch(shown(encoded.iter_batches(batch_format="pyarrow", batch_size=None), world, "Ray Data"))
            if to_index:
                index = merge(world, started)
            else:
                for _ in started:
                    pass
            rates.append(started.rows_per_s())
        assert index is not None
        return Through(index, *rates)
    finally:
        ray.shutdown()


class Stopwatch:
    """Batches as they come, and the rate from the first of them on."""

    def __init__(self, batches: Iterable[Any]):
        self.batches, self.rows, self.start = batches, 0, None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.start is None:
                self.start = time.perf_counter()
            else:
                self.rows += batch.num_rows
            yield batch

    def rows_per_s(self) -> float:
        """Rows after the first batch over the seconds since it came."""
        return 0.0 if self.start is None else self.rows / (time.perf_counter() - self.start)


def through_spark(world: World, folder: Path) -> Through:
    """By Python workers of Spark, which a first run warmed, and Parquet files."""
    from pyspark.sql import SparkSession

    from aif_jax.engines import spark

    os.environ["PYSPARK_PYTHON"] = sys.executable  # else a worker is whatever "python3" is
    settings = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "true", "spark.log.level": "ERROR"}
    settings["spark.sql.execution.arrow.maxRecordsPerBatch"] = str(world.batch)
    settings["spark.sql.files.maxPartitionBytes"] = "4m"
    session = SparkSession.builder.master(f"local[{CORES}]").config(map=settings).getOrCreate()
    try:
        job, frame = world.job(), session.read.parquet(*[str(file) for file in world.files])
        ways: dict[str, Callable[[Path], object]] = {
            "files": lambda parts: spark.encode_files(session, world.files, job, parts),
            "frame": lambda parts: spark.encode_items(frame, job).write.options(**PLAIN).parquet(str(parts)),
        }
        got: dict[str, Through] = {}
        for name, run in ways.items():
            run(folder / f"warm-{name}")
            start = time.perf_counter()
            run(folder / name)
            written = time.perf_counter()
            index = merge(world, folder / name)
            got[name] = Through(index, world.rows / (written - start), world.rows / (time.perf_counter() - start))
        frame_figures = {
            "spark_frame_equal": same(got["frame"].index, got["files"].index),
            "spark_frame_rows_per_s": got["frame"].rows_per_s,
            "spark_frame_index_rows_per_s": got["frame"].index_rows_per_s,
        }
        return got["files"]._replace(more=frame_figures)
    finally:
        session.stop()


def same(a: aif.ItemIndex, b: aif.ItemIndex) -> bool:
    """Whether two indexes hold the same ids and rows, bit for bit."""
    (ids, rows), (others, more) = a.stored(), b.stored()
    leaves = zip(jax.tree.leaves(rows), jax.tree.leaves(more), strict=True)
    return np.array_equal(ids, others) and all(x.tobytes() == y.tobytes() for x, y in leaves) and a.version == b.version


ENGINES: dict[str, tuple[tuple[str, ...], Callable[[World, Path], Through]]] = {
    "ray": (("ray",), through_ray),
    "spark": (("pyspark", "java"), through_spark),
}
"""What each needs, and how it runs."""
