"""Ray Train with real workers on this machine. Marker `engines`: `python -m pytest -m engines`."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests import process_training as training
from tests.conftest import ROOT, child_environment
from tests.refusals import refused

pytestmark = [
    pytest.mark.lane("engines"),
    pytest.mark.timeout(900),  # of workers that import JAX and Ray, on a busy machine
    pytest.mark.filterwarnings("ignore"),  # Ray forks, of which JAX warns where tests before this have used it
]
STEPS = 24


@pytest.fixture(scope="module")
def cluster():
    """Ray with two CPUs on this machine."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    variables = {**child_environment(), "PYTHONWARNINGS": "ignore", "RAY_TRAIN_V2_ENABLED": "1"}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": variables}, log_to_driver=False)
    yield ray
    ray.shutdown()


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


def test_a_worker_that_dies(cluster, tmp_path):
    """Two workers are one job; one is killed, all start again, and end as a run that was not killed."""
    from aif_jax import checkpoint

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


def test_workers_that_are_not_one_job(cluster, tmp_path):
    """JAX was used before the workers joined: refused, never two trainings."""

    def alone(work):
        os.chdir(work["root"])
        import jax

        jax.devices()
        from aif_jax.engines import ray_train

        with ray_train.joined():
            raise AssertionError("expected workers that are refused")

    refused(Exception, "initialize", trainer({"name": "alone", "storage": str(tmp_path / "ray")}, alone).fit)
