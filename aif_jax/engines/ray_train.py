"""Ray Train: makes the workers of a `JaxTrainer` one job of `jax.distributed`, and reports metrics and checkpoints to Ray.

On CPUs `JaxTrainer` (Ray 2.60) does not initialise `jax.distributed`, so each worker would train a separate model.
"""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from aif_jax.checkpoint import Checkpoints
from aif_jax.checks import expect, needs_extra


class Worker:
    """This worker of a job: `rank` of `count`, and the `checkpoints` of the run."""

    def __init__(self, train: Any, checkpoints: Checkpoints):
        self.rank, self.count = train.get_context().get_world_rank(), train.get_context().get_world_size()
        self.checkpoints, self._train = checkpoints, train
        self._reported: int | None = None

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Report the figures of a log entry, and the newest checkpoint where it is new to Ray.

        For `train.loop(on_log=worker.report)`. Every worker must make this call, as `ray.train.report` waits for all.
        """
        checkpoint = None
        if (latest := self.checkpoints.latest) != self._reported:
            self._reported = latest
            if self.rank == 0:
                checkpoint = self._train.Checkpoint.from_directory(self.checkpoints.directory / str(latest))
        stays = self._train.CheckpointUploadMode.NO_UPLOAD  # where all workers have written it
        self._train.report({**values, "step": step}, checkpoint=checkpoint, checkpoint_upload_mode=stays)


@contextlib.contextmanager
def joined(folder: str | Path, **options: Any) -> Iterator[Worker]:
    """Join the workers of a trainer into one job; for `train_loop_per_worker`, before anything else uses a device.

    At the end of the block the last checkpoint is reported, so that `Result.checkpoint` names it. A worker that dies ends the
    others; with `FailureConfig(max_failures=...)` Ray starts all again, and `train.resume` goes on from the last checkpoint.

    Args:
      folder: folder of the run's checkpoints, an absolute path on a disk that all workers see.
      options: keyword arguments of `Checkpoints`.

    Raises:
      ValueError: a relative path: a worker has another working directory.
      RuntimeError: the workers are not one job, or JAX was used before.
    """
    expect(Path(folder).is_absolute(), "joined folder", "an absolute path: workers change directory", folder)
    with needs_extra("Ray Train needs Ray", "ray"):
        import ray  # pyright: ignore[reportMissingImports]
        from ray import train  # pyright: ignore[reportMissingImports]
        from ray.train.collective import broadcast_from_rank_zero  # pyright: ignore[reportMissingImports]

    worker = Worker(train, Checkpoints(folder, **options))
    rank, count = worker.rank, worker.count
    if start := count > 1 and not jax.distributed.is_initialized():
        with socket.create_server(("", 0)) as free:
            address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
        jax.distributed.initialize(broadcast_from_rank_zero(address if rank == 0 else None), count, rank)
    index, of = jax.process_index(), jax.process_count()
    wanted, got = f"process {rank} of {count} of jax.distributed", f"process {index} of {of}"
    expect((index, of) == (rank, count), f"worker {rank} of {count}", wanted, got, error=RuntimeError)
    with worker.checkpoints:
        yield worker
    latest = worker.checkpoints.latest  # all is saved now
    if latest is not None and latest != worker._reported:
        worker.report(latest, {})
    if start:
        jax.distributed.shutdown()
