"""The exported folder: runs without model code, refuses what it should, replays its golden case."""

import ast
import dataclasses
import hashlib
import json
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import export
from aif_jax.export import __main__ as command
from aif_jax.export import consume, onnx, writer
from tests import demo

C = 100


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, digest, model, params of a model with every block, made for three platforms."""
    model, params = demo.build()
    folder = tmp_path_factory.mktemp("export") / "model"
    vocabularies = {"item": aif.Vocabulary(np.arange(100, 149) * 10**9), "category": aif.Vocabulary(["é", "b", "longer"])}
    digest = export.save(folder, model, params, vocabularies=vocabularies, buckets={"c": [64, 128]})
    return folder, digest, model, params


@pytest.fixture(scope="module")
def loaded(made):
    return export.load(made[0])


@pytest.fixture
def copy(made, tmp_path):
    """`copy()` is a copy to tamper with; `copy(edit)` also rewrites its manifest after `edit(manifest)`."""

    def make(edit=None, rehash=()):
        folder = tmp_path / "copy"
        if not folder.exists():
            shutil.copytree(made[0], folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        if edit:
            edit(manifest)
        for name in rehash:
            raw = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


@pytest.fixture(scope="module")
def scored(made):
    """One user's features, C items, and the logits of the model in Python."""
    _, _, model, params = made
    features, items = demo.user(model.config), demo.items(model.config, C)
    return features, items, np.asarray(jax.jit(model.joint)(params, features, items))


# What it gives


def test_scores_equal_the_models(loaded, scored):
    features, items, logits = scored
    state, rows = loaded.user(features), loaded.item(items)
    np.testing.assert_allclose(loaded.interaction(state, rows), logits, rtol=0, atol=1e-6)
    order = np.random.default_rng(0).integers(0, C, 250)  # more than the largest bucket
    np.testing.assert_allclose(loaded.score(state, jax.device_put(rows), order), logits[order], rtol=0, atol=1e-6)


def test_a_flat_dict_is_taken_like_the_dataclass_and_unread_inputs_may_be_left_out(loaded, scored):
    features, _, _ = scored
    flat = export.flatten(features)
    entries = loaded.manifest["functions"]["user"]
    assert "short.signature" in entries["ignored"]
    read = {entry["name"]: flat[entry["name"]] for entry in entries["inputs"]}
    whole, part = loaded.user(features), loaded.user(read)
    assert whole.keys() == {entry["name"] for entry in entries["outputs"]}
    for name, value in whole.items():
        np.testing.assert_array_equal(value, part[name], err_msg=name)


def test_many_users_are_the_users_one_by_one(loaded, made):
    users = [demo.user(made[2].config, seed=seed, events=events) for seed, events in ((0, 20), (1, 0), (2, 24))]
    states = loaded.users(jax.tree.map(lambda *leaves: np.stack(leaves), *users))
    for at, user in enumerate(users):
        for name, value in loaded.user(user).items():
            np.testing.assert_allclose(states[name][at], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_history_may_be_shorter_or_longer_than_its_bucket(loaded, made, scored):
    _, _, model, params = made
    features, items, logits = scored
    rows = loaded.item(items)
    short = dataclasses.replace(features, long=jax.tree.map(lambda x: x[:20], features.long))  # 20 events, 24 places
    np.testing.assert_allclose(loaded.interaction(loaded.user(short), rows), logits, rtol=0, atol=1e-6)
    longer = demo.behaviours(np.random.default_rng(3), model.config, 40, 37)
    features = dataclasses.replace(features, long=longer)
    expected = model.joint(params, features, items)
    np.testing.assert_allclose(loaded.interaction(loaded.user(features), rows), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 129])
def test_any_count_of_candidates(loaded, scored, count):
    features, items, logits = scored
    at = np.arange(count) % C
    rows = {name: value[at] for name, value in loaded.item(items).items()}
    got = loaded.interaction(loaded.user(features), rows)
    assert got.shape == (count,) and got.dtype == np.float32
    np.testing.assert_allclose(got, logits[at], rtol=0, atol=1e-6)


def test_no_items_give_no_rows(loaded, made):
    rows = loaded.item(demo.items(made[2].config, 0))
    assert rows["vector"].shape == (0, 8) and rows["signature"].dtype == np.uint32


def test_warm_counts_neither_trace_nor_transfer_unasked(made, scored):
    features, items, _ = scored
    model = export.load(made[0])
    rows = model.item(items)
    table = jax.device_put(rows)
    model.warm_up(table=table)
    with jax.no_tracing(), jax.transfer_guard("disallow"):
        state = model.user(features)
        for count in (1, 63, 77, 99):
            model.interaction(state, {name: value[:count] for name, value in rows.items()})
            model.score(state, table, np.arange(count))
    cold = export.load(made[0])  # a model that was not warmed up must fail here, or the check above checks nothing
    with jax.no_tracing(), pytest.raises(RuntimeError):
        cold.user(features)


def test_vocabularies_encode(loaded):
    assert loaded.encode("item", [100 * 10**9, 7, 148 * 10**9]).tolist() == [1, 0, 49]
    assert loaded.encode("category", ["é", "longer", "x", "b"]).tolist() == [3, 2, 0, 1]
    with pytest.raises(export.ExportError, match="vocabulary: expected one of.*category.*got 'brand'"):
        loaded.encode("brand", [1])


def test_manifest_says_what_is_inside(made, loaded):
    folder, _, model, params = made
    manifest = loaded.manifest
    assert aif.Config.from_json(manifest["config"]) == model.config
    assert manifest["made_with"]["jax"] == jax.__version__ and manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    shapes = {entry["name"]: (entry["shape"], entry["dtype"]) for entry in manifest["functions"]["interaction"]["inputs"]}
    assert shapes["rows.vector"] == (["c", 8], "float32") and shapes["state.tiers.signature"] == (["l", 1], "uint32")
    stored = consume.read_arrays((folder / "params.safetensors").read_bytes())
    for path, leaf in writer.leaves_by_path(params).items():
        np.testing.assert_array_equal(stored[path], leaf, err_msg=path)


def test_runs_where_flax_optax_orbax_and_the_package_cannot_be_imported(made, scored, python, tmp_path):
    features, items, logits = scored
    given = {f"user/{k}": v for k, v in export.flatten(features).items()}
    np.savez(tmp_path / "in.npz", **given, **{f"item/{k}": v for k, v in export.flatten(items).items()})
    out = python(
        f"""
import sys
import types
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "optax", "orbax", "aif_jax"):
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
for name in ("flax", "optax", "orbax.checkpoint", "aif_jax", "aif_jax.model"):
    try:
        __import__(name)
        sys.exit(name + " could be imported")
    except ImportError:
        pass
sys.path.insert(0, {str(made[0])!r})
import numpy as np
import consume
given = np.load({str(tmp_path / "in.npz")!r}, allow_pickle=False)
part = lambda name: {{k.split("/")[1]: given[k] for k in given.files if k.startswith(name)}}
model = consume.load({str(made[0])!r})
logits = model.interaction(model.user(part("user")), model.item(part("item")))
print(json.dumps(logits.tolist()) if (json := __import__("json")) else "")
"""
    )
    np.testing.assert_allclose(json.loads(out), logits, rtol=0, atol=1e-6)


def test_the_loader_imports_only_jax_numpy_and_the_standard_library():
    tree = ast.parse(Path(consume.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) == {"jax", "numpy"}
    assert "pickle" not in roots


# What it refuses


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("long.mask"), r"user inputs: .*missing \['long.mask'\]"),
        (lambda x: x.update(brand=np.int32(1)), r"unknown \['brand'\]"),
        (lambda x: x.update(floats=np.zeros(2)), "user input floats: expected dtype float32, got float64"),
        (lambda x: x.update(floats=np.zeros(3, np.float32)), r"floats: expected shape \[2\], got \[3\]"),
        (lambda x: x.update({"long.mask": np.zeros(23, bool)}), r"input long.*expected shape \[2[34](, 1)?\], got \[2[34]"),
        (lambda x: x.update({"short.mask": np.zeros(5, bool)}), r"short.mask: expected shape \[6\], got \[5\]"),
    ],
)
def test_wrong_inputs_are_refused_in_words(loaded, scored, change, message):
    flat = export.flatten(scored[0])
    change(flat)
    with pytest.raises(export.ExportError, match=message):
        loaded.user(flat)


def test_rows_outside_the_table_are_refused(loaded, scored):
    state, rows = loaded.user(scored[0]), loaded.item(scored[1])
    with pytest.raises(export.ExportError, match=r"expected values in \[0, 100\), got 0 to 100"):
        loaded.score(state, rows, np.array([0, 100]))
    with pytest.raises(export.ExportError, match=r"expected integers \[C\], got float64"):
        loaded.score(state, rows, np.array([0.0]))


def test_buckets_are_checked(made):
    with pytest.raises(export.ExportError, match="expected sizes of at least 64, got"):
        export.load(made[0], buckets={"c": [32, 64]})
    with pytest.raises(export.ExportError, match="expected axes among"):
        export.load(made[0], buckets={"x": [1]})


def test_an_altered_file_is_refused(copy):
    folder = copy()
    path = folder / "user.jax_export"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(export.ExportError, match="user.jax_export was altered"):
        export.load(folder)
    path.write_bytes(raw[:-1])
    with pytest.raises(export.ExportError, match="user.jax_export: expected .* bytes"):
        export.load(folder)
    path.unlink()
    with pytest.raises(export.ExportError, match="user.jax_export: expected a file"):
        export.load(folder)


def test_a_manifest_other_than_the_pinned_one_is_refused(made, copy):
    folder = copy(lambda manifest: manifest.update(version="0" * 64))
    assert export.load(made[0], sha256=made[1]).version != "0" * 64
    with pytest.raises(export.ExportError, match="manifest.json: expected sha256"):
        export.load(folder, sha256=made[1])


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "a/../../b.bin", "..", "a\\b.bin", "C:x.bin", "x.bin\n"])
def test_names_that_leave_the_folder_are_refused(copy, name):
    def edit(manifest):
        manifest["params"] = name
        manifest["files"][name] = {"bytes": 1, "sha256": "0"}

    with pytest.raises(export.ExportError, match="expected plain file names inside the folder"):
        export.load(copy(edit))


def test_links_are_refused(copy):
    folder = copy()
    shutil.move(folder / "params.safetensors", folder.parent / "outside")
    (folder / "params.safetensors").symlink_to(folder.parent / "outside")
    with pytest.raises(export.ExportError, match="params.safetensors: expected a regular file"):
        export.load(folder)


def test_sizes_are_bounded(made, copy):
    with pytest.raises(export.ExportError, match="expected at most 1000 bytes in all"):
        export.load(made[0], max_bytes=1000)
    folder = copy()
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(consume.MANIFEST_BYTES + 1)
    with pytest.raises(export.ExportError, match="manifest.json: expected at most"):
        export.load(folder)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m.update(format="other"), "expected format"),
        (lambda m: m.update(format_version=2), "expected format_version 1, got 2"),
        (lambda m: m.pop("functions"), "functions: expected dict"),
        (lambda m: m["functions"].pop("item"), "expected 'item'"),
        (lambda m: m["functions"]["user"]["inputs"][0].update(shape=["z"]), "expected name, shape and dtype"),
        (lambda m: m["functions"]["user"]["inputs"].pop(), "user: expected arguments"),
        (lambda m: m["functions"]["user"]["inputs"][0].update(shape=[7, 7]), "the module takes"),
        (lambda m: m["functions"]["user"]["params"].append("nothing"), "expected parameters"),
        (lambda m: m.update(axes={}), "expected name, shape and dtype"),
        (lambda m: m["files"]["consume.py"].update(bytes=-1), "expected bytes and sha256"),
        (lambda m: m.update(params="golden.npz"), "expected 'golden.npz' among its files"),
    ],
)
def test_a_manifest_of_another_form_is_refused(copy, edit, message):
    with pytest.raises(export.ExportError, match=message):
        export.load(copy(edit))


@pytest.mark.parametrize("text", ["", "{", "[" * 100000, "[]", "\xff"])
def test_a_manifest_that_is_not_json_is_refused(copy, text):
    folder = copy()
    (folder / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(export.ExportError, match="manifest.json"):
        export.load(folder)


def _file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little"),
        _file(b"not json"),
        _file([]),
        _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        _file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        _file({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"),
        _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
        _file({k: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for k in "ab"}, b"1234"),
        _file({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}),
        _file({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"),
    ],
)
def test_array_files_that_lie_are_refused(raw):
    with pytest.raises(export.ExportError, match="arrays"):
        consume.read_arrays(raw)


def test_a_module_that_calls_out_is_refused(copy):
    def evil(params, inputs):
        return {"logits": jax.ffi.ffi_call("evil", jax.ShapeDtypeStruct((64,), jnp.float32))(inputs["x"])}

    spec = jax.ShapeDtypeStruct((64,), jnp.float32)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("evil")]
    exported = jax.export.export(jax.jit(evil), disabled_checks=allowed)({}, {"x": spec})
    folder = copy()
    (folder / "interaction.jax_export").write_bytes(exported.serialize())
    copy(rehash=["interaction.jax_export"])
    with pytest.raises(export.ExportError, match="interaction: expected no calls out of the module, got one: .*evil"):
        export.load(folder)


def test_a_blob_that_is_no_export_is_refused(copy):
    folder = copy()
    (folder / "user.jax_export").write_bytes(b"nonsense" * 10)
    copy(rehash=["user.jax_export"])
    with pytest.raises(export.ExportError, match="user: expected a function serialised by jax.export"):
        export.load(folder)


# verify, versions, rebuild


def test_verify_replays_and_notices_other_parameters(made, copy, capsys):
    assert command.main(["verify", str(made[0]), "--sha256", made[1]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == export.load(made[0]).version and report["functions"].keys() >= {"user", "item", "interaction"}
    assert 0 <= report["max_abs_diff"] < 1e-5
    folder = copy()
    params = {k: v.copy() for k, v in consume.read_arrays((folder / "params.safetensors").read_bytes()).items()}
    params["interaction/first/bias"][0] += 0.5
    writer.write_arrays(folder / "params.safetensors", params)
    copy(rehash=["params.safetensors"])
    assert command.main(["verify", str(folder)]) == 1
    assert "interaction logits: expected the golden output within" in capsys.readouterr().err


def test_a_newer_artefact_names_both_versions(copy):
    folder = copy(lambda m: m["made_with"].update(jax="99.1.0"))
    with pytest.raises(export.ExportError, match=rf"written under jax 99.1.0, newer than jax {jax.__version__} here.*rebuild"):
        export.load(folder)


def test_expired_functions_are_rebuilt_from_params_and_config(tmp_path, capsys):
    model, params = demo.build(**demo.VARIANTS["base"])
    folder, new = tmp_path / "old", tmp_path / "new"
    vocabularies = {"item": aif.Vocabulary([7, 9])}
    export.save(folder, model, params, vocabularies=vocabularies, platforms=("cpu",), stablehlo=False, buckets={"c": [64]})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["functions"]["user"]["calling_convention_version"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(export.ExportError, match=r"user: written under jax .* with calling convention 1, .* reads \d+ to"):
        export.load(folder)
    assert command.main(["rebuild", str(folder), str(new)]) == 0
    rebuilt = export.load(new, sha256=json.loads(capsys.readouterr().out)["sha256"])
    assert rebuilt.version == manifest["version"] and rebuilt.encode("item", [9, 8]).tolist() == [2, 0]
    user, items = demo.user(model.config), demo.items(model.config, 30)
    got = rebuilt.interaction(rebuilt.user(user), rebuilt.item(items))
    np.testing.assert_allclose(got, model.joint(params, user, items), rtol=0, atol=1e-6)


# Parameter coverage, atomic writing


def test_every_leaf_is_read_or_named_as_training_only(tmp_path):
    model, params = demo.build(**demo.VARIANTS["base"])
    options = dict(platforms=("cpu",), stablehlo=False, buckets={"c": [64]})
    extended = params | {"user": params["user"] | {"auxiliary": {"kernel": np.zeros((2, 3), np.float32)}}}
    with pytest.raises(export.CoverageError, match="user/auxiliary/kernel: only in the params"):
        export.save(tmp_path / "a", model, extended, **options)
    export.save(tmp_path / "b", model, extended, training_only=["user/auxiliary"], **options)
    loaded = export.load(tmp_path / "b")
    assert loaded.manifest["training_only"] == ["user/auxiliary/kernel"]
    rest = {k: v for k, v in params["item"].items() if k != "tower"}
    with pytest.raises(export.CoverageError, match="item/tower/layer_0/bias: not in the params"):
        export.save(tmp_path / "c", model, params | {"item": rest}, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def test_coverage_names_what_no_function_reads_and_what_it_reads_after_all():
    leaf = np.zeros(2, np.float32)
    spec = jax.ShapeDtypeStruct((2,), jnp.float32)
    given = {"x": spec}, {"a": spec, "b": spec}, ["cpu"]
    built = writer.functions.export_function(lambda p, x: p["a"] + x["x"], *given, least={})
    assert built.params == ("a",)
    leaves = {"a": leaf, "b": leaf}
    assert writer.coverage({"f": built}, leaves, ["b"]) == ("b",)
    with pytest.raises(export.CoverageError, match=r"b: float32\[2\] is read by no exported function"):
        writer.coverage({"f": built}, leaves, [])
    with pytest.raises(export.CoverageError, match="a: named as training-only, but an exported function reads it"):
        writer.coverage({"f": built}, leaves, ["a", "b"])
    with pytest.raises(export.CoverageError, match="c: named as training-only, but no leaf is there"):
        writer.coverage({"f": built}, leaves, ["b", "c"])


def test_an_existing_folder_is_left_alone_and_a_failure_leaves_nothing(made, tmp_path, monkeypatch):
    _, _, model, params = made
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(writer.functions, "export_all", lambda *a, **k: {})
    monkeypatch.setattr(writer, "coverage", lambda *a: ())
    monkeypatch.setattr(writer, "golden_case", lambda *a: {})
    with pytest.raises(FileExistsError, match="expected a folder that does not exist yet"):
        export.save(tmp_path / "here", model, params)
    with pytest.raises(export.ExportError):  # no functions: the folder does not verify
        export.save(tmp_path / "new", model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


# StableHLO


def test_stablehlo_text_with_its_argument_list_gives_the_same_logits(made, loaded, scored):
    from jax._src.lib import xla_client  # the text is for runtimes outside JAX; the nearest one at hand is its own compiler
    from jax.extend import backend
    from jaxlib import _jax

    features, items, logits = scored
    folder, spec = made[0], loaded.manifest["functions"]["interaction"]["stablehlo"]
    count = spec["sizes"]["c"]
    rows = {f"rows.{k}": v[np.arange(count) % C] for k, v in loaded.item(items).items()}
    given = rows | {f"state.{k}": np.asarray(v) for k, v in loaded.user(features).items()}
    params = consume.read_arrays((folder / "params.safetensors").read_bytes())
    flat = [params[a["name"]] if a["kind"] == "params" else given[a["name"]] for a in spec["arguments"]]
    client = backend.get_backend("cpu")
    devices = _jax.DeviceList(tuple(jax.devices("cpu")[:1]))
    executable = client.compile_and_load((folder / spec["file"]).read_text(), devices, xla_client.CompileOptions())
    (got,) = executable.execute([jax.device_put(x, jax.devices("cpu")[0]) for x in flat])
    assert spec["results"] == ["logits"]
    np.testing.assert_allclose(np.asarray(got), logits[np.arange(count) % C], rtol=0, atol=1e-6)


# ONNX: the rules, with a converter that stands in; the real one is run by experiments/export_checkpoint.py where it is there


@pytest.mark.parametrize("off, refused", [(0.0, None), (1.0, "y: differs from the golden output"), (None, "no such operator")])
def test_onnx_is_written_only_where_the_golden_case_passes(tmp_path, monkeypatch, off, refused):
    spec = jax.ShapeDtypeStruct((3,), jnp.float32)
    built = writer.functions.export_function(lambda p, x: {"y": x["x"] + p["a"]}, {"x": spec}, {"a": spec}, ["cpu"], least={})
    a, x = np.ones(3, np.float32), np.arange(3, dtype=np.float32)

    class Model:
        def SerializeToString(self):  # noqa: N802 (onnx's name)
            return b"model"

    class Session:
        def __init__(self, raw, providers):
            assert raw == b"model"

        def get_inputs(self):
            return [types.SimpleNamespace(name="in_0")]

        def run(self, outputs, given):
            return [given["in_0"] + a + off]

    def convert(function, specs):
        if off is None:
            raise RuntimeError("no such operator")
        np.testing.assert_array_equal(function(x)[0], x + a)
        return Model()

    monkeypatch.setattr(onnx, "_tools", lambda: (convert, types.SimpleNamespace(InferenceSession=Session)))
    made = onnx.write(tmp_path, "f", built, {"a": a}, {"f.inputs/x": x, "f.outputs/y": x + a}, candidates=64)
    assert (tmp_path / "f.onnx").exists() == (refused is None)
    if refused:
        assert refused in made["refused"]
    else:
        assert made["inputs"] == {"in_0": "x"} and made["max_abs_diff"] == 0.0


def test_onnx_without_its_converter_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(ModuleNotFoundError, match="pip install .*jax2onnx"):
        onnx._tools()
