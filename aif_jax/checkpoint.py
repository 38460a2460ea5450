"""Checkpoints: parameters, config and what a resumed run needs, in one Orbax folder that checks itself.

`save` and `load` handle one folder; `Checkpoints` keeps the last and the best of a run. A folder appears under its name only
when it is complete, so a crash at any moment leaves the earlier ones as they were. Inside, beside the arrays, stands a record:
config with schema, step, position, metrics, and a SHA-256 of every leaf, which `load` compares with what it read. Other
programs can read the arrays with Orbax alone: they lie as nested dicts named `params` and `opt_state`. `write` and `read` are
the same for any trees. Source: ours, on Orbax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

import aif_jax
from aif_jax.config import Config
from aif_jax.leaves import AlteredError, abstract, decode, encode, place
from aif_jax.trees import describe, differences, leaves_by_path, listed, mismatches, nest
from aif_jax.types import Params
from aif_jax.version import Digest, combine, digests

FORMAT = "aif_jax.checkpoint/1"
METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax writes it last, before the folder gets its name


class CheckpointError(AlteredError):
    """A checkpoint that is torn, altered, or not one of this library."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder held.

    Attributes:
      params: all groups of the model, the signature matrix in `frozen` included.
      config: with its schema.
      version: fingerprint of params and config, see `aif_jax.version.fingerprint`.
      step: training steps behind it.
      opt_state: optimizer state, or None where `load` got no template for it.
      position: where the data stream stood, as given to `save`.
      metrics: figures of this step by name.
    """

    params: Params
    config: Config
    version: str
    step: int = 0
    opt_state: Any = None
    position: Any = None
    metrics: dict[str, float] | None = None

    def __repr__(self) -> str:
        held = "with optimizer state, " if self.opt_state is not None else ""
        return f"Checkpoint(step={self.step}, {held}metrics={self.metrics}, version={self.version[:12]}...)"


def save(
    path: str | Path,
    params: Params,
    config: Config,
    *,
    step: int = 0,
    opt_state: Any = None,
    position: Any = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes a checkpoint folder: complete, or not there at all.

    Args:
      path: a folder that does not exist yet.
      params: all groups of the model; arrays of any dtype that Orbax knows, of any sharding in this process, typed keys.
      config: with its schema.
      step: training steps so far.
      opt_state: any pytree of arrays, such as an optax state.
      position: plain JSON value that tells where to go on: epoch, batch, offset in the update stream, seed.
      metrics: figures by name.

    Raises:
      FileExistsError: something is there already; nothing is ever overwritten.
      ValueError: a position that is not plain JSON, or a leaf that is no array.

    Example:
      >>> import tempfile, jax, aif_jax as aif
      >>> from aif_jax import checkpoint
      >>> config = aif.tiny()
      >>> params = {"embedding": {"category": jax.numpy.ones((6, 8))}}
      >>> folder = tempfile.mkdtemp() + "/first"
      >>> checkpoint.save(folder, params, config, step=7)
      >>> checkpoint.load(folder, config=config).step
      7
    """
    trees, record = _contents(params, config, step=step, opt_state=opt_state, position=position, metrics=metrics)
    write(path, trees, record, format=FORMAT)


def load(path: str | Path, *, config: Config | None = None, like: Mapping[str, Any] | None = None) -> Checkpoint:
    """Reads a checkpoint folder and checks every leaf of it.

    Args:
      path: what `save` wrote.
      config: the config that is expected; None takes the one inside.
      like: templates under "params" and "opt_state": trees of arrays or `jax.ShapeDtypeStruct`. A template leaf with a
        sharding is restored onto that sharding, whatever the one it was saved with; a NumPy leaf stays in NumPy. Without a
        template, params come as nested dicts on the default device, and the optimizer state is not read.

    Returns:
      A `Checkpoint`.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn, altered or foreign folder; says which part.
      ValueError: a config or schema other than expected, or leaves missing, renamed or resized against the template: by name.

    Example:
      >>> import tempfile, jax, optax, aif_jax as aif
      >>> from aif_jax import checkpoint
      >>> config = aif.tiny()
      >>> params = {"embedding": {"category": jax.numpy.ones((6, 8))}}
      >>> state = optax.adam(1e-3).init(params)
      >>> folder = tempfile.mkdtemp() + "/first"
      >>> checkpoint.save(folder, params, config, opt_state=state)
      >>> template = jax.eval_shape(optax.adam(1e-3).init, params)
      >>> type(checkpoint.load(folder, like={"opt_state": template}).opt_state[0]).__name__
      'ScaleByAdamState'
    """
    like = dict(like or {})
    if unknown := like.keys() - {"params", "opt_state"}:
        raise ValueError(f"like: expected templates under 'params' and 'opt_state', got {sorted(unknown)}")
    leaves, record = inspect(path, format=FORMAT)
    stored = _stored_config(path, leaves, record)
    if config is not None and config != stored:
        lines = differences(stored.to_json(), config.to_json(), path="config", source="checkpoint")
        raise ValueError(f"{path}: config or schema other than expected:\n{listed(lines)}")
    trees = read(path, {"params": None} | like, format=FORMAT)
    return Checkpoint(
        params=trees["params"],
        config=stored,
        version=combine(leaves["params"], stored),
        step=record["step"],
        opt_state=trees.get("opt_state"),
        position=record["position"],
        metrics=record["metrics"],
    )


class Checkpoints:
    """The checkpoints of one training run: a folder with one sub-folder for each step that is kept.

    One process writes; any number may read meanwhile, since reading looks at the folder anew each time.

    Args:
      directory: made when the first checkpoint is saved.
      keep_last: how many of the latest steps stay.
      keep_best: such as ("gauc", "max"): the best step by that metric stays too. None keeps the latest alone.

    Example:
      >>> import tempfile, jax, aif_jax as aif
      >>> from aif_jax.checkpoint import Checkpoints
      >>> config = aif.tiny()
      >>> params = {"embedding": {"category": jax.numpy.ones((6, 8))}}
      >>> with Checkpoints(tempfile.mkdtemp(), keep_last=1, keep_best=("gauc", "max")) as run:
      ...     for step, gauc in ((1, 0.61), (2, 0.66), (3, 0.64)):
      ...         run.save_async(step, params, config, metrics={"gauc": gauc})
      >>> run.steps, run.latest, run.best
      ([2, 3], 3, 2)
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 3,
        keep_best: tuple[str, Literal["max", "min"]] | None = None,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last: expected at least 1, got {keep_last}")
        if keep_best is not None and keep_best[1] not in ("max", "min"):
            raise ValueError(f"keep_best: expected (metric, 'max' or 'min'), got {keep_best}")
        self.directory = Path(directory).absolute()
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._writer: ocp.training.Checkpointer | None = None

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.directory)!r}, steps={self.steps}, latest={self.latest}, best={self.best})"

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return _steps(self.directory)

    @property
    def latest(self) -> int | None:
        """The highest complete step, None where there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The best complete step by the metric of `keep_best`, the later one on a tie; None where there is none."""
        if self.keep_best is None:
            return None
        name, direction = self.keep_best
        sign = 1 if direction == "max" else -1
        known = [(sign * figures[name], step) for step in self.steps if name in (figures := self._metrics(step))]
        return max(known)[1] if known else None

    def save(self, step: int, params: Params, config: Config, **rest: Any) -> None:
        """Saves and waits; arguments as `save_async`."""
        self.save_async(step, params, config, **rest)
        self.wait()

    def save_async(
        self,
        step: int,
        params: Params,
        config: Config,
        *,
        opt_state: Any = None,
        position: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves in the background; the arrays may be donated or changed as soon as this returns.

        Copies to the host and hashes before it returns, writes afterwards; waits for the save before it. An error in the
        background is raised by the next `save_async`, `wait` or `close`.

        Args:
          step: must not be on disk yet.
          params, config, opt_state, position: as in `checkpoint.save`.
          metrics: figures by name; the one of `keep_best` must be among them.

        Raises:
          FileExistsError: the step is there already.
          ValueError: the metric of `keep_best` is missing or not finite, or what `checkpoint.save` refuses.
        """
        if self.keep_best is not None and not math.isfinite((metrics or {}).get(self.keep_best[0], math.nan)):
            raise ValueError(
                f"metrics: expected a finite {self.keep_best[0]!r}, by which keep_best={self.keep_best} chooses, got {metrics}"
            )
        if self._folder(step).exists():
            raise FileExistsError(f"{self._folder(step)}: step {step} is saved already; it stays as it is")
        trees, record = _contents(params, config, step=step, opt_state=opt_state, position=position, metrics=metrics)
        arrays, record = _pack(trees, record, format=FORMAT)
        self._open().save_checkpointables_async(step, arrays, force=True, metrics=record["metrics"], custom_metadata=record)

    def restore(
        self,
        step: int | Literal["latest", "best"] = "latest",
        *,
        config: Config | None = None,
        like: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """`load` of one step.

        Raises:
          FileNotFoundError: no such step; names those that are there.
        """
        found = self.latest if step == "latest" else self.best if step == "best" else step
        if found is None or found not in self.steps:
            raise FileNotFoundError(f"{self.directory}: expected step {step}, found steps {self.steps}")
        return load(self._folder(found), config=config, like=like)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises what went wrong in the background."""
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            return inspect(self._folder(step), format=FORMAT)[1]["metrics"] or {}
        except (FileNotFoundError, CheckpointError):
            if step in self.steps:
                raise
            return {}  # the writer let go of it since it was listed

    def _open(self) -> ocp.training.Checkpointer:
        """The writer, opened at the first save: a process that only reads must not sweep up another's unfinished save."""
        if self._writer is None:
            policies = ocp.training.preservation_policies
            kept: list[Any] = [policies.LatestN(self.keep_last)]
            if self.keep_best is not None:
                name, direction = self.keep_best
                worst = -math.inf if direction == "max" else math.inf  # for steps of an earlier run without this metric
                best = policies.BestN(
                    get_metric_fn=lambda metrics: metrics.get(name, worst),
                    reverse=direction == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
                kept.append(best)
            policy: Any = policies.AnyPreservationPolicy(kept)  # Orbax's own policies do not fit its annotation
            self._writer = ocp.training.Checkpointer(
                str(self.directory), context=_context(), preservation_policy=policy, cleanup_tmp_directories=True
            )
        return self._writer


def write(path: str | Path, trees: Mapping[str, Any], record: Mapping[str, Any], *, format: str) -> None:
    """Writes named trees and a record into a new folder: complete, or not there at all.

    Args:
      path: a folder that does not exist yet.
      trees: pytrees by name; leaves are arrays of numbers or strings, or typed random keys.
      record: plain JSON.
      format: name and number of the layout, which `read` must be given.

    Raises:
      FileExistsError: something is there already; nothing is ever overwritten.
      ValueError: a record that is not plain JSON, or a leaf that is no array.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path}: expected a new folder, but something is there; it stays as it is")
    arrays, metadata = _pack(trees, record, format=format)
    with _context():
        ocp.save_checkpointables(str(path), arrays, custom_metadata=metadata)


def inspect(path: str | Path, *, format: str) -> tuple[dict[str, dict[str, Digest]], dict[str, Any]]:
    """What lies in a folder, without its arrays.

    Returns:
      (leaves, record): a digest for every leaf, by tree and path; what `write` was given.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn, altered or foreign.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        unfinished = list(path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"))
        hint = f"; a save that never finished lies at {unfinished[0]}" if unfinished else ""
        raise FileNotFoundError(f"{path}: no checkpoint{hint}")
    if not (path / METADATA_FILE).is_file():
        steps = _steps(path)
        hint = f"; it holds the steps {steps} of a run, which Checkpoints({str(path)!r}) reads" if steps else ""
        raise CheckpointError(f"{path}: not a complete checkpoint: {METADATA_FILE} is missing{hint}")
    try:
        metadata = json.loads((path / METADATA_FILE).read_text())["custom_metadata"]
        found = metadata["format"]
        if found == format:
            if metadata["sha256"] != _record_hash(metadata):
                raise CheckpointError(f"{path}: the record in {METADATA_FILE} was altered")
            leaves = {
                name: {p: Digest(**{**leaf, "shape": tuple(leaf["shape"])}) for p, leaf in table.items()}
                for name, table in metadata["leaves"].items()
            }
            return leaves, metadata
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {METADATA_FILE} is torn, altered or not of this library: {error!r}") from error
    raise CheckpointError(f"{path}: expected the format {format!r}, got {found!r}")


def read(path: str | Path, like: Mapping[str, Any], *, format: str) -> dict[str, Any]:
    """Reads some trees of a folder and checks every leaf of them.

    Args:
      path: what `write` wrote.
      like: what to read: a template for each name, see `load`; None takes the tree as nested dicts on the default device.
      format: as given to `write`.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn, altered or foreign folder; says which part.
      ValueError: a tree that is not there, or leaves missing, renamed or resized against the template: by path.
    """
    path = Path(path).absolute()
    leaves, _ = inspect(path, format=format)
    if missing := like.keys() - leaves.keys():
        raise ValueError(f"{path}: expected {sorted(missing)}, but it was saved without; it has {sorted(leaves)}")
    return {name: _restore(path, name, leaves[name], template) for name, template in like.items()}


def _context() -> ocp.Context:
    """Folders are made at once: where that fails, Orbax's threads would wait minutes for a folder that never comes."""
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context


def _contents(
    params: Params, config: Config, *, step: int, opt_state: Any, position: Any, metrics: Mapping[str, float] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trees and record of a checkpoint."""
    if not _is_json(position):
        raise ValueError(f"position: expected plain JSON (dicts with string keys, lists, str, int, float), got {position!r}")
    trees = {"params": params} | ({"opt_state": opt_state} if opt_state is not None else {})
    return trees, {
        "config": json.loads(json.dumps(config.to_json())),
        "step": int(step),
        "position": position,
        "metrics": {name: float(figure) for name, figure in metrics.items()} if metrics else None,
    }


def _stored_config(path: str | Path, leaves: Mapping[str, Mapping[str, Digest]], record: Mapping[str, Any]) -> Config:
    """The config inside."""
    try:
        return Config.from_json(record["config"])
    except (KeyError, TypeError, ValueError) as error:
        written = f"written by aif_jax {record.get('aif_jax')}, this is {aif_jax.__version__}"
        raise CheckpointError(f"{path}: the config inside cannot be read ({written}): {error}") from error


def _pack(trees: Mapping[str, Any], record: Mapping[str, Any], *, format: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Orbax is given: nested dicts of arrays, and the record with a digest of every leaf."""
    if not _is_json(record):
        raise ValueError(f"record: expected plain JSON, got {record!r}")
    named = {name: leaves_by_path(tree) for name, tree in trees.items()}
    if not any(named.values()):
        raise ValueError(f"expected at least one array to save, got none in {sorted(trees)}")
    for name, tree in named.items():
        for path, leaf in tree.items():
            if not isinstance(leaf, jax.Array) and np.asarray(leaf).dtype.kind in "OS":
                raise ValueError(f"{name}/{path}: expected an array, got {type(leaf).__name__}")
    leaves = {name: {path: dataclasses.asdict(d) for path, d in digests(tree).items()} for name, tree in trees.items()}
    metadata = {**record, "format": format, "aif_jax": aif_jax.__version__, "jax": jax.__version__, "leaves": leaves}
    metadata |= {"sha256": _record_hash(metadata)}
    # Orbax refuses arrays of size 0; the record has all there is to know of them.
    arrays = {name: {p: encode(leaf) for p, leaf in tree.items() if np.size(leaf)} for name, tree in named.items()}
    return {name: nest(tree) for name, tree in arrays.items() if tree}, metadata


def _restore(path: Path, name: str, leaves: Mapping[str, Digest], like: Any) -> Any:
    """One tree: its leaves read, checked against the record, and put into the form of the template."""
    templates = leaves_by_path(like) if like is not None else dict.fromkeys(leaves)
    if like is not None:
        lines = mismatches(
            {p: str(leaf) for p, leaf in leaves.items()}, {p: describe(t) for p, t in templates.items()}, source="checkpoint"
        )
        if lines:
            raise ValueError(f"{path}: {name} does not fit the template:\n{listed(lines)}")
    wanted = {p: abstract(leaf, templates[p]) for p, leaf in leaves.items()}
    got = {p: leaf for p, leaf in wanted.items() if not leaf.size}
    if stored := {p: leaf for p, leaf in wanted.items() if leaf.size}:
        try:
            got |= leaves_by_path(ocp.load(str(path), nest(stored), checkpointable_name=name))
        except PermissionError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:300]
            raise CheckpointError(f"{path}: {name} is torn or altered: {type(error).__name__}: {reason}") from error
    try:
        placed = {p: place(decode(got[p], leaves[p]), leaves[p], templates[p], f"{path}: {name}/{p}") for p in templates}
    except AlteredError as error:
        raise CheckpointError(str(error)) from error
    return nest(placed) if like is None else jax.tree.unflatten(jax.tree.structure(like), placed.values())


def _record_hash(metadata: Mapping[str, Any]) -> str:
    """A hash of everything in a record but itself."""
    rest = {name: value for name, value in metadata.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / METADATA_FILE).is_file())


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False
