"""Ray Train: makes the workers of a `JaxTrainer` one job of `jax.distributed`, and reports metrics and checkpoints to Ray.

On CPUs `JaxTrainer` does not initialise `jax.distributed`: each worker is alone and trains a separate model, silently (Ray
2.60). `joined` does it, and refuses workers that are not one job. The extra is `ray`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from aif_jax.checkpoint import Checkpoints
from aif_jax.checks import expect, needs_extra


@dataclasses.dataclass(kw_only=True)
class Worker:
    """This worker of a job.

    Attributes:
      rank: rank of this worker; that of its process.
      count: workers.
      checkpoints: checkpoints of the run, where the job has a folder.
    """

    rank: int
    count: int
    checkpoints: Checkpoints | None = None
    _reported: int | None = None

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Reports the figures of a log entry, and the newest checkpoint where it is new to Ray.

        For `train.loop(on_log=worker.report)`.

        Every worker must make this call, as `ray.train.report` waits for all.
        """
        with needs_extra("Ray Train needs Ray", "ray"):
            from ray import train  # pyright: ignore[reportMissingImports]

        checkpoint = None
        if self.checkpoints is not None and (latest := self.checkpoints.latest) != self._reported:
            self._reported = latest
            if self.rank == 0:
                checkpoint = train.Checkpoint.from_directory(self.checkpoints.directory / str(latest))
        stays = train.CheckpointUploadMode.NO_UPLOAD  # where all workers have written it
        train.report({**values, "step": step}, checkpoint=checkpoint, checkpoint_upload_mode=stays)


@contextlib.contextmanager
def joined(folder: str | Path | None = None, **options: object) -> Iterator[Worker]:
    """Joins the workers of a trainer into one job; for `train_loop_per_worker`, before anything else uses a device.

    At the end of the block the last checkpoint is reported, so that `Result.checkpoint` names it. A worker that dies ends the
    others; with `FailureConfig(max_failures=...)` Ray starts all again, and `train.resume` goes on from the last checkpoint.

    Args:
      folder: folder of the run's checkpoints, an absolute path on a disk that all workers see; None for none.
      options: keyword arguments of `Checkpoints`.

    Raises:
      ValueError: a relative path: a worker has another working directory.
      RuntimeError: the workers are not one job, or JAX was used before.
    """
    fits = folder is None or Path(folder).is_absolute()
    expect(fits, "joined folder", "an absolute path, as workers change directory", folder)
    with needs_extra("Ray Train needs Ray", "ray"):
        from ray import train  # pyright: ignore[reportMissingImports]
        from ray.train.collective import broadcast_from_rank_zero  # pyright: ignore[reportMissingImports]

    context = train.get_context()
    rank, count = context.get_world_rank(), context.get_world_size()
    started = False
    if count > 1 and not jax.distributed.is_initialized():
        address = broadcast_from_rank_zero(_free_address() if rank == 0 else None)
        jax.distributed.initialize(address, count, rank)
        started = True
    if (jax.process_count(), jax.process_index()) != (count, rank):
        got = f"process {jax.process_index()} of {jax.process_count()}"
        raise RuntimeError(f"worker {rank} of {count}: expected to be that process of jax.distributed, got {got}")
    worker = Worker(rank=rank, count=count)
    if folder is None:
        yield worker
    else:
        with Checkpoints(folder, **options) as worker.checkpoints:  # type: ignore[arg-type]  waits for what is being saved
            yield worker
    if worker.checkpoints is not None and (latest := worker.checkpoints.latest) is not None and latest != worker._reported:
        worker.report(latest, {})
    if started:
        jax.distributed.shutdown()


def _free_address() -> str:
    with needs_extra("Ray Train needs Ray", "ray"):
        import ray  # pyright: ignore[reportMissingImports]

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
