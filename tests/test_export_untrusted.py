"""Folders of an attacker who makes the checksums fit: each ends in the room's error, in bounded time and memory."""

import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import checkpoint, cli, export
from aif_jax.checkpoint import CheckpointError, storage
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.export import ExportError, consume, writer
from aif_jax.export.consume import files
from aif_jax.export.consume import model as loader
from aif_jax.index import ItemIndex, inspect
from aif_jax.user_table import UserTable
from tests import writer_world
from tests.golden import make_export
from tests.reliability import damaged
from tests.test_export import resealed

FOLDER = Path(make_export.__file__).parent / "export"  # the same bytes everywhere, so the flips below are too
FLIPS = {  # (position, bit): what they do to jax 0.10.2, most of the time
    "interaction": {
        "SIGSEGV": [(18592, 3), (7916, 5), (1242, 3), (18574, 4), (18446, 7), (2609, 2)], "SIGABRT": [(1249, 6)],
        "endless": [(5069, 2), (4678, 3)],
    },
    "user": {"SIGSEGV": [(27290, 3), (27249, 2), (26817, 1), (27210, 7)], "endless": [(5328, 0)]},
}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A checkpoint "one", an index "snapshot", a table of "users" and an exported "model" with encoder and index."""
    folder = tmp_path_factory.mktemp("originals")
    for make in (damaged._make_checkpoint, damaged._make_index, damaged._make_users, damaged._make_export):
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


def flipped(name, position, bit):
    raw = bytearray((FOLDER / f"{name}.jax_export").read_bytes())
    raw[position] ^= 1 << bit
    return {f"{name}.jax_export": bytes(raw)}


def function(change):
    """The golden interaction with other logits: `change(logits, inputs)`; names and shapes stay."""
    exported = consume.load(FOLDER, trusted=True).functions["interaction"].exported
    (params, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    specs = jax.tree.map(lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype), (params, inputs))

    def changed(params, inputs):
        return {"logits": change(exported.call(params, inputs)["logits"])}

    return {"interaction.jax_export": jax.export.export(jax.jit(changed), platforms=["cpu"])(*specs).serialize()}


def endless(logits):
    return jax.lax.while_loop(lambda x: jnp.isfinite(x).all() | True, lambda x: jnp.sin(x) + 1, logits)


def hungry(logits):
    rows = jnp.sort(logits[0] + jnp.arange(1 << 30, dtype=jnp.float32))
    return logits + rows[0]


@pytest.fixture
def left_behind():
    """`left_behind()` are the child processes that this process has now and had not when the test began."""

    def children():
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    return lambda: children() - before


# Functions run in a child process


@pytest.mark.parametrize("name", list(FLIPS))
def test_flipped_functions_are_refused_and_this_process_lives(forge, name):
    for position, bit in FLIPS[name]["SIGSEGV"][:2] + FLIPS[name].get("SIGABRT", []):
        with pytest.raises(ExportError) as caught:
            export.load(forge(flipped(name, position, bit)), max_seconds=25)
        # what reads beyond its memory crashes, reads on, or finds bytes there that jax refuses: that differs from run to run
        assert any(words in str(caught.value) for words in ("died of SIG", "got no end", f"{name}: expected a function"))


def test_a_child_process_that_crashes_is_named_by_its_signal(monkeypatch):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n"
    monkeypatch.setattr(loader, "START", crash)
    with pytest.raises(ExportError, match="died of SIGSEGV; max_bytes sets the limit"):
        export.load(FOLDER)


def test_functions_that_are_read_for_ever_end_in_time(forge, left_behind):
    folder = forge(flipped("interaction", *FLIPS["interaction"]["endless"][0]))
    with pytest.raises(ExportError):
        export.verify(folder, max_seconds=6)
    assert not left_behind()


@pytest.mark.parametrize("call", [export.verify, export.load])
def test_a_function_that_loops_for_ever_is_refused(forge, call, left_behind):
    folder = forge(function(endless))
    with pytest.raises(ExportError, match="in at most 7 s, got no end; max_seconds sets the limit"):
        call(folder, max_seconds=7)
    assert not left_behind()


def test_a_function_that_takes_all_memory_is_refused(forge):
    before = _peak()
    with pytest.raises(ExportError, match="interaction: expected golden outputs, the function failed|bytes of memory"):
        export.verify(forge(function(hungry)), max_bytes=2 << 30)
    assert _peak() - before < 1 << 30


def test_a_child_process_ends_by_itself_where_its_parent_was_killed(forge):
    folder = forge(function(endless))
    code = f"from aif_jax.export import consume; consume.verify({str(folder)!r}, max_seconds=3)"
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while not (found := Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_good_folder_passes_from_the_copied_package_alone(forge, tmp_path, monkeypatch):
    """The child imports our copy: neither one in the folder, nor modules in the working directory."""
    folder = forge()
    shutil.copytree(Path(consume.__file__).parent, tmp_path / "home" / "consume")
    for name in ("consume", "json", "jax", "numpy"):
        (folder / f"{name}.py").write_text("raise SystemExit('the folder ran code')")
    (folder / "consume").mkdir()
    (folder / "consume" / "__init__.py").write_text("raise SystemExit('the folder ran code')")
    code = f"""
import sys
sys.path[:] = [path for path in sys.path if path]
sys.path.insert(0, {str(tmp_path / "home")!r})
import consume
report = consume.verify({str(folder)!r})
assert consume.load({str(folder)!r}).version == report["version"]
assert "aif_jax" not in sys.modules and "flax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_pinned_and_trusted_folders_need_no_child(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a child process")

    monkeypatch.setattr(loader.subprocess, "run", refuse)
    digest = files.digest_of(FOLDER)
    assert export.load(FOLDER, sha256=digest).version == export.load(FOLDER, trusted=True).version
    assert export.verify(FOLDER, sha256=digest)["max_abs_diff"] < 1e-5
    with pytest.raises(AssertionError, match="a child process"):
        export.load(FOLDER)


def test_the_command_line_checks_in_a_child(forge, capsys):
    folder = str(forge(flipped("interaction", *FLIPS["interaction"]["SIGSEGV"][3])))
    assert cli.main(["verify", folder]) == 1
    error = capsys.readouterr().err
    assert any(words in error for words in ("died of SIG", "got no end", "interaction: "))
    assert cli.main(["verify", "--trusted", str(FOLDER)]) == cli.main(["verify", str(FOLDER)]) == 0


def test_without_limits_of_resources_a_child_still_checks(monkeypatch):
    """As on Windows: the limit of time stays."""
    code = "import sys; sys.modules['resource'] = None\n"
    monkeypatch.setattr(loader, "START", code + loader.START)
    assert export.verify(FOLDER)["max_abs_diff"] < 1e-5


def test_functions_of_other_platforms_and_a_missing_interpreter_say_what_to_do(forge, monkeypatch):
    with pytest.raises(ExportError, match=r"platforms: expected cpu.*got \['tpu'\]; trusted=True"):
        export.load(forge(edit=lambda m: m.update(platforms=["tpu"])))
    monkeypatch.setattr(loader.sys, "executable", "/nowhere/python")
    with pytest.raises(ExportError, match="got no child process .*trusted=True does without"):
        export.load(FOLDER)


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
            read(forge({f"{file}.safetensors": raw}, source=originals / "model"), trusted=True)


def test_swapped_functions_are_refused(forge):
    swap = {"user.jax_export": (FOLDER / "users.jax_export").read_bytes()}
    with pytest.raises(ExportError, match="user"):
        export.load(forge(swap), trusted=True)


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
        export.load(forge(edit=edit), trusted=True)


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
        export.load(folder, trusted=True)
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
        assert len(consume.model._vocabularies({f"x/{name}": array for name, array in arrays.items()})["x"][0]) == len(raw)


# Checkpoints and index snapshots


RECORDS = {"one": storage.METADATA_FILE, "snapshot": "manifest.json", "users": "manifest.json"}


@pytest.fixture
def rewrite(originals, tmp_path):
    """`rewrite(name, edit)` is a copy of "one", "snapshot" or "users" whose record was edited, with a checksum that fits."""

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
    monkeypatch.setattr(storage, "memory", lambda: 10_000)
    assert checkpoint.load(originals / "one").step == 5
    monkeypatch.setattr(storage, "memory", lambda: 1000)  # files of at most 738 bytes, params of 64, vocabularies of some 200
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
OF_USERS = [lambda r: r.update(users=1 << 62), lambda r: r.update(users=-1), lambda r: r.update(users="4")]
RECORDED = {
    "one": (CHECKPOINTS, (checkpoint.load,)),
    "snapshot": (
        SNAPSHOTS + OF_ITEMS, (inspect, aif.index.verify, lambda path: ItemIndex.load(path, writer_world.TRAINED)),
    ),
    "users": (SNAPSHOTS + OF_USERS, (UserTable.inspect, lambda path: UserTable.load(path, writer_world.users()))),
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
    resource.setrlimit(resource.RLIMIT_AS, (loader._address_space() + (16 << 30), limits[1]))
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


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
