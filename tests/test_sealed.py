"""Sealed folders and records: what is written reads back, and nothing else does, whoever keeps them."""

import dataclasses
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import export
from aif_jax.export import ExportError
from aif_jax.export.consume import files
from aif_jax.store import sealed
from aif_jax.store.folders import CheckpointError
from tests import writer_world as world
from tests.golden import make_export
from tests.refusals import refused
from tests.reliability import damaged

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
    assert manifest["made"] == [1, "a", None]
    jax.tree.map(np.testing.assert_array_equal, trees, TREES)
    assert [leaf.dtype for leaf in jax.tree.leaves(trees)] == [leaf.dtype for leaf in jax.tree.leaves(TREES)]
    refused(FileExistsError, "something is there", write, folder)


def test_what_cannot_be_written_is_refused(tmp_path):
    many = {"long": "a" * files.MANIFEST_BYTES}
    for error, message, trees, record in (
        *((ValueError, "record: expected plain JSON", TREES, {"a": a}) for a in ({1: 2}, float("nan"), np.int64(1))),
        (TypeError, "texts: expected a dtype among", {"texts": np.array(["a"])}, {}),
        (ValueError, f"record: expected at most {files.MANIFEST_BYTES} bytes", TREES, many),
    ):
        refused(error, message, sealed.write, tmp_path / "b", trees, record, format=FORMAT)
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of folder that checks itself: how it is made and read, and in which words its readers refuse."""

    make: Callable[[Path, int], Any]
    folder: str
    reads: tuple[Callable[[Path], Any], ...]
    format: str = ""
    rebuild: str = ""
    data: str = sealed.ARRAYS
    error: type[Exception] = CheckpointError


KINDS = {
    "index": Kind(
        damaged._make_index, "snapshot", (aif.index.verify, lambda path: aif.ItemIndex.load(path, world.TRAINED)),
        "aif_jax.index/4", "build the index again: ItemIndex.build, run.index or aif-jax",
    ),
    "export": Kind(
        lambda folder, _: shutil.copytree(Path(make_export.__file__).parent / "export", folder / "model"), "model",
        (export.load, export.verify),
        data="user.jax_export", error=ExportError,
    ),
}  # fmt: skip


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file: Path) -> None:
    """Another value, where all else fits."""
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"version": f"{manifest.get('version')}0"}))


def put(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


JSON, FORMATS = "manifest.json: expected JSON", "expected the format '{format}', got "
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "data flipped": ("data", flip, "was altered"),
    "data cut": ("data", lambda file: os.truncate(file, file.stat().st_size - 4), "expected .* bytes"),
    "data empty": ("data", put(b""), "expected .* bytes"),
    "data sparse": ("data", lambda file: os.truncate(file, 1 << 39), "expected .* bytes"),
    "data gone": ("data", Path.unlink, "expected a file in the folder"),
    "manifest edited": ("manifest", edit, "manifest.json was altered"),
    "manifest empty": ("manifest", put(b""), JSON),
    "manifest cut": ("manifest", put(b"{"), JSON),
    "manifest too deep": ("manifest", put(b"[" * 100_000), JSON),
    "manifest sparse": ("manifest", lambda file: os.truncate(file, 1 << 34), "manifest.json"),
    "manifest no text": ("manifest", put(b"\xff"), JSON),
    "manifest a list": ("manifest", put(b"[]"), FORMATS + r"\[\]"),
    "manifest gone": ("manifest", Path.unlink, "expected a file in the folder"),
    "another kind": ("manifest", put(b'{"format": "other/9"}'), FORMATS + "'other/9'; {rebuild}"),
}
"""What is damaged and how, and what the reader says."""
OF_EXPORTS = {
    "manifest a list": "manifest.json: expected ",
    "another kind": "expected the format 'aif_jax",
}  # fmt: skip
"""What readers of exports say instead."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for kind in KINDS.values():
        kind.make(folder, 0)
        for read in kind.reads:
            read(folder / kind.folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_named(originals, tmp_path, name, damage):
    """By the folder and, where it helps, by the way out; whatever is there is not read into memory."""
    kind, (what, change, words) = KINDS[name], DAMAGES[damage]
    folder = Path(shutil.copytree(originals / kind.folder, tmp_path / kind.folder))
    change(folder / (kind.data if what == "data" else "manifest.json"))
    words = OF_EXPORTS.get(damage, words) if name == "export" else words
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in kind.reads:
        with pytest.raises(kind.error, match=words.format(format=kind.format, rebuild=re.escape(kind.rebuild))) as error:
            read(folder)
        assert name == "export" or str(folder) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_nothing_there_is_said(tmp_path):
    for read in KINDS["index"].reads:
        refused(FileNotFoundError, "none: expected a snapshot, found nothing", read, tmp_path / "none")
