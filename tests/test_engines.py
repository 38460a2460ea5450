"""The catalogue job on real engines: Ray Data and Spark in local mode, with processes of their own; `.ci/run engines`.

Engines warn when they are imported, so they are imported within the tests, where warnings are no errors.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import dataset, parquet

import aif_jax as aif
from tests import jobs_world as world
from tests.conftest import ROOT
from tests.refusals import refused

pytestmark = [pytest.mark.lane("engines"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of workers: they find the tests' modules, and share what was compiled."""
    return {"JAX_COMPILATION_CACHE_DIR": os.environ["AIF_JAX_COMPILED"], "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def ray(environment) -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    pytest.importorskip("ray.data", reason="needs the extra 'ray'")
    given: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=4, runtime_env={"env_vars": environment}, **given)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def spark(environment) -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="needs the extra 'spark'")
    if shutil.which("java") is None:
        pytest.skip("no java on this machine")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    settings = {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "2", "spark.log.level": "ERROR"}
    settings |= {f"spark.executorEnv.{name}": value for name, value in environment.items()}
    session = sql.SparkSession.builder.master("local[2]").config(map=settings).getOrCreate()
    yield session
    session.stop()


@pytest.fixture(scope="module")
def whole() -> aif.ItemIndex:
    return world.built()


def test_a_catalogue_through_ray(ray, whole, tmp_path):
    """Blocks that no batch fits; in memory and through files; string ids."""
    raw = ray.data.from_arrow(world.items()).repartition(3)
    encoded = aif.engines.encode_with_ray(raw, world.job(), actors=2, batch_size=128).materialize()
    assert world.same(world.merged(encoded.iter_batches(batch_format="pyarrow", batch_size=None), items=world.ITEMS), whole)
    encoded.write_parquet(str(tmp_path / "parts"))
    assert world.same(world.merged(dataset.dataset(tmp_path / "parts").to_batches(), items=world.ITEMS), whole)
    strings = aif.engines.encode_with_ray(ray.data.from_arrow(world.items(strings=True)), world.job(strings=True))
    merged = world.merged(strings.iter_batches(batch_format="pyarrow"), strings=True)
    assert world.same(merged, world.built(strings=True))


BROKEN = world.items(100).set_column(4, "price", pa.array([0.0] * 40 + [float("nan")] + [0.0] * 59))
SAID = r"row 40 \(item 283\): column 'price': expected finite values"


def test_ray_names_a_bad_item(ray):
    encoded = aif.engines.encode_with_ray(ray.data.from_arrow(BROKEN), world.job())
    refused(Exception, SAID, lambda: list(encoded.iter_batches(batch_format="pyarrow")))


def test_a_catalogue_through_spark(spark, whole, tmp_path):
    """Partitions that no batch fits; string ids; through files and in memory."""
    for strings in (False, True):
        parquet.write_table(world.items(strings=strings), tmp_path / f"items-{strings}.parquet")
        raw = spark.read.parquet(str(tmp_path / f"items-{strings}.parquet")).repartition(3)
        encoded = aif.engines.encode_with_spark(raw, world.job(strings=strings))
        encoded.write.parquet(str(tmp_path / f"parts-{strings}"))
        batches = dataset.dataset(tmp_path / f"parts-{strings}").to_batches()
        merged = world.merged(batches, strings=strings, items=world.ITEMS)
        assert world.same(merged, world.built(strings=True) if strings else whole)
        assert world.same(world.merged(encoded.toArrow().to_batches(), strings=strings), merged)


def test_spark_names_a_bad_item(spark, tmp_path):
    parquet.write_table(BROKEN, tmp_path / "items.parquet")
    encoded = aif.engines.encode_with_spark(spark.read.parquet(str(tmp_path / "items.parquet")), world.job())
    refused(Exception, SAID, encoded.collect)
