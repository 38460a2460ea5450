"""Sealed folders and records: what is written reads back, and nothing else does."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax.export.consume import files
from aif_jax.store import sealed
from aif_jax.store.folders import METADATA_FILE, CheckpointError

FORMAT = "test/1"
TREES = {
    "ids": np.arange(3),
    "rows": {
        "flags": np.array([True, False, True]), "half": jnp.ones((3, 2), jnp.bfloat16), "empty": np.zeros((0, 4), np.float32),
        "none": np.float32(2),
    },
}  # fmt: skip


def write(path):
    sealed.write(path, TREES, {"made": [1, "a", None]}, format=FORMAT)
    return path


def test_what_is_written_reads_back(tmp_path):
    folder = write(tmp_path / "a")
    assert sorted(file.name for file in folder.iterdir()) == ["arrays.safetensors", "manifest.json"]
    manifest, trees = sealed.inspect(folder, format=FORMAT), sealed.read(folder, format=FORMAT)
    assert manifest["made"] == [1, "a", None] and sealed.nbytes(manifest) == 24 + 3 + 12 + 0 + 4
    jax.tree.map(np.testing.assert_array_equal, trees, TREES)
    assert [leaf.dtype for leaf in jax.tree.leaves(trees)] == [leaf.dtype for leaf in jax.tree.leaves(TREES)]
    assert jax.tree.structure(sealed.read(folder, format=FORMAT, like=TREES)) == jax.tree.structure(TREES)
    with pytest.raises(FileExistsError, match="something is there"):
        write(folder)


@pytest.mark.parametrize(
    ("like", "message"),
    [({"ids": np.arange(3)}, "rows/half: only in the snapshot"), ({**TREES, "ids": np.arange(4)}, r"ids: .*int64\[4\]")],
)
def test_what_does_not_fit_a_template_is_named(tmp_path, like, message):
    with pytest.raises(CheckpointError, match=message):
        sealed.read(write(tmp_path / "a"), format=FORMAT, like=like, rebuild="make it again")


def test_others_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a snapshot, found nothing"):
        sealed.inspect(tmp_path / "none", format=FORMAT)
    with pytest.raises(CheckpointError, match="expected the format 'test/2', got 'test/1'; make it again"):
        sealed.inspect(write(tmp_path / "a"), format="test/2", rebuild="make it again")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / METADATA_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="got one of an earlier version; make it again"):
        sealed.inspect(tmp_path / "old", format=FORMAT, rebuild="make it again")
    for record in ({"a": {1: 2}}, {"a": float("nan")}, {"a": np.int64(1)}):
        with pytest.raises(ValueError, match="record: expected plain JSON"):
            sealed.write(tmp_path / "b", TREES, record, format=FORMAT)
    with pytest.raises(TypeError, match="texts: expected a dtype among"):
        sealed.write(tmp_path / "b", {"texts": np.array(["a"])}, {}, format=FORMAT)
    with pytest.raises(ValueError, match=f"record: expected at most {files.MANIFEST_BYTES} bytes"):
        sealed.write(tmp_path / "b", TREES, {"long": "a" * files.MANIFEST_BYTES}, format=FORMAT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "old"]


def test_arrays_that_the_manifest_does_not_list_are_refused(tmp_path):
    folder = write(tmp_path / "a")
    entry = sealed.write_arrays(folder / sealed.ARRAYS, {"ids": np.arange(3), "other": np.zeros(40)})
    manifest = json.loads((folder / "manifest.json").read_text()) | {"files": {sealed.ARRAYS: entry}}
    (folder / "manifest.json").write_bytes(sealed.sealed({name: manifest[name] for name in manifest if name != "sha256"}))
    with pytest.raises(CheckpointError, match="expected the arrays that manifest.json lists, got others"):
        sealed.read(folder, format=FORMAT)


def test_records_are_sealed(tmp_path):
    file = tmp_path / "record.json"
    sealed.write_record(file, {"a": [1, 2]})
    assert sealed.read_record(file, "a record") == {"a": [1, 2]}
    file.write_text(file.read_text().replace("2", "3", 1))
    with pytest.raises(CheckpointError, match="the record was altered: expected the sha256"):
        sealed.read_record(file, "a record")
    file.write_text("{")
    with pytest.raises(sealed.TornRecord, match="expected a record, got none"):
        sealed.read_record(file, "a record")
    with pytest.raises(FileNotFoundError):
        sealed.read_record(tmp_path / "none", "a record")
