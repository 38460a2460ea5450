"""`open`: the trained model in any folder that this package writes one into."""

from __future__ import annotations

from pathlib import Path

from aif_jax import checkpoint
from aif_jax.checkpoint import METADATA_FILE, CheckpointError
from aif_jax.checkpoint.storage import complete_steps
from aif_jax.export.consume.files import MANIFEST
from aif_jax.export.contents import read_contents
from aif_jax.model import PreRanker
from aif_jax.store.folders import local, unfinished
from aif_jax.store.sealed import ARRAYS
from aif_jax.store.trained import Trained
from aif_jax.train import fit as training

SHOWN = 6  # names of a folder in an error


def open(folder: str | Path, *, model: PreRanker | None = None) -> Trained:
    """The trained model in a folder: `out` of `fit` (its best checkpoint, calibrated if it was), a checkpoint, or an export.

    Args:
      folder: of a run, a checkpoint or an export; everything that is read is compared with its checksums.
      model: made by `assemble`, whose functions no folder holds; None builds it from the config.

    Raises:
      FileNotFoundError: nothing there, or a run without a checkpoint.
      CheckpointError, ExportError: a damaged folder, or one of something else, such as an index.
      ValueError: a `model` of another config.

    Example:
      >>> import tempfile, jax, aif_jax as aif
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> model = aif.build(aif.presets.two_tower(aif.Schema(item_attributes=(item, category))))
      >>> trained = aif.Trained(model, {"embedding": {"category": jax.numpy.ones((6, 8))}})
      >>> folder = tempfile.mkdtemp() + "/model"
      >>> aif.checkpoint.save(folder, trained)
      >>> aif.open(folder).version == trained.version
      True
    """
    path = local(folder, "folder")
    if (path / MANIFEST).is_file() and not (path / ARRAYS).is_file():
        return read_contents(path).trained(model)
    if training.is_run(path):
        return training.load(path)[1].trained(model)
    if (path / METADATA_FILE).is_file():
        return checkpoint.load(path).trained(model)
    expected = f"{path}: expected the folder of a run (--out of train), a checkpoint or an export"
    if not path.is_dir():
        work = [f"; {each} is being written, or was left by a save that was killed" for each in unfinished(path)]
        raise FileNotFoundError(f"{expected}, found nothing{''.join(work)}")
    if steps := complete_steps(path):
        raise CheckpointError(f"{expected}, found checkpoints of steps {steps}: open one, such as {path / str(steps[-1])}")
    if (path / ARRAYS).is_file():
        raise CheckpointError(f"{expected}, found a snapshot of an index or a user table: give its `load` the model")
    names = sorted(entry.name for entry in path.iterdir())
    found = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    if "current" in names:
        found = "the exports of a service: open the folder that `current` names"
    raise CheckpointError(f"{expected}, found {found or 'an empty folder'}")
