"""Folders whose checksums fit and whose contents do not: each ends in the room's error, in bounded time and memory."""

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import checkpoint, export
from aif_jax.checkpoint import CheckpointError, storage
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.export import ExportError, consume, writer
from tests.golden import make_export
from tests.refusals import refused
from tests.reliability import damaged
from tests.test_export import resealed

FOLDER = Path(make_export.__file__).parent / "export"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A checkpoint "one" and an index "snapshot"."""
    folder = tmp_path_factory.mktemp("originals")
    for make in (damaged._make_checkpoint, damaged._make_index):
        make(folder, 0)
    return folder


@pytest.fixture
def forge(tmp_path):
    """`forge({name: bytes}, edit)` is a copy of the golden folder with other files, an edited manifest, checksums that fit."""

    def make(contents=None, edit=None):
        folder = tmp_path / "forged"
        shutil.copytree(FOLDER, folder)
        for name, raw in (contents or {}).items():
            (folder / name).write_bytes(raw)
        return resealed(folder, edit, contents or ())

    return make


def test_score_expressions_infinite_golden_outputs_and_params_of_which_one_is_a_group_too_are_refused(forge, tmp_path):
    folder = forge(edit=lambda manifest: manifest.update(orders={"value": "p * bid"}))
    for read in (export.load, export.restore):
        refused(ExportError, "orders: expected names of compiled functions, got dict; export again with orders=", read, folder)
    infinite = np.full(2, np.inf, np.float32)
    refused(ExportError, "expected the golden output within", consume.model.difference, "logits", infinite, infinite, 1e-4)
    shutil.rmtree(folder)
    writer.write_arrays(tmp_path / "arrays", {"user": np.zeros(1, np.float32), "user/kernel": np.zeros(1, np.float32)})
    raw = (tmp_path / "arrays").read_bytes()
    refused(ExportError, "expected params, config and encoder, got others", aif.open, forge({"params.safetensors": raw}))


BOMB = np.zeros(200_000, np.int64)
OFFSETS = {
    "overlapping": np.resize(np.array([0, 1000], np.int64), 2001)[:-1], "empty": BOMB, "falling": np.array([0, 5, 3, 1000]),
    "outside": np.array([0, 5, 10**12]), "negative": np.array([0, -5, 1000]), "none": np.zeros(0, np.int64),
    "matrix": np.zeros((2, 2), np.int64), "floats": np.array([0.0, 1000.0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(OFFSETS))
def test_offsets_of_vocabularies_are_refused_before_strings_are_made(kind):
    data = np.frombuffer(bytes(range(97, 107)) * (0 if kind == "empty" else 100), np.uint8)
    arrays = {"utf8": data, "offsets": OFFSETS[kind]}
    named = {f"item/{name}": array for name, array in arrays.items()}
    refused(ExportError, "offsets int64 that rise from 0", consume.model._vocabularies, named)
    refused(ValueError, "offsets int64 that rise from 0", Vocabulary.from_arrays, arrays)


def test_one_empty_string_is_a_good_vocabulary():
    for raw in (["", "b", "é"], ["a"], []):
        arrays = Vocabulary(raw).to_arrays()
        assert Vocabulary.from_arrays(arrays) == Vocabulary(raw)
        assert len(consume.model._vocabularies({f"x/{name}": array for name, array in arrays.items()})["x"]) == len(raw)


RECORDS = {"one": storage.METADATA_FILE, "snapshot": "manifest.json"}


@pytest.mark.parametrize(("name", "what"), [
    *(("one", what) for what in ("deep", "sparse record", "sparse data", "sparse metadata", "many")),
    *(("snapshot", what) for what in ("deep", "sparse record", "sparse data")),
])  # fmt: skip
def test_deep_sparse_and_many_files_are_refused(originals, tmp_path, name, what, monkeypatch):
    folder = tmp_path / name
    shutil.copytree(originals / name, folder)
    if what == "deep":
        (folder / RECORDS[name]).write_text('{"custom_metadata":' + "[" * 200_000 + "]" * 200_000 + "}")
    elif what == "sparse record":
        os.truncate(folder / RECORDS[name], 1 << 34)
    elif what == "sparse data":
        os.truncate(next((folder / "params" / "d").iterdir()) if name == "one" else folder / "arrays.safetensors", 1 << 39)
    elif what == "sparse metadata":
        os.truncate(folder / "params" / "_METADATA", 1 << 34)
    else:
        monkeypatch.setattr(storage, "MOST_FILES", 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=f"{name}: "):
        checkpoint.load(folder) if name == "one" else aif.index.verify(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
