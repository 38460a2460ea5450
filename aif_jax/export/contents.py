"""Reads an exported folder back into what this package works with: model, parameters, encoder, index. No function is run."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.custom_batching import sequential_vmap

from aif_jax import checkpoint
from aif_jax.checkpoint import METADATA_FILE, CheckpointError
from aif_jax.checkpoint.storage import complete_steps
from aif_jax.config import Config
from aif_jax.encoding.encoder import Encoder
from aif_jax.export import consume
from aif_jax.export.consume.files import MANIFEST, ORDER
from aif_jax.export.consume.ids import HASHES, Ids
from aif_jax.features import item_layout, user_layout
from aif_jax.index import ItemIndex
from aif_jax.index.store import BATCH
from aif_jax.model import PreRanker
from aif_jax.store.codec import widen
from aif_jax.store.folders import local, unfinished
from aif_jax.store.sealed import ARRAYS
from aif_jax.store.trained import Trained, fingerprint, model_of
from aif_jax.train import training
from aif_jax.trees import differences, leaves_by_path, listed, nest
from aif_jax.types import ItemFeatures


@dataclasses.dataclass(frozen=True)
class ExportedOrder:
    """An order from an export, as engines take it; equal to another of the same bytes.

    Attributes:
      name: its function in the export.
      raw: that function, serialised; other bytes raise ExportError at the first call.
      inputs: names of the inputs that it reads.
    """

    name: str
    raw: bytes = dataclasses.field(repr=False)
    inputs: tuple[str, ...]

    @functools.cached_property
    def _value(self) -> Any:
        call = consume.callable_here(consume.deserialize(self.raw, self.name), self.name)
        return sequential_vmap(lambda given: call({}, given)["scores"])  # an exported function has no rule for batches

    def __call__(self, p: Mapping[str, Any], bid: Any) -> Any:
        """Return float32 [C] of probabilities [C] by name and the bid [C]."""
        given = {f"p.{name}": values for name, values in p.items()} | {"bid": bid}
        return self._value({name: given[name] for name in self.inputs})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoredModel:
    """A model from an exported folder, as `AsyncPreRanker` takes it.

    Attributes:
      trained: model, built from the config by the code that is here.
      index: the exported rows; None where the export has none.
      golden: inputs and outputs by name, see `check_golden`.
      orders: the exported orders by name, for `ServingConfig.orders`.
    """

    trained: Trained
    index: ItemIndex | None
    golden: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    orders: Mapping[str, ExportedOrder] = dataclasses.field(default_factory=dict)

    def check_golden(self) -> float:
        """Run the functions of this model on the golden inputs; returns the largest difference.

        Raises ExportError for |got - golden| / max(1, |golden|) above 1e-4, or golden inputs that are not those of the model.
        """
        model, params, golden, schema = self.trained.model, self.trained.params, self.golden, self.trained.config.schema
        try:
            user, items = _filled(user_layout(schema), golden, "user"), _filled(item_layout(schema), golden, "item")
            state, rows = jax.jit(model.user)(params, user), _over_items(model.item)(params, items)
            outputs = {"user": state, "item": rows, "interaction": {"logits": jax.jit(model.interaction)(params, state, rows)}}
            return max(
                consume.difference(f"{function} {name}", np.asarray(value), golden[f"{function}.outputs/{name}"], 1e-4)
                for function, values in outputs.items()
                for name, value in leaves_by_path(values, separator=".").items()
            )
        except (KeyError, TypeError) as error:
            raise consume.ExportError(f"golden: expected inputs and outputs of this model, got others: {error!r}") from error


def restore(folder: str | Path, *, model: PreRanker | None = None, sha256: str | None = None) -> RestoredModel:
    """Return the model in an exported folder, for the engine of this package: its functions are compiled from code here.

    No exported function is run but orders. Import the modules of your blocks and heads first.

    Args:
      folder: what `save` wrote.
      model: made by `assemble`; None builds it from the config.
      sha256: SHA-256 of the manifest, as `save` returned it.

    Raises ExportError: a damaged folder, or a block or head that is not registered; ValueError: a model of another config.

    Example:
      >>> import jax, tempfile, aif_jax as aif
      >>> from aif_jax import export
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> model = aif.build(aif.presets.two_tower(schema, width=4, sequence=False))
      >>> catalogue = aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4})
      >>> folder, params = Path(tempfile.mkdtemp()) / "model", model.init(jax.random.key(0), catalogue)
      >>> digest = export.save(folder, aif.Trained(model, params), platforms=("cpu",))
      >>> export.restore(folder, sha256=digest).check_golden() < 1e-4
      True
    """
    folder = local(folder, "folder")
    manifest = consume.read_manifest(folder, sha256=sha256)
    golden, orders = consume.checked_arrays(folder, manifest, manifest["golden"]), {}
    for name in manifest.get("orders", ()):
        spec = manifest["functions"][f"{ORDER}{name}"]
        inputs = tuple(entry["name"] for entry in spec["inputs"])
        orders[name] = ExportedOrder(f"{ORDER}{name}", consume.checked(folder, manifest, spec.get("file")), inputs)
    trained, index = _trained(folder, manifest, model=model).on_device(), None
    if manifest.get("index"):
        arrays = consume.checked_arrays(folder, manifest, manifest["index"])
        keys = Ids({name: arrays.pop(name) for name in ("ids", *HASHES) if name in arrays}, f"{folder}: index").raw
        index = ItemIndex.of_rows(trained, keys, arrays, batch_size=min(BATCH, max(len(keys), 1)))
    return RestoredModel(trained=trained, index=index, golden=golden, orders=orders)


def _trained(folder: Path, manifest: Mapping[str, Any], *, model: PreRanker | None, items: bool = False) -> Trained:
    """Return the model of a folder, with features of its items if `items`; ExportError unless checksums and version fit."""
    leaves, encoder = consume.checked_arrays(folder, manifest, manifest["params"]), manifest.get("encoder")
    known = consume.checked_arrays(folder, manifest, manifest["items"]) if items and manifest.get("items") else None
    try:
        params, config = nest(leaves), Config.from_json(manifest["config"])
        if encoder:
            encoder = Encoder.from_record(encoder["record"], consume.checked_arrays(folder, manifest, encoder.get("file")))
        features = None if known is None else ItemFeatures(**nest(known))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise consume.ExportError(f"{folder}: expected params, config and encoder, got others: {error}") from error
    version = fingerprint(params, config, encoder)
    if version != manifest["version"]:
        lines = differences(manifest["config"], config.to_json(), path="config", source="export")
        why = f"; open it with the code that wrote it:\n{listed(lines)}" if lines else ""
        raise consume.ExportError(f"{folder}: expected contents of version {manifest['version']}, got those of {version}{why}")
    config = config if encoder is None else config.with_encoding(encoder.version)
    return Trained(model_of(config, model), params, encoder, manifest.get("settings"), features).with_version(version)


def _filled(layout: Any, golden: Mapping[str, np.ndarray], function: str) -> Any:
    """Return the golden inputs of a function as features."""
    names = leaves_by_path(layout, separator=".")
    return jax.tree.unflatten(jax.tree.structure(layout), [golden[f"{function}.inputs/{name}"] for name in names])


# one compiled function for all versions of a model
_over_items = functools.lru_cache(maxsize=4)(lambda item: jax.jit(lambda *given: widen(jax.vmap(item, (None, 0))(*given))))

SHOWN = 6  # names of a folder in an error


def open(folder: str | Path, *, model: PreRanker | None = None) -> Trained:
    """Return the trained model in a folder: `out` of `fit` (its best checkpoint), a checkpoint, or an export.

    Args:
      folder: folder of a run, a checkpoint or an export; everything that is read is compared with its checksums.
      model: made by `assemble`, whose functions no folder holds; None builds it from the config.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError, ExportError: a damaged folder, or one of something else, such as an index.
      ValueError: a `model` of another config.

    Example:
      >>> import tempfile, jax, aif_jax as aif
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> schema = aif.Schema(item_attributes=(item, category))
      >>> model = aif.build(aif.presets.two_tower(schema))
      >>> catalogue = aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4})
      >>> trained = aif.Trained(model, model.init(jax.random.key(0), catalogue))
      >>> folder = tempfile.mkdtemp() + "/model"
      >>> aif.checkpoint.save(folder, trained)
      >>> aif.open(folder).version == trained.version
      True
    """
    path = local(folder, "folder")
    if (path / MANIFEST).is_file() and not (path / ARRAYS).is_file():
        return _trained(path, consume.read_manifest(path), model=model, items=True)
    if (path / METADATA_FILE).is_file():  # which a run that was saved is too
        return checkpoint.load(path).trained(model)
    if checkpoint.settings_of(path) is not None:
        return training.load(path)[1].trained(model)
    expected = f"{path}: expected the folder of a run (--out of train), a checkpoint or an export"
    if not path.is_dir():
        raise FileNotFoundError(f"{expected}, found nothing{unfinished(path)}; name another")
    if steps := complete_steps(path):
        raise CheckpointError(f"{expected}, found checkpoints of steps {steps}; take one, such as {path / str(steps[-1])}")
    if (path / ARRAYS).is_file():
        raise CheckpointError(f"{expected}, found a snapshot of an index: give its `load` the model")
    names = sorted(entry.name for entry in path.iterdir())
    found = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    if "current" in names:
        found = "the exports of a service: open the folder that `current` names"
    raise CheckpointError(f"{expected}, found {found or 'an empty folder'}; name another")
