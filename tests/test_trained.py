"""The version of a model; `Trained` and `aif.open`: one value, from any folder that has one; edits after training compose."""

import dataclasses
import json
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import checkpoint, export
from aif_jax.blocks import Bea, ItemOffset, with_table
from aif_jax.data.negatives import counts_before
from aif_jax.data.split import split_by_time
from aif_jax.export import ExportError
from aif_jax.store import trained as room
from aif_jax.train import edits
from aif_jax.train.evaluate import sampled_before
from experiments.datasets.synthetic import synthetic_world
from tests import demo
from tests.refusals import refused
from tests.test_package import functions_of, gaps

QUIET = dict(batch_size=64, progress=False)


@pytest.fixture(scope="module")
def trained(run) -> aif.Trained:
    return run.trained


def test_the_version_is_computed_once(trained, monkeypatch):
    made = trained.replace()
    usual = aif.fingerprint  # now: an older lazy-loader looks the name up again
    expected, calls = usual(made.params, made.config, made.encoder), []
    monkeypatch.setattr(room, "fingerprint", lambda *leaves: calls.append(leaves) or usual(*leaves))
    index = aif.ItemIndex.build(made, {"item": [1, 2], "category": [1, 2]} if made.encoder is None else [], **QUIET)
    assert index.version == made.version == made.on_device().version == expected and len(calls) == 1
    assert made.replace(encoder=None).version != expected and len(calls) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.params = {}


def test_a_version_that_is_given_is_not_computed_and_goes_with_no_other_fields(trained, monkeypatch):
    monkeypatch.setattr(room, "fingerprint", lambda *leaves: pytest.fail("computed"))
    made = trained.replace().with_version("a" * 64)
    assert made.version == made.on_device().version == "a" * 64
    monkeypatch.undo()
    assert made.replace(params=trained.params).version == trained.version != "a" * 64


def test_parameters_of_another_size_are_refused_wherever_a_model_goes(trained, data):
    """Ids beyond a smaller table would read row 0: nothing would fail, and nothing be right."""
    params, model = trained.params, trained.model
    rows, width = params["embedding"]["item"].shape
    smaller = params | {"embedding": {name: table[:-3] for name, table in params["embedding"].items()}}
    fewer = params["fitted"] | {"fields": {name: table[:-3] for name, table in params["fitted"]["fields"].items()}}
    of_item = rf"embedding/item: expected '\[{rows}, {width}\]', the params has '\[{rows - 3}, "
    for wrong, message in (
        (smaller, rf"(?s)parameters of this model.*{of_item}"),
        (params | {"item": {}}, "item/.*: not in the params, expected"),
        (params | {"other": {"kernel": np.zeros(2)}}, r"other/kernel: only in the params, '\[2\]'"),
        (params | {"fitted": fewer}, f"expected {rows} rows in"),
        ({name: group for name, group in params.items() if name != "fitted"}, "'fitted' among them"),
        (trained, "expected the groups that `model.init` returns, .* such as run.params, got Trained"),
    ):
        refused(ValueError, message, aif.Trained, model, wrong)
        refused(ValueError, message, trained.replace, params=wrong)
        with pytest.raises(ValueError, match=message.replace("the params", "the start")):
            aif.fit(model, data, start=wrong, task=aif.train.NextItem(), progress=False)


def test_what_needs_an_encoder_says_how_to_give_one(trained):
    with pytest.raises(ValueError, match=r"run: expected a model with an encoder.*; give Trained\(model, params, encoder\)"):
        trained.replace(encoder=None).need_encoder("run")


def folders(trained, at):
    """The model in every kind of folder that holds one, but for a run."""
    checkpoint.save(at / "checkpoint", trained)
    export.save(at / "export", trained, platforms=("cpu",))
    return at / "checkpoint", at / "export"


def same(a: aif.Trained, b: aif.Trained) -> bool:
    return demo.same(a.params, b.params) and a.config == b.config and a.version == b.version


def test_open_reads_checkpoints_exports_and_runs(trained, data, run, tmp_path):
    for folder in folders(trained, tmp_path):
        opened = aif.open(folder)
        assert same(opened, trained) and (opened.encoder is None) == (trained.encoder is None)
        assert opened.version == aif.fingerprint(opened.params, opened.config, opened.encoder)
    assert same(aif.open(run.folder), trained)
    aif.Run.load(run.folder).calibrate(data, progress=False).save(tmp_path / "calibrated")
    assert aif.open(tmp_path / "calibrated").version == aif.Run.load(tmp_path / "calibrated").version != run.version


def test_open_takes_the_functions_of_an_assembled_model(trained, tmp_path):
    assembled = aif.assemble(trained.config)._replace(item=lambda params, features: trained.model.item(params, features))
    for folder in folders(trained, tmp_path):
        assert aif.open(folder, model=assembled).model.item is assembled.item
        refused(ValueError, "one of the saved config", aif.open, folder, model=aif.build(trained.config.replace(width=24)))


calls = lambda params, features, *, config: aif.model.ITEM.apply(params, features, config=config)  # noqa: E731


@pytest.fixture
def own(trained) -> aif.Trained:
    """The same parameters under other functions."""
    return trained.replace(model=aif.assemble(trained.config, item=aif.Component(aif.model.ITEM.init, calls)))


def test_a_model_of_assemble_is_not_opened_as_another(trained, own, tmp_path):
    """It is another version, which no folder opens by itself."""
    assert own.version != trained.version and own.config.assembled == ("item=<lambda>",)
    value = type("Calls", (), {"__call__": lambda self, *features, config: calls(*features, config=config)})()
    assert aif.assemble(trained.config, item=aif.Component(aif.model.ITEM.init, value)).config.assembled == ("item=Calls",)
    for folder in folders(own, tmp_path):
        assert aif.open(folder, model=own.model).version == own.version
        refused(ValueError, r"build: expected a config of `build`; give the model .* with item=<lambda>", aif.open, folder)


def test_open_names_what_it_found_in_another_folder(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "current").write_text("monday\n")
    with aif.Checkpoints(tmp_path / "steps") as steps:
        steps.save_async(3, trained.params, trained.config)
    aif.ItemIndex.build(trained, [], **QUIET).save(tmp_path / "index")
    export.save(tmp_path / "export", trained, platforms=("cpu",))
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    (tmp_path / "export" / "manifest.json").write_text(json.dumps(manifest | {"version": "0" * 64}))
    expected = r"expected the folder of a run \(--out of train\), a checkpoint or an export, found "
    for name, error, message in (
        ("none", FileNotFoundError, expected + "nothing"),
        ("empty", checkpoint.CheckpointError, expected + "an empty folder"),
        ("exports", checkpoint.CheckpointError, expected + "the exports of a service: open the folder that `current`"),
        ("steps", checkpoint.CheckpointError, expected + r"checkpoints of steps \[3\]; take one, such as"),
        ("index", checkpoint.CheckpointError, "found a snapshot of an index: give its `load`"),
        ("export", ExportError, None),
    ):
        refused(error, message, aif.open, tmp_path / name)


def test_edits_compose_and_a_calibration_is_of_the_scores_before(trained, run, data):
    before = run.settings.first_validation
    svd, correction, unseen = (
        partial(change, before=before) for change in (edits.svd_term, edits.popularity_correction, edits.unseen_items)
    )
    corrected = correction(svd(trained, data), data)
    made = unseen(corrected, data)
    assert made.version != corrected.version and made.encoder is trained.encoder
    assert [type(block).__name__ for block in made.config.blocks[-2:]] == ["PureSvd", "ItemOffset"]
    table, counts = (np.asarray(each.params["embedding"]["item"]) for each in (made, trained)), counts_before(data, before)
    after, then = table
    np.testing.assert_array_equal(after, np.where((counts > 0)[:, None], then, then[:1]))
    assert 0 < (counts[1:] == 0).sum() < len(counts) - 1
    known = np.asarray(unseen(trained, data, known=np.ones(len(counts), bool)).params["embedding"]["item"])
    np.testing.assert_array_equal(known, then)
    positions = split_by_time(data.log).validation
    calibration = partial(edits.calibration, positions=positions)
    calibrated = calibration(trained, data, candidates=sampled_before(data, positions))
    assert same(calibration(trained, data), calibrated)
    assert same(correction(calibrated, data), correction(trained, data))
    assert same(run.edit(data, svd).edit(data, correction).trained, run.with_svd(data).with_popularity_correction(data).trained)
    with pytest.raises(aif.EncodingMismatch):
        encoded = aif.Trained(trained.model, trained.params, data.encoder)
        svd(encoded, synthetic_world(1, users=5, items=20, topics=4, categories=4, interests=2, favourites=2).dataset)


def test_edits_refuse_a_model_whose_functions_they_would_replace(trained, own, data):
    """A model of `assemble`: built from its config it would be another one."""
    for name in ("svd_term", "popularity_correction"):
        text = rf"{name}: expected a model of `build`, got .* with item=<lambda>.*assemble\("
        refused(ValueError, text, getattr(edits, name), own, data, before=int(data.log.time.max()))
    before, size = int(data.log.time.max()), len(data.catalogue)
    assert edits.unseen_items(own, data, before=before).model is own.model  # an edit of parameters keeps the functions
    params, config = with_table(own.params, np.zeros(size, np.float32), ItemOffset(), config=trained.config)
    there = own.replace(model=aif.assemble(config, item=aif.Component(aif.model.ITEM.init, calls)), params=params)
    assert edits.popularity_correction(there, data, before=before).model is there.model  # has the block


def test_no_function_takes_a_model_in_parts():
    parts = [{"model", "params", "encoder"}, {"params", "encoder", "version"}, {"model", "version"}]

    def found(source: str) -> list[str]:
        named = [(each.name, each.args) for each in functions_of(source)]
        taken = [(name, {a.arg for a in (*of.posonlyargs, *of.args, *of.kwonlyargs)}) for name, of in named]
        return [name for name, arguments in taken if any(group <= arguments for group in parts)]

    assert gaps(found) == {}
    assert found("def f(model, *, params, encoder=None): pass") == ["f"]


SCHEMA = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
CONFIG = aif.Config(schema=SCHEMA, blocks=(Bea(bridges=4),))
PARAMS = {"item": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "fitted": {"lsh": np.ones((2, 2), np.float32)}}


def changed(**groups):
    return {**PARAMS, **groups}


def test_it_is_a_hash_of_contents():
    version = aif.fingerprint(PARAMS, CONFIG)
    assert len(version) == 64 and set(version) <= set("0123456789abcdef")
    again = {"fitted": {"lsh": jnp.ones((2, 2))}, "item": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    assert aif.fingerprint(again, aif.Config.from_json(CONFIG.to_json())) == version
    assert aif.fingerprint(changed(item={"kernel": np.asfortranarray(PARAMS["item"]["kernel"])}), CONFIG) == version


@pytest.mark.parametrize(
    "other",
    [
        changed(item={"kernel": np.arange(6, dtype=np.float32).reshape(3, 2)}),
        changed(item={"kernel": np.arange(6, dtype=np.int32).reshape(2, 3)}),
        changed(item={"weight": PARAMS["item"]["kernel"]}),
        changed(item={"kernel": np.nextafter(PARAMS["item"]["kernel"], 9).astype(np.float32)}),
        changed(fitted={"lsh": np.zeros((2, 2), np.float32)}),
        changed(user={"bias": np.zeros(0, np.float32)}),
    ],
    ids=["shape", "dtype", "path", "one bit of each", "signature matrix", "an empty leaf more"],
)
def test_every_part_of_the_parameters_counts(other):
    assert aif.fingerprint(other, CONFIG) != aif.fingerprint(PARAMS, CONFIG)


def test_config_schema_encoder_and_the_data_of_random_keys_count():
    more = CONFIG.replace(schema=dataclasses.replace(SCHEMA, actions=5))
    assert len({aif.fingerprint(PARAMS, config) for config in (CONFIG, CONFIG.replace(blocks=(Bea(bridges=5),)), more)}) == 3
    encoders = [None, *(types.SimpleNamespace(version=version) for version in ("ab", "cd", "ab"))]
    versions = [aif.fingerprint(PARAMS, CONFIG, encoder) for encoder in encoders]
    assert len(set(versions)) == 3 and versions[1] == versions[3]
    versions = {aif.fingerprint({"key": jax.random.key(seed)}, CONFIG) for seed in (1, 2)}
    assert len(versions | {aif.fingerprint({"key": jax.random.key_data(jax.random.key(1))}, CONFIG)}) == 3


def test_a_mismatch_names_both_versions():
    error = aif.VersionMismatch("index", expected="aaa", got="bbb")
    assert isinstance(error, ValueError) and issubclass(aif.EncodingMismatch, aif.VersionMismatch)
    assert (error.expected, error.got) == ("aaa", "bbb")
    assert str(error).startswith("index: expected version aaa, got bbb")
