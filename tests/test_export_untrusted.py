"""Folders of an attacker who makes the checksums fit: each ends in the room's error, in bounded time and memory."""

import hashlib
import itertools
import json
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
from aif_jax.export.consume import files
from aif_jax.index import ItemIndex, inspect
from tests import writer_world
from tests.golden import make_export
from tests.reliability import damaged
from tests.test_export import resealed

FOLDER = Path(make_export.__file__).parent / "export"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A checkpoint "one", an index "snapshot" and an exported "model" with encoder and index."""
    folder = tmp_path_factory.mktemp("originals")
    for make in (damaged._make_checkpoint, damaged._make_index, damaged._make_export):
        make(folder, 0)
    return folder


@pytest.fixture
def forge(tmp_path):
    """`forge({name: bytes}, edit)` is a copy of the golden folder with other files, an edited manifest, checksums that fit."""

    def make(contents=None, edit=None, source=FOLDER):
        folder = tmp_path / "forged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        for name, raw in (contents or {}).items():
            (folder / name).write_bytes(raw)
        return resealed(folder, edit, contents or ())

    return make


# Exported folders: what a manifest and its arrays may ask for


def safetensors(tmp_path, **arrays):
    writer.write_arrays(tmp_path / "arrays", arrays)
    return (tmp_path / "arrays").read_bytes()


def test_swapped_arrays_are_refused(originals, forge):
    names = ["params", "golden", "encoder", "index"]
    for file, other in itertools.permutations(names, 2):
        raw = (originals / "model" / f"{other}.safetensors").read_bytes()
        read = export.verify if file == "golden" else export.load
        with pytest.raises(ExportError):
            read(forge({f"{file}.safetensors": raw}, source=originals / "model"))


def test_swapped_functions_are_refused(forge):
    swap = {"user.jax_export": (FOLDER / "users.jax_export").read_bytes()}
    with pytest.raises(ExportError, match="user"):
        export.load(forge(swap))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m["axes"]["c"].update(buckets=[1 << 34]), "interaction: expected at most .* bytes a call"),
        (lambda m: m["axes"]["n"].update(buckets=[1 << 33]), "item: expected at most .* bytes a call"),
        (lambda m: m["functions"]["user"]["inputs"][-1].update(shape=[1 << 40]), "user: expected at most .* bytes a call"),
        (lambda m: m["files"].update({f"f{n}.x": {"bytes": 0, "sha256": ""} for n in range(5000)}), "files: expected at most"),
        (lambda m: m["files"]["params.safetensors"].update(bytes=1 << 39), "expected at most .* bytes in all"),
        (lambda m: m.update(padding="x" * (5 << 20)), "manifest.json: expected at most"),
        (lambda m: _age(m).update(minimum=1e308), "name, shape and dtype"),
        (lambda m: _age(m).update(minimum=10**40), "name, shape and dtype"),
        (lambda m: _age(m).update(finite="yes"), "name, shape and dtype"),
    ],
)
def test_manifests_that_ask_for_too_much_are_refused(forge, edit, message):
    with pytest.raises(ExportError, match=message):
        export.load(forge(edit=edit))


def test_an_export_with_score_expressions_is_refused(forge):
    folder = forge(edit=lambda manifest: manifest.update(orders={"value": "p * bid"}))
    for read in (export.load, export.restore):
        with pytest.raises(
            ExportError, match="orders: expected names of compiled functions; export again with orders=.*, got dict"
        ):
            read(folder)


def test_a_call_takes_at_most_half_of_the_memory():
    assert consume.functions.CALL_BYTES <= files.memory() // 2


def test_golden_outputs_that_are_infinite_are_refused():
    infinite = np.full(2, np.inf, np.float32)
    with pytest.raises(ExportError, match="expected the golden output within"):
        consume.model.difference("logits", infinite, infinite, 1e-4)


def test_params_of_which_one_is_a_group_too_are_not_rebuilt(forge, tmp_path):
    raw = safetensors(tmp_path, **{"user": np.zeros(1, np.float32), "user/kernel": np.zeros(1, np.float32)})
    with pytest.raises(ExportError, match="expected params, config and encoder, got others"):
        export.rebuild(forge({"params.safetensors": raw}), tmp_path / "new")


def _age(manifest):
    return next(entry for entry in manifest["functions"]["user"]["inputs"] if entry["name"] == "history.age")


def test_deep_json_is_refused(forge):
    folder = forge()
    (folder / "manifest.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    with pytest.raises(ExportError, match="manifest.json: expected JSON"):
        export.load(folder)


def test_deep_names_of_arrays_are_refused(tmp_path):
    raw = safetensors(tmp_path, **{"/".join("a" * 5000): np.zeros(1, np.float32)})
    with pytest.raises(ExportError, match="expected at most 32 groups"):
        consume.read_arrays(raw)


def test_sparse_files_are_refused_by_their_apparent_size(forge, monkeypatch):
    size = 3 << 30
    folder = forge(edit=lambda m: m["files"]["params.safetensors"].update(bytes=size))
    os.truncate(folder / "params.safetensors", size)
    monkeypatch.setattr(files, "memory", lambda: 4 << 30)
    before = _peak()
    with pytest.raises(ExportError, match=f"expected at most {2 << 30} bytes in all"):
        export.load(folder)
    assert _peak() - before < 1 << 30


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
    with pytest.raises(ExportError, match="offsets int64 that rise from 0"):
        consume.model._vocabularies({f"item/{name}": array for name, array in arrays.items()})
    with pytest.raises(ValueError, match="offsets int64 that rise from 0"):
        Vocabulary.from_arrays(arrays)


def test_one_empty_string_is_a_good_vocabulary():
    for raw in (["", "b", "é"], ["a"], []):
        arrays = Vocabulary(raw).to_arrays()
        assert Vocabulary.from_arrays(arrays) == Vocabulary(raw)
        assert len(consume.model._vocabularies({f"x/{name}": array for name, array in arrays.items()})["x"]) == len(raw)


# Checkpoints and index snapshots


RECORDS = {"one": storage.METADATA_FILE, "snapshot": "manifest.json"}


@pytest.fixture
def rewrite(originals, tmp_path):
    """`rewrite(name, edit)` is a copy of "one" or "snapshot" whose record was edited, with a checksum that fits."""

    def make(name, edit):
        shutil.copytree(originals / name, tmp_path / name, dirs_exist_ok=True)
        file = tmp_path / name / RECORDS[name]
        whole = json.loads(file.read_text())
        record = whole["custom_metadata"] if name == "one" else whole
        edit(record)
        record["sha256"] = consume.seal(record)
        file.write_text(json.dumps(whole))
        return tmp_path / name

    return make


def _leaf(record, **changes):
    record["leaves"]["params"]["embedding/item"].update(changes)


EMPTY = {"dtype": "float32", "shape": [0], "sha256": hashlib.sha256(b"").hexdigest()}  # of which the record alone tells


CHECKPOINTS = [
    lambda r: _leaf(r, shape=[1 << 38, 3]),
    lambda r: _leaf(r, shape=[1 << 62, 3]),
    lambda r: _leaf(r, shape=[10**400]),
    lambda r: _leaf(r, shape=[0, 1 << 40, 1 << 40]),
    lambda r: _leaf(r, shape=[-4, -3]),
    lambda r: _leaf(r, shape=[4.0, 3]),
    lambda r: _leaf(r, shape=[1] * 99),
    lambda r: _leaf(r, shape="43"),
    lambda r: _leaf(r, dtype="<U999999999"),
    lambda r: _leaf(r, dtype=7),
    lambda r: _leaf(r, dtype="nothing"),
    lambda r: _leaf(r, sha256=None),
    lambda r: r["leaves"]["params"].update({"/".join("a" * 5000): EMPTY}),
    lambda r: r["leaves"]["params"].update({"x": EMPTY, "x/y": EMPTY}),
    lambda r: r["leaves"].pop("params"),
    lambda r: r["leaves"].pop("encoder"),
    lambda r: r["leaves"].update(params=r["leaves"]["encoder"]),
    lambda r: r.pop("step"),
    lambda r: r.update(step="5"),
    lambda r: r.update(metrics=[1]),
    lambda r: r.update(metrics={"gauc": "high"}),
    lambda r: r.update(metrics={"gauc": 10**400}),
    lambda r: r.update(config=[]),
    lambda r: r["config"].update(width="8"),
    lambda r: r["config"].update(towers=3),
    lambda r: r.update(encoder=[]),
    lambda r: r["encoder"].update(length=1 << 40),
    lambda r: r["encoder"].update(length="4"),
    lambda r: r["encoder"]["columns"].update(bag_length=1 << 40),
    lambda r: r["encoder"]["scales"].update(x=[10**400, 1]),
    lambda r: r["encoder"].update(scales=[]),
    lambda r: r["encoder"].update(vocabularies=7),
]


def test_figures_that_are_none_are_refused_by_the_run(rewrite, tmp_path):
    rewrite("one", lambda r: r.update(metrics={"gauc": "high"})).rename(tmp_path / "5")
    with pytest.raises(CheckpointError, match="metrics inside cannot be read"):
        _ = checkpoint.Checkpoints(tmp_path, keep_best=("gauc", "max")).best


def test_leaves_larger_than_memory_are_refused(originals, monkeypatch):
    monkeypatch.setattr(storage, "memory", lambda: 100_000)
    assert checkpoint.load(originals / "one").step == 5
    monkeypatch.setattr(storage, "memory", lambda: 40_000)  # files of at most 37,155 bytes, leaves of less
    checkpoint.load(originals / "one")
    monkeypatch.setattr(storage, "memory", lambda: 50)
    with pytest.raises(CheckpointError, match="expected at most 65536 files, this one of at most 50 bytes"):
        checkpoint.load(originals / "one")
    monkeypatch.setattr(storage, "_check_files", lambda path: None)
    with pytest.raises(CheckpointError, match="expected at most the 50 bytes of memory here, it lists"):
        checkpoint.load(originals / "one")


SNAPSHOTS = [
    lambda r: r.update(batch_size=1 << 40),
    lambda r: r.update(batch_size=0),
    lambda r: r.update(batch_size=16.0),
    lambda r: r.update(storage=[]),
    lambda r: r.update(positions=[]),
    lambda r: r.update(positions={"x": 1}),
    lambda r: r.update(positions={"1": "2"}),
    lambda r: _rows_of(r).update(shape=[]),
    lambda r: _rows_of(r).update(shape=[40, 1 << 36]),
    lambda r: _rows_of(r).update(shape=[40, -8]),
    lambda r: _rows_of(r).update(dtype="<U999999999"),
    lambda r: _rows_of(r).update(dtype=[]),
    lambda r: r["arrays"].update({f"{next(iter(r['arrays']))}/deeper": _rows_of(r)}),
    lambda r: r["files"].clear(),
    lambda r: r["files"]["arrays.safetensors"].update(bytes="7"),
    lambda r: r["files"]["arrays.safetensors"].update(bytes=1 << 60),
    lambda r: r["config"].update(schema=7),
    lambda r: r["config"]["schema"].update(content=10**400, width="x"),
]
OF_ITEMS = [
    lambda r: r.update(items=1 << 62),
    lambda r: r.update(items=-1),
    lambda r: r.update(items=41),
    lambda r: r.update(items="40"),
    lambda r: r.update(ids="texts"),
    lambda r: r.update(ids=[]),
    lambda r: [r["arrays"].pop(name) for name in list(r["arrays"]) if name.startswith("rows/")],
]
RECORDED = {
    "one": (CHECKPOINTS, (checkpoint.load,)),
    "snapshot": (
        SNAPSHOTS + OF_ITEMS, (inspect, aif.index.verify, lambda path: ItemIndex.load(path, writer_world.TRAINED)),
    ),
}  # fmt: skip
"""What is written into the record of each folder, and what reads it."""


def _rows_of(record):
    return next(leaf for name, leaf in record["arrays"].items() if name.startswith("rows/"))


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, (edits, _) in RECORDED.items() for n in range(len(edits))])
def test_records_that_ask_for_too_much_are_refused(rewrite, name, number):
    edits, reads = RECORDED[name]
    folder, before = rewrite(name, edits[number]), _peak()
    for read in reads:
        with pytest.raises(CheckpointError, match=f"{name}: "):
            read(folder)
    assert _peak() - before < 1 << 30


def test_snapshots_with_rows_of_another_shape_are_refused(rewrite):
    """A snapshot that says items without end: no template is allocated for them."""

    def edit(record):
        record["items"] = 1 << 38
        for leaf in record["arrays"].values():
            leaf.update(shape=[1 << 38, *leaf["shape"][1:]], dtype="bool")

    folder, before = rewrite("snapshot", edit), _peak()
    with pytest.raises(CheckpointError, match="snapshot: .* bytes"):
        aif.index.verify(folder)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (16 << 30), limits[1]))
    try:
        with pytest.raises(ValueError, match="bytes"):
            ItemIndex.load(folder, writer_world.TRAINED)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert _peak() - before < 1 << 30


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *(("one", what) for what in ("deep", "sparse record", "sparse data", "sparse metadata", "many")),
        *(("snapshot", what) for what in ("deep", "sparse record", "sparse data")),
    ],
)
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
    before = _peak()
    with pytest.raises(CheckpointError, match=f"{name}: "):
        checkpoint.load(folder) if name == "one" else aif.index.verify(folder)
    assert _peak() - before < 1 << 30


def _peak():
    """Bytes of memory that this process had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def _address_space():
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
