"""The model of a job, on the machine that plans it and on those that run it: by the path of a folder, or by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax import checkpoint
from aif_jax.checks import expect
from aif_jax.encoding.encoder import Encoder
from aif_jax.export.consume.files import MANIFEST
from aif_jax.export.contents import read_contents
from aif_jax.model import PreRanker, build
from aif_jax.store.folders import local
from aif_jax.store.version import VersionMismatch, encoding_for, fingerprint
from aif_jax.train import fit as training
from aif_jax.types import Params


class Trained(NamedTuple):
    """A model that can encode raw data."""

    model: PreRanker
    params: Params
    encoder: Encoder
    version: str


class Source:
    """Gives a `Trained`; two of one version are equal, so that a process that runs many tasks keeps one compiled program.

    Pickled, it is the path of its folder, or its config and parameters as NumPy arrays; the version goes with it, and a worker
    that finds another one in the folder raises `VersionMismatch`.
    """

    def __init__(self, trained: Trained, folder: Path | None = None):
        self.version = trained.version
        self.folder = folder
        self._trained: Trained | None = trained

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and (self.version, self.folder) == (other.version, other.folder)

    def __hash__(self) -> int:
        return hash((self.version, self.folder))

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"version": self.version, "folder": self.folder}
        if self.folder is not None:
            return state
        model, params, encoder, _ = self.open()
        expected = "a model that `build` makes of its config; a job of an assembled one is made on the worker"
        expect(_functions(model) == _functions(build(model.config)), "job, to be pickled", expected, repr(model))
        return state | {"config": model.config, "params": jax.tree.map(np.asarray, params), "encoder": encoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.version, self.folder, self._trained = state["version"], state["folder"], None
        if self.folder is None:
            self._trained = Trained(build(state["config"]), state["params"], state["encoder"], self.version)

    def open(self) -> Trained:
        """The model, read from the folder where it is not at hand."""
        if self._trained is None and self.folder is not None:
            trained = read(self.folder)
            if trained.version != self.version:
                raise VersionMismatch(f"job, model in {self.folder}", expected=self.version, got=trained.version)
            self._trained = trained
        assert self._trained is not None
        return self._trained


def of_model(model: PreRanker, params: Params, encoder: Encoder, version: str | None) -> Source:
    """The source of a model at hand."""
    expect(encoder is not None, "encoder", "that of the model's checkpoint, which reads raw data", None)
    encoding_for(model.config, encoder)
    version = fingerprint(params, model.config, encoder) if version is None else version
    return Source(Trained(model, params, encoder, version))


def of_folder(path: str | Path) -> Source:
    """The source of a folder: an export, a run or a checkpoint; everything in it is checked here and now."""
    folder = local(path)
    return Source(read(folder), folder)


def read(folder: Path) -> Trained:
    """The model in a folder. Raises what its reader raises; ValueError where it has no encoder."""
    if (folder / MANIFEST).is_file():
        contents = read_contents(folder)
        config, params, encoder, version = contents.config, contents.params, contents.encoder, contents.version
    else:
        saved = training.load(folder)[1] if training.is_run(folder) else checkpoint.load(folder)
        config, params, encoder, version = saved.config, saved.params, saved.encoder, saved.version
    if encoder is None:
        raise ValueError(f"{folder}: expected a model with its encoder, which reads raw data, got one without")
    return Trained(build(config), params, encoder, version)


def _functions(model: PreRanker) -> list[Any]:
    """What the components are, without the config bound to them."""
    return [getattr(function, "func", function) for function in (model.user, model.item, model.update_user)]
