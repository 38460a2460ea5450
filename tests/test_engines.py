"""Real engines on this machine: the catalogue job on Ray Data and Spark, workers of Ray Train, replicas on Ray Serve.

`.ci/run engines` or `python -m pytest -m engines`.
Engines warn when they are imported, so they are imported within the tests, where warnings are no errors.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import dataset, parquet

import aif_jax as aif
from aif_jax import checkpoint
from aif_jax.engines.ray_serve import call, replicas
from tests import jobs_world as world
from tests import process_training as training
from tests.conftest import ROOT
from tests.refusals import refused
from tests.replicas import CALLS, USERS, World
from tests.service_world import until

pytestmark = [pytest.mark.lane("engines"), pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of workers: they find the tests' modules, and share what was compiled."""
    return {"JAX_COMPILATION_CACHE_DIR": os.environ["AIF_JAX_COMPILED"], "PYTHONPATH": str(ROOT), "RAY_TRAIN_V2_ENABLED": "1"}


@pytest.fixture(scope="module")
def ray(environment) -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody
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
    assert world.same(world.merged(strings.iter_batches(batch_format="pyarrow"), strings=True), world.built(strings=True))


BROKEN = world.items(100).set_column(4, "price", pa.array([0.0] * 40 + [float("nan")] + [0.0] * 59))
SAID = r"\(item 283\): items, row 41, column 'price': not finite: expected a finite float32, got nan"


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


STEPS = 24


def trainer(work, loop, *, failures=0):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    again = FailureConfig(max_failures=failures)
    config = RunConfig(name=work["name"], storage_path=str(work["storage"]), failure_config=again)
    return JaxTrainer(
        train_loop_per_worker=loop,
        train_loop_config={**work, "root": str(ROOT)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=config,
    )


def train(work):
    """What a worker does: `training.run` by Ray's own means; the second kills itself once, where the test says so."""
    os.chdir(work["root"])
    from aif_jax.engines import ray_train

    with ray_train.joined(work["folder"]) as job:
        mark = Path(work["folder"]) / "killed"

        def report(number, values):
            job.report(number, values)
            if work["killed_at"] == number and job.rank == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        training.go_on(training.world(job.rank, job.count), job.checkpoints, STEPS, on_log=report)


def test_a_worker_that_dies(ray, tmp_path):
    """Two workers are one job; one is killed, all start again, and end as a run that was not killed."""
    ends = []
    for name, killed_at, failures in (("whole", None, 0), ("killed", 14, 1)):
        folder = tmp_path / "ray" / name / "checkpoints"  # in the directory of Ray's run, or Ray refuses to be told of it
        work = {"name": name, "folder": str(folder), "storage": str(tmp_path / "ray"), "killed_at": killed_at}
        folder.mkdir(parents=True)
        result = trainer(work, train, failures=failures).fit()
        assert result.error is None and result.metrics["step"] == STEPS
        assert Path(result.checkpoint.path).name == str(STEPS)
        ends.append(checkpoint.load(result.checkpoint.path))
        assert (Path(work["folder"]) / "killed").exists() == (killed_at is not None)
    whole, again = ends
    assert whole.version == again.version and whole.step == again.step == STEPS
    assert whole.params["embedding"]["item"].shape == (81, 4)
    assert np.isfinite(np.asarray(whole.params["embedding"]["item"])).all()


def test_workers_that_are_not_one_job(ray, tmp_path):
    """JAX was used before the workers joined: refused, never two trainings."""

    def alone(work):
        os.chdir(work["root"])
        import jax

        jax.devices()
        from aif_jax.engines import ray_train

        with ray_train.joined(work["storage"]):
            raise AssertionError("expected workers that are refused")

    refused(Exception, "initialize", trainer({"name": "alone", "storage": str(tmp_path / "ray")}, alone).fit)


OPTIONS: dict[str, Any] = {
    "num_replicas": 2, "config": aif.ServingConfig(buckets=(64,), max_k=64), "ray_actor_options": {"num_cpus": 0.5},
    "health_check_period_s": 1,
}  # fmt: skip


@pytest.fixture
def serve(ray) -> Iterator[Any]:
    """Ray Serve without HTTP."""
    serve = pytest.importorskip("ray.serve", reason="needs the extra 'ray'")
    serve.start(proxy_location="Disabled")
    yield serve
    serve.shutdown()


def play(world: World, handle: Any, order: np.ndarray) -> float:
    """The hit share in [0, 1] of calls one after another; one whose replica died is sent again, and none mixes versions."""
    from ray.exceptions import RayActorError

    def ask(fields: dict[str, Any]) -> Any:
        while True:
            with contextlib.suppress(RayActorError):
                return call(handle, "rank", fields).result(timeout_s=60)

    played = world.play(ask, order)
    assert played["mixed"] == 0
    return played["hit_share"]


def replica_processes(application: str) -> Iterator[int]:
    """Processes of the replicas of an application of this cluster, by the title that Ray gives them."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"ServeReplica:{application}:PreRanking" in (entry / "cmdline").read_text():
                yield int(entry.name)


def test_affinity(serve, tmp_path):
    """Users find their states as often as is possible, half as often by Ray's own router, also after a replica died."""
    world = World()
    folder, ideal = world.copy(tmp_path / "served"), 1 - 1 / CALLS
    order, again = np.random.default_rng(1).permutation(np.repeat(np.arange(USERS), CALLS)), np.arange(USERS, 2 * USERS)
    own = serve.config.RequestRouterConfig()  # Ray's router, which does not know users
    handle = serve.run(replicas(folder, request_router_config=own, **OPTIONS), name="any", route_prefix=None)
    assert play(world, handle, order) < ideal - 0.1
    serve.delete("any")
    handle = serve.run(replicas(folder, **OPTIONS), name="affinity", route_prefix=None)
    assert play(world, handle, USERS + order) > ideal - 0.02

    os.kill(min(replica_processes("affinity")), signal.SIGKILL)
    play(world, handle, again)
    states = lambda: serve.status().applications["affinity"].deployments["PreRanking"].replica_states  # noqa: E731
    for both in (False, True):
        until(lambda both=both: (states().get("RUNNING", 0) == 2) == both, 180)
    for _ in range(20):  # the handle hears of the new replica after Ray says that it runs
        if play(world, handle, again) == 1:
            break
    assert play(world, handle, again) == 1
