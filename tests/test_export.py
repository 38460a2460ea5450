"""The exported folder: runs without model code, refuses what it should, untrusted contents too, replays its golden case."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks, export
from aif_jax.blocks import block
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.export import ExportError, consume, writer
from aif_jax.export.consume import files
from aif_jax.export.consume.ids import ids_by_name
from aif_jax.index import ItemIndex
from aif_jax.readers import encode_items
from aif_jax.registry import BLOCKS
from aif_jax.store.trained import fingerprint
from aif_jax.trees import leaves_by_path, nest
from tests import demo
from tests.golden import make_export
from tests.own_block import Decay
from tests.refusals import refused

C = 100
FOLDER = Path(make_export.__file__).parent / "export"
load, verify = export.load, export.verify


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, digest, model, params of a model with every block, made for three platforms."""
    model, params = demo.build()
    folder = tmp_path_factory.mktemp("export") / "model"
    return folder, export.save(folder, aif.Trained(model, params)), model, params


@pytest.fixture(scope="module")
def loaded(made):
    return load(made[0], buckets={"c": [64, 128]})


def forged(source: Path, folder: Path, files: Mapping[str, bytes] = {}, edit: Callable[[Any], Any] = id) -> Path:
    """A copy of an export in a folder, with other contents of some files, after `edit(manifest)`; its checksums fit."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit(manifest)
    manifest["sha256"] = consume.seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def bytes_of(arrays: Mapping[str, Any], folder: Path) -> bytes:
    """What a file of arrays holds."""
    writer.write_arrays(folder / "arrays", arrays)
    return (folder / "arrays").read_bytes()


@pytest.fixture(scope="module")
def scored(made):
    """One user's features, C items, and the logits of the model in Python."""
    _, _, model, params = made
    features, items = demo.user(model.config), demo.items(C)
    return features, items, np.asarray(jax.jit(model.joint)(params, features, items))


def encoder(columns=Columns(action="event", actions=("view", "buy")), users=("ann", "bob")):  # noqa: B008 (frozen)
    """An encoder of three items in two categories."""
    vocabularies = {"user": Vocabulary(users), "item": Vocabulary([7, 8, 10**12]), "category": Vocabulary(["é", "b"])}
    return Encoder(columns=columns, vocabularies=vocabularies, length=12)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Folder, model, params and encoder of a model that was trained on encoded data."""
    made = encoder()
    config = aif.presets.two_tower(made.schema, width=4, short_length=6, long_length=12, sequence=False)
    catalogue = aif.Catalogue.from_items(made.schema, [7, 8, 10**12], ids={"category": [1, 2, 1]})
    model = aif.build(config)
    params, folder = demo.init(model, items=catalogue), tmp_path_factory.mktemp("encoded") / "model"
    export.save(folder, aif.Trained(model, params, made), platforms=("cpu",))
    return folder, model, params, made


@block
class Paired(Decay):
    """A block of your own whose state is a tuple."""

    def user(self, params, user):
        means = Decay.user(self, params, user)
        return means, means.sum()

    def score(self, params, state, rows, kernels):
        means, total = state.blocks[self.name]
        inputs = Decay.score(self, params, dataclasses.replace(state, blocks={self.name: means}), rows, kernels)
        return inputs._replace(logit=inputs.logit + total)


def test_scores_equal_the_models(loaded, scored):
    features, items, logits = scored
    state, rows = loaded.user(features), loaded.item(items)
    np.testing.assert_allclose(loaded.interaction(state, rows), logits, rtol=0, atol=1e-6)
    order = np.random.default_rng(0).integers(0, C, 250)  # more than the largest bucket
    np.testing.assert_allclose(loaded.score(state, jax.device_put(rows), order), logits[order], rtol=0, atol=1e-6)
    rows = loaded.item(demo.items(0))
    assert rows["vector"].shape == (0, 8) and rows["fitted.signatures_32"].dtype == np.uint32


def test_a_flat_dict_is_taken_like_the_dataclass_and_unread_inputs_may_be_left_out(loaded, scored):
    features, _, _ = scored
    flat, entries = export.flatten(features), loaded.manifest["functions"]["user"]
    assert entries["ignored"] == []
    whole, part = loaded.user(features), loaded.user({entry["name"]: flat[entry["name"]] for entry in entries["inputs"]})
    assert whole.keys() == {entry["name"] for entry in entries["outputs"]}
    for name, value in whole.items():
        np.testing.assert_array_equal(value, part[name], err_msg=name)


def test_history_may_be_longer_than_its_bucket(loaded, made, scored):
    """A shorter one: `tests/promises/test_exported_equals_joint.py`."""
    _, _, model, params = made
    features = dataclasses.replace(scored[0], history=demo.history(40, 37, seed=3))  # the model reads 24 places
    expected = jax.jit(model.joint)(params, features, scored[1])
    np.testing.assert_allclose(loaded.interaction(loaded.user(features), loaded.item(scored[1])), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 129, 300])
def test_any_count_of_candidates(loaded, scored, count):
    """The blocks of a call are of one bucket, so equal candidates have equal scores, wherever they stand."""
    features, items, logits = scored
    at = np.arange(count) % C
    got = loaded.interaction(loaded.user(features), {name: value[at] for name, value in loaded.item(items).items()})
    assert got.shape == (count,) and got.dtype == np.float32
    np.testing.assert_allclose(got, logits[at], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[C:], got[: max(count - C, 0)])


def test_warm_counts_neither_trace_nor_transfer_unasked(made, scored, monkeypatch):
    features, items, _ = scored
    model = load(made[0])
    rows = model.item(items)
    table = jax.device_put(rows)
    state = model.user(features)
    for count in (64, 99):  # the first calls of each bucket
        model.interaction(state, {name: value[:count] for name, value in rows.items()})
        model.score(state, table, np.arange(count))
    with jax.no_tracing(), jax.transfer_guard("disallow"):
        state = model.user(features)
        for count in (1, 63, 77, 99):
            model.interaction(state, {name: value[:count] for name, value in rows.items()})
            model.score(state, table, np.arange(count))
    cold = load(made[0])  # a model that was not warmed up must fail here, or the check above checks nothing
    with jax.no_tracing(), pytest.raises(RuntimeError):
        cold.user(features)
    monkeypatch.setattr(jax.export, "default_export_platform", lambda: "rocm")
    refused(export.ExportError, "user: expected a function for rocm, got one for cpu, cuda, tpu;", cold.user, features)


def test_manifest_says_what_is_inside(made, loaded):
    folder, _, model, params = made
    manifest = loaded.manifest
    assert aif.Config.from_json(manifest["config"]) == model.config
    assert manifest["made_with"]["jax"] == jax.__version__ and manifest["platforms"] == ["cpu", "cuda", "tpu"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if "__pycache__" not in path.parts}
    assert manifest["files"].keys() == names - {"manifest.json"}
    shapes = {entry["name"]: (entry["shape"], entry["dtype"]) for entry in manifest["functions"]["interaction"]["inputs"]}
    assert shapes["rows.vector"] == (["c", 8], "float32") and shapes["state.blocks.sim_tier.signature"] == (["l", 1], "uint32")
    stored = consume.read_arrays((folder / "params.safetensors").read_bytes())
    for path, leaf in leaves_by_path(params).items():
        np.testing.assert_array_equal(stored[path], leaf, err_msg=path)


def test_runs_with_what_the_page_names_and_nothing_else(made, scored, python, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "tutorial_export.md").read_text()
    assert "servers that have only `jax`, `numpy` and `flatbuffers`" in page and "`pip install jax flatbuffers`" in page
    write, check, score = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    here: dict[str, Any] = {}
    exec(write + check, here)
    features, items, logits = scored
    given = {f"user/{k}": v for k, v in export.flatten(features).items()}
    np.savez(tmp_path / "in.npz", **given, **{f"item/{k}": v for k, v in export.flatten(items).items()})
    out = python(
        f"""
import json
import os
import sys
import types
import importlib.machinery
import importlib.util
ALLOWED = {{"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy", "consume"}} | sys.stdlib_module_names
class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        root = name.split(".")[0]
        return super().find_spec(name, path, target) if root in ALLOWED or root.startswith("_sysconfigdata") else None
sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, Only]
for name in ("flax", "optax", "orbax.checkpoint", "safetensors", "aif_jax", "aif_jax.model"):
    try:
        __import__(name)
        sys.exit(name + " could be imported")
    except ImportError:
        pass
os.chdir({str(tmp_path)!r})
digest = {here["digest"]!r}
{score}
page = logits
given = np.load({str(tmp_path / "in.npz")!r}, allow_pickle=False)
part = lambda name: {{k.split("/")[1]: given[k] for k in given.files if k.startswith(name)}}
model = consume.load({str(made[0])!r})
logits = model.interaction(model.user(part("user")), model.item(part("item")))
print(json.dumps([page.tolist(), logits.tolist()]))
"""
    )
    of_page, others = json.loads(out)
    np.testing.assert_allclose(others, logits, rtol=0, atol=1e-6)
    data, model, trained, index = (here[name] for name in ("data", "model", "trained", "index"))
    history = {"item": [17, 1017], "time": [1_700_000_000, 1_700_000_050]}
    features = data.encoder.with_length(model.config.history_length).user(None, history, now=1_700_000_900)
    state = jax.jit(model.user)(trained.params, features)
    expected = jax.jit(model.interaction)(trained.params, state, index.take([17, 48017])[0])
    np.testing.assert_allclose(np.array(of_page)[:2], expected, atol=1e-5)


def _set(name, place, value):
    def change(x):
        x[name] = x[name].copy()
        x[name][place] = value

    return change


WRONG_USERS = [
    (lambda x: x.pop("history.mask"), r"user inputs: .*missing \['history.mask'\]"),
    (lambda x: x.update(brand=np.int32(1)), r"unknown \['brand'\]"),
    (lambda x: x.update(floats=np.zeros(2)), "user input floats: expected dtype float32, got float64"),
    (lambda x: x.update(floats=np.zeros(3, np.float32)), r"floats: expected shape \[2\], got \[3\]"),
    (lambda x: x.update({"history.mask": np.zeros(23, bool)}), r"history.*: expected shape \[2[34]\], got \[2[34]\]"),
    (lambda x: x.update({"ids.gender": np.int64(1)}), "ids.gender: expected dtype int32, got int64"),
    (lambda x: x.update({"ids.gender": np.int32(3)}), r"ids.gender: expected values in \[0, 3\), got 3 at the only position"),
    (_set("ids.interests", 1, -1), r"ids.interests: expected values in \[0, 7\), got -1 at position \[1\]"),
    (_set("history.item", 3, 50), r"history.item: expected values in \[0, 50\), got 50 at position \[3\]"),
    (_set("history.action", 3, 4), r"history.action: expected values in \[0, 4\), got 4"),
    (_set("history.age", 2, np.nan), r"history.age: expected finite values of at least 0, got nan at position \[2\]"),
    (_set("history.age", 2, -1.0), r"history.age: expected finite values of at least 0, got -1.0 at position \[2\]"),
    (_set("floats", 0, np.inf), r"floats: expected finite values, got inf at position \[0\]"),
]  # fmt: skip
WRONG_ITEMS = [
    (_set("ids.tags", (7, 2), 9), r"item input ids.tags: expected values in \[0, 9\), got 9 at position \[7, 2\]"),
    (_set("content", (1, 0), np.nan), r"content: expected finite values, got nan at position \[1, 0\]"),
    (lambda x: x.pop("content"), r"missing \['content'\]"),
    (lambda x: x.update(floats=x["floats"][:3]), r"floats: expected shape \[100, 1\], got \[3, 1\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, change, message", [("user", *each) for each in WRONG_USERS] + [("item", *each) for each in WRONG_ITEMS]
)
def test_wrong_inputs_are_refused_in_words(loaded, scored, name, change, message):
    """What `check_user_features` refuses the loader refuses too."""
    flat = export.flatten(scored[name == "item"])
    change(flat)
    refused(export.ExportError, message, getattr(loaded, name), flat)


def test_rows_outside_the_table_and_buckets_outside_the_axes_are_refused(made, loaded, scored):
    state, rows = loaded.user(scored[0]), loaded.item(scored[1])
    refused(export.ExportError, r"expected values in \[0, 100\), got 0 to 100", loaded.score, state, rows, np.array([0, 100]))
    refused(export.ExportError, r"expected integers \[C\], got float64", loaded.score, state, rows, np.array([0.0]))
    for buckets, message in (
        ({"c": [32, 64]}, "expected sizes of at least 64, got"),
        ({"l": [24, 32]}, r"buckets 'l': expected sizes from 6 to 24, got \[24, 32\]"),
        ({"x": [1]}, "expected axes among"),
    ):
        refused(export.ExportError, message, load, made[0], buckets=buckets)


def test_a_manifest_other_than_the_pinned_one_is_refused(made, tmp_path):
    folder = forged(made[0], tmp_path / "copy", edit=lambda manifest: manifest.update(version="0" * 64))
    assert load(made[0], sha256=made[1]).version != "0" * 64
    refused(export.ExportError, "manifest.json: expected sha256", load, folder, sha256=made[1])


def test_links_are_refused(made, tmp_path):
    folder = Path(shutil.copytree(made[0], tmp_path / "copy"))
    shutil.move(folder / "consume", folder.parent / "moved")
    (folder / "consume").symlink_to(folder.parent / "moved")
    refused(export.ExportError, "consume/__init__.py: expected a regular file", verify, folder)
    (folder / "consume").unlink()
    shutil.move(folder.parent / "moved", folder / "consume")
    shutil.move(folder / "params.safetensors", folder.parent / "outside")
    (folder / "params.safetensors").symlink_to(folder.parent / "outside")
    refused(export.ExportError, "params.safetensors: expected a regular file", load, folder)


def test_an_exported_index_scores_like_the_index(tmp_path):
    model, params = demo.build(**demo.VARIANTS["base"])
    user, items, ids = demo.user(model.config), demo.items(49), np.arange(49) * 10**10 + 7
    index = ItemIndex.build(aif.Trained(model, params), [(ids, items)], batch_size=16, progress=False).delete(ids[3:5])
    export.save(tmp_path / "model", aif.Trained(model, params), index, platforms=("cpu",))
    loaded, left = load(tmp_path / "model"), np.delete(np.arange(49), [3, 4])
    rows, known = loaded.index.lookup(ids)
    np.testing.assert_array_equal(np.flatnonzero(known), left)
    got = loaded.score(loaded.user(user), loaded.index.table, rows[left])
    np.testing.assert_allclose(got, np.asarray(jax.jit(model.joint)(params, user, items))[left], rtol=0, atol=1e-6)


def test_a_block_of_bfloat16_is_restored_with_its_index(tmp_path, monkeypatch, lightly):
    item = Paired.item
    monkeypatch.setattr(Paired, "item", lambda *given: {name: leaf.astype("bfloat16") for name, leaf in item(*given).items()})
    trained = aif.Trained(*demo.build(blocks=(Paired(),), sequence=False))
    index = ItemIndex.build(trained, [(np.arange(49), demo.items(49))], batch_size=16, progress=False)
    export.save(tmp_path / "model", trained, index, platforms=("cpu",))
    restored = export.restore(tmp_path / "model")
    assert demo.same(restored.index.take([3, 9]), index.take([3, 9])) and restored.check_golden() < 1e-6


@pytest.mark.parametrize("edit, message", [
    (lambda m: m.update(format="other"), "expected the format"),
    (lambda m: m.update(format_version=4), "expected format_version 3, got 4"),
    (lambda m: m["functions"]["item"].update(file=["x"]), "among its files"),
    (lambda m: m["axes"]["l"].update(maximum=8), "buckets 'l': expected sizes from 6 to 8"),
    (lambda m: m["made_with"].update(jax="9" * 5000 + ".1"), "jax: expected at least"),
    (lambda m: m["made_with"].update(jax="99.1.0"), rf"least 99.1.0, which wrote this export, got {jax.__version__}; .*save"),
    (lambda m: m.update(index="golden.safetensors"), "index: expected the arrays ids"),
    (lambda m: m.update(params="golden.npz"), "expected 'golden.npz' among its files"),
])  # fmt: skip
def test_a_manifest_of_another_form_is_refused(made, tmp_path, edit, message):
    refused(export.ExportError, message, load, forged(made[0], tmp_path / "copy", edit=edit))


def _file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("raw", [
    b"",
    b"\xff" * 8,
    (1 << 40).to_bytes(8, "little"),
    _file(b"not json"),
    _file([]),
    _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
    _file({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"),
    _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
    _file({k: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for k in "ab"}, b"1234"),
    _file({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}),
    _file({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"),
    _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
    _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}, b"1234"),
    _file({"a": {"dtype": "F32", "shape": [0, 1 << 40, 1 << 40], "data_offsets": [0, 0]}}),
    _file({"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}}, b"1234"),
    _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
    _file(b"[" * 100000),
])  # fmt: skip
def test_array_files_that_lie_are_refused(raw):
    refused(export.ExportError, "arrays", consume.read_arrays, raw)


def test_a_blob_that_is_no_export_and_a_manifest_without_bound_are_refused(made, tmp_path):
    folder = forged(made[0], tmp_path / "copy", {"user.jax_export": b"nonsense" * 10})
    refused(export.ExportError, "user: expected a function serialised by jax.export", load, folder)
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(files.MANIFEST_BYTES + 1)
    refused(export.ExportError, "manifest.json: expected at most", load, folder)


def test_verify_replays_and_notices_other_parameters(made, tmp_path):
    report = verify(made[0], sha256=made[1])
    assert report["version"] == fingerprint(made[3], made[2].config) == load(made[0]).version
    assert report["functions"].keys() == {"user", "item", "interaction"}
    assert 0 <= report["max_abs_diff"] < 1e-5
    params = {k: v.copy() for k, v in consume.read_arrays((made[0] / "params.safetensors").read_bytes()).items()}
    params["head/first/bias"][0] += 0.5
    folder = forged(made[0], tmp_path / "copy", {"params.safetensors": bytes_of(params, tmp_path)})
    refused(export.ExportError, "interaction logits: expected the golden output within", verify, folder)


def test_expired_functions_are_written_again_from_params_config_and_encoder(encoded, tmp_path):
    older = lambda manifest: manifest["functions"]["user"].update(calling_convention_version=1)  # noqa: E731
    folder = forged(encoded[0], tmp_path / "old", edit=older)
    refused(export.ExportError, r"user: expected a calling convention of \d+ to \d+, as jax .* reads, got 1", load, folder)
    export.save(tmp_path / "new", aif.open(folder), platforms=("cpu",))
    again = load(tmp_path / "new")
    assert again.version == load(encoded[0]).version and again.encode("item", [8, 9]).tolist() == [2, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


def test_raw_ids_and_actions_become_rows_without_the_package(encoded):
    loaded = load(encoded[0])
    assert loaded.encode("item", [7, 5, 10**12]).tolist() == [1, 0, 3]
    assert loaded.encode("item", np.array([[8], [7]], np.uint32)).tolist() == [[2], [1]]
    assert loaded.encode("item", []).dtype == np.int32
    assert loaded.encode("category", ["é", "longer" * 1000, "b"]).tolist() == [2, 0, 1]
    assert loaded.encode("category", np.array("é")).tolist() == loaded.encode("category", "é").tolist() == 2
    actions = ["view", "buy", "none of them"]
    numbers = loaded.encode("action", actions)
    assert numbers.dtype == np.int32 and numbers.tolist() == encoded[3].action_rows(actions).tolist() == [1, 2, 0]
    assert loaded.encode("action", [["buy"], [3]]).tolist() == [[2], [0]]
    for name, raw, message in (
        ("brand", [1], "vocabulary: expected one of.*category.*got 'brand'"),
        ("item", ["7"], "vocabulary 'item': expected integers below 2.63, got dtype <U1"),
        ("category", [7], "vocabulary 'category': expected strings, got 7"),
        ("category", ["b", None], "vocabulary 'category': expected strings, got None"),
    ):
        refused(export.ExportError, message, loaded.encode, name, raw)


def test_a_raw_user_scores_as_in_the_package(encoded):
    folder, model, params, made = encoded
    loaded = load(folder)
    assert (loaded.version, loaded.encoding) == (fingerprint(params, model.config, made), made.version)
    events = {"item": [7, 8, 7], "time": [10**9, 10**9 + 5, 10**9 + 9], "event": ["view", "buy", "view"]}
    user = made.user(None, events, 10**9 + 20)
    raw, items = encode_items({"item": [8, 7, 99], "category": ["b", "é", "b"]}, made)
    got = loaded.interaction(loaded.user(user), loaded.item(items))
    np.testing.assert_allclose(got, jax.jit(model.joint)(params, user, items), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(loaded.encode("item", raw), items.ids["item"])


def test_features_of_another_encoder_are_refused(encoded):
    loaded, made = load(encoded[0]), encoded[3]
    user, other = made.user(None, None, 10**9), encoder(users=("ann", "cleo"))
    assert loaded.user(dataclasses.replace(user, encoding="")).keys() == loaded.user(user).keys()
    message = f"features: expected the encoding {made.version}, got {other.version}; their"
    refused(export.ExportError, message, loaded.user, other.user(None, None, 10**9))
    refused(export.ExportError, message, loaded.item, encode_items({"item": [8], "category": ["b"]}, other)[1])
    other = encoder(columns=Columns(action="event", actions=("view", "buy"), user_id=True))
    message = "encoder: expected one that makes the features of .*users: none.*users: user 3"
    refused(ValueError, message, aif.Trained, *encoded[1:3], other)


def test_an_index_of_strings_is_looked_up_by_strings(encoded):
    _, model, params, made = encoded
    names = ["B00X4WHP5E", "", "é" * 300, "sku-1", "\U0001f600"]
    items = encode_items({"item": [7, 8, 99, 7, 8], "category": ["b", "é", "b", "x", "b"]}, made)[1]
    index = ItemIndex.build(aif.Trained(model, params, made), [(names, items)], batch_size=8, progress=False)
    arrays = writer.index_arrays(index)
    known = consume.ids.Ids({name: arrays[name] for name in ("keys", "marks")}, "index")
    np.testing.assert_array_equal(arrays["vector"][known.positions(np.array(names))], index.take(names)[0].vector)
    assert known.positions(["sku-2"]).tolist() == [-1]
    refused(export.ExportError, "index: expected strings, got 1", known.positions, [1])


@pytest.mark.parametrize("arrays, message", [
    ({"item/ids": np.array([8, 7])}, "vocabulary 'item': expected ascending int64"),
    ({"item/ids": np.array([7.0])}, "vocabulary 'item': expected ascending int64"),
    ({"item/x": np.array([7])}, r"vocabulary 'item': expected the arrays ids, .*, or utf8 and offsets, got \['x'\]"),
    ({"category/utf8": b"ab", "category/offsets": [0, 2, 0, 2]}, "category': expected utf8 uint8.*rise from 0 to m"),
    ({"category/utf8": b"\xff", "category/offsets": [0, 1]}, "category': expected UTF-8"),
])  # fmt: skip
def test_vocabularies_that_lie_are_refused(encoded, tmp_path, arrays, message):
    arrays = {k: np.frombuffer(v, np.uint8) if isinstance(v, bytes) else np.asarray(v) for k, v in arrays.items()}
    arrays = {k: v.astype(np.int64) if k.endswith("offsets") else v for k, v in arrays.items()}
    folder = forged(encoded[0], tmp_path / "copy", {"encoder.safetensors": bytes_of(arrays, tmp_path)})
    refused(export.ExportError, message, load, folder)
    refused(export.ExportError, "expected params, config and encoder, got others", aif.open, folder)


def test_a_block_of_your_own_is_exported_and_must_be_imported_to_be_opened(tmp_path, monkeypatch, lightly):
    model, params = demo.build(blocks=(Paired(), blocks.Sim("category", slots=30, length=2)), sequence=False)
    folder = tmp_path / "model"
    export.save(folder, aif.Trained(model, params), platforms=("cpu",))
    loaded = load(folder)
    user, items = demo.user(model.config, events=9), demo.items(20)
    expected = jax.jit(model.joint)(params, user, items)
    np.testing.assert_allclose(loaded.interaction(loaded.user(user), loaded.item(items)), expected, rtol=0, atol=1e-6)
    state = jax.jit(model.user)(params, user)  # nested, with a tuple
    np.testing.assert_allclose(loaded.interaction(state, loaded.item(items)), expected, rtol=0, atol=1e-6)
    score = Paired.score
    monkeypatch.setattr(Paired, "score", lambda *a: (own := score(*a))._replace(logit=own.logit - a[3].vector.mean()))
    trained, message = aif.Trained(model, params), "interaction logits: .* padding may not change a score: see `Block.score`"
    refused(export.ExportError, message, export.save, tmp_path / "mean", trained, platforms=("cpu",))
    monkeypatch.delitem(BLOCKS, "Paired")
    refused(export.ExportError, "one of .'Bea', .*got 'Paired'; import the module with its `@block`$", aif.open, folder)


def test_bounds_of_the_axes():
    """History: what tower and blocks need, to what they read. Candidates: where every comparison of sizes is decided."""

    def bounds(**changes):
        model, params = demo.build(**changes)
        return writer.functions.axis_bounds(model, leaves_by_path(params))

    assert bounds() == {"c": (64, None), "l": (6, 24), "n": (1, None)}
    assert bounds(blocks=(blocks.Sim("category", slots=30, length=2),))["l"] == (6, 24)
    assert bounds(blocks=(), long_length=3)["l"] == (6, 6)
    assert bounds(blocks=(blocks.Sim("category", slots=200, length=2),), long_length=300)["c"] == (256, None)
    assert bounds(blocks=(), width=64)["c"] == (128, None)


def test_leaves_that_no_function_reads_travel_with_the_model(tmp_path):
    model, params = demo.build(**demo.VARIANTS["base"])
    extended = params | {"user": params["user"] | {"auxiliary": {"kernel": np.ones((2, 3), np.float32)}}}
    trained = aif.Trained(model._replace(init=lambda *given, **options: extended), extended)
    export.save(tmp_path / "a", trained, platforms=("cpu",))
    assert all("user/auxiliary/kernel" not in function.params for function in load(tmp_path / "a").functions.values())
    assert export.restore(tmp_path / "a", model=trained.model).trained.params["user"]["auxiliary"]["kernel"].all()


def test_an_existing_folder_is_left_alone_and_a_failure_leaves_nothing(encoded, tmp_path, monkeypatch):
    _, model, params, made = encoded
    (tmp_path / "here").mkdir()
    refused(FileExistsError, "expected a new folder", export.save, tmp_path / "here", aif.Trained(model, params, made))
    monkeypatch.setattr(writer, "golden_case", lambda *a: {})
    # without golden inputs the folder does not verify
    refused(export.ExportError, "", export.save, tmp_path / "new", aif.Trained(model, params, made), platforms=("cpu",))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_golden_artefact_replays_under_this_jax_and_todays_code_agrees():
    """Made once, under the lowest supported one, by tests/golden/make_export.py."""
    made = json.loads((FOLDER / "manifest.json").read_text())["made_with"]["jax"]
    assert made == "0.10.2" and verify(FOLDER)["max_abs_diff"] < 1e-5
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 250_000
    loaded = load(FOLDER)
    config = aif.Config.from_json(loaded.manifest["config"])
    model = aif.build(config)
    params = nest(consume.read_arrays((FOLDER / loaded.manifest["params"]).read_bytes()))
    user, items = demo.user(config), demo.items(70)
    got = loaded.interaction(loaded.user(user), loaded.item(items))
    np.testing.assert_allclose(got, jax.jit(model.joint)(params, user, items), rtol=0, atol=1e-5)


def test_infinite_golden_outputs_and_params_of_which_one_is_a_group_too_are_refused(tmp_path):
    infinite = np.full(2, np.inf, np.float32)
    refused(ExportError, "expected the golden output within", consume.model.difference, "logits", infinite, infinite, 1e-4)
    raw = bytes_of({"user": np.zeros(1, np.float32), "user/kernel": np.zeros(1, np.float32)}, tmp_path)
    folder = forged(FOLDER, tmp_path / "params", {"params.safetensors": raw})
    refused(ExportError, "expected params, config and encoder, got others", aif.open, folder)


BOMB = np.zeros(200_000, np.int64)
OFFSETS = {
    "overlapping": np.resize(np.array([0, 1000], np.int64), 2001)[:-1], "empty": BOMB, "falling": np.array([0, 5, 3, 1000]),
    "outside": np.array([0, 5, 10**12]), "negative": np.array([0, -5, 1000]), "none": np.zeros(0, np.int64),
    "matrix": np.zeros((2, 2), np.int64), "floats": np.array([0.0, 1000.0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(OFFSETS))
def test_offsets_of_vocabularies_are_refused_before_strings_are_made(kind):
    data = np.frombuffer(bytes(range(97, 107)) * (0 if kind == "empty" else 100), np.uint8)
    named = {f"item/{name}": array for name, array in {"utf8": data, "offsets": OFFSETS[kind]}.items()}
    refused(ExportError, "vocabulary 'item': expected utf8 uint8 .*, offsets int64 that rise from 0", ids_by_name, named)


def test_one_empty_string_is_a_good_vocabulary():
    for raw in (["", "b", "é"], ["a"], []):
        named = {f"x/{name}": array for name, array in Vocabulary(raw).to_arrays().items()}
        assert Vocabulary(ids_by_name(named)["x"].raw) == Vocabulary(raw)
