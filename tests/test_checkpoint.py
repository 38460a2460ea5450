"""Checkpoints on real files: round trips, damage, crashes, templates, retention."""

import json
import os
import re
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import checkpoint
from aif_jax.blocks import Bea, Block, block
from aif_jax.checkpoint import METADATA_FILE, CheckpointError, Checkpoints, storage
from tests import demo
from tests.refusals import refused
from tests.reliability import damaged

SCHEMA = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)))
CONFIG = aif.Config(schema=SCHEMA, width=8, blocks=(Bea(bridges=4),))


def small(scale=1.0):
    """Parameters in the shape of a model's, without the cost of one."""
    return {
        "embedding": {"item": scale * jnp.arange(12.0).reshape(4, 3), "category": scale * jnp.ones((2, 3))},
        "item": {"mlp": {"kernel": scale * jnp.ones((3, 2)), "bias": jnp.zeros(2)}},
        "fitted": {"lsh": np.arange(6, dtype=np.float32).reshape(2, 3)},
    }


def trained(params):
    """A model whose parameters are these, whatever their shapes."""
    return aif.Trained(aif.build(CONFIG)._replace(init=lambda *given, **options: params), params)


def save(folder, params, config=CONFIG, **given):
    with Checkpoints(folder) as run:
        run.save_async(7, params, config, **given)
    return folder / "7"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One good checkpoint; tests that damage it work on a copy."""
    return save(tmp_path_factory.mktemp("checkpoint"), small(), opt_state=optax.adam(1e-3).init(small()))


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == e.dtype
        g, e = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (g, e))
        np.testing.assert_array_equal(g, e)


def test_round_trip_of_a_model(tmp_path):
    model, model_params = demo.build()
    position = {"epoch": 2, "batch": 17, "seeds": [1, 2]}
    folder = save(tmp_path, model_params, model.config, position=position, metrics={"gauc": 0.61})
    loaded = checkpoint.load(folder, config=model.config)
    assert_same(loaded.params, model_params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params)) and loaded.config == model.config
    assert (loaded.step, loaded.position, loaded.metrics) == (7, position, {"gauc": 0.61})
    assert loaded.opt_state is None and loaded.encoder is None
    assert loaded.version == aif.fingerprint(model_params, model.config)


def test_the_encoder_comes_back(tmp_path):
    encoder = damaged.encoder()
    with Checkpoints(tmp_path) as run:
        run.save_async(1, small(), CONFIG, encoder=encoder)
    loaded = checkpoint.load(tmp_path / "1")
    assert loaded.encoder is not None and loaded.encoder.version == encoder.version
    assert loaded.version == aif.fingerprint(small(), CONFIG, encoder) != aif.fingerprint(small(), CONFIG)
    assert "array" not in repr(loaded).lower()
    user = {"user": "zoë", "city": "Oslo", "age": 0.7}
    events = {"item": [10**12, 9, 7], "time": [1_600_000_000, 1_600_000_010, 1_600_000_020], "event": ["buy", "view", "view"]}
    got, expected = (e.user(user, events, 1_600_000_100) for e in (loaded.encoder, encoder))
    assert_same(got, expected)
    assert got.ids["user"] == 3 and got.history.item.tolist() == [1, 0, 3, 0]


def test_optimizer_state_comes_back_as_it_was(tmp_path):
    """A chain with empty states, a schedule's counter, a mask, and noise with a typed key."""
    mask = {"embedding": True, "item": False, "fitted": False}
    masked = optax.masked(optax.adam(optax.cosine_decay_schedule(1e-3, 100)), mask)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), masked, optax.add_noise(0.1, 0.1, jax.random.key(3)))
    update = jax.numpy_dtype_promotion("standard")(jax.jit(optimizer.update))  # Optax's noise mixes dtypes
    _, state = update(small(0.5), optimizer.init(small()), small())
    folder = save(tmp_path, small(), opt_state=state)
    loaded = checkpoint.load(folder, like={"opt_state": jax.eval_shape(lambda: state)}).opt_state
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert_same(update(small(0.1), loaded, small()), update(small(0.1), state, small()))


def test_every_kind_of_leaf_comes_back(tmp_path):
    trees = {
        "rows": {
            "bfloat16": jnp.arange(3, dtype=jnp.bfloat16),
            "uint32": jnp.array([2**32 - 1], jnp.uint32),
            "bool": np.array([True, False]),
            "scalar": np.int32(4),
            "empty": np.zeros((0, 3), np.float32),
            "big": np.array([2**60 + 1]),
            "transposed": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
            "nan": np.array([np.nan, -np.inf, -0.0], np.float32),
            "key": jax.random.key(5),
            "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2),
        },
        "nothing": {},
    }
    storage.write(tmp_path / "a", storage.pack(trees, {"count": 3}))
    leaves, record = storage.inspect(tmp_path / "a")
    assert_same(storage.read(tmp_path / "a", leaves, dict.fromkeys(trees)), trees)
    assert record["count"] == 3
    arrays = storage.read(tmp_path / "a", leaves, {"rows": np.ndarray})["rows"]
    assert [name for name, leaf in arrays.items() if isinstance(leaf, jax.Array)] == ["key", "keys"]


def test_other_config_is_refused_by_field(saved, tmp_path):
    schema = json.loads(json.dumps(CONFIG.schema.to_json()))
    schema["item_attributes"][1]["size"] = 99
    other = CONFIG.replace(width=16, schema=aif.Schema.from_json(schema), blocks=(Bea(bridges=5),))
    with pytest.raises(ValueError) as error:
        checkpoint.load(saved, config=other)
    assert "config.width: expected 16, the checkpoint has 8" in str(error.value)
    assert "config.schema.item_attributes[1].size: expected 99, the checkpoint has 6" in str(error.value)
    assert "config.blocks[0].bridges: expected 5, the checkpoint has 4" in str(error.value)
    folder = save(tmp_path, small(), CONFIG.replace(blocks=(block(type("Grown", (Block,), {}))(),)))
    newer = CONFIG.replace(blocks=(block(type("Grown", (Block,), {"revision": 2}))(),))  # of changed code
    refused(ValueError, "revision: not in the checkpoint, expected 2", checkpoint.load, folder, config=newer)


def test_a_numpy_template_stays_in_numpy_and_renamed_and_resized_leaves_are_named(saved):
    plain, template = jax.tree.map(np.asarray, small()), small()
    loaded = checkpoint.load(saved, like={"params": plain})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded.params))
    assert_same(loaded.params, plain)
    template["item"]["tower"] = template["item"].pop("mlp")
    template["embedding"]["item"] = jnp.zeros((5, 3))
    template["embedding"]["category"] = jnp.zeros((2, 3), jnp.bfloat16)
    with pytest.raises(ValueError, match="expected params like the template") as error:
        checkpoint.load(saved, like={"params": template})
    for line in (
        "embedding/item: expected 'float32[5, 3]', the checkpoint has 'float32[4, 3]'",
        "embedding/category: expected 'bfloat16[2, 3]', the checkpoint has 'float32[2, 3]'",
        "item/mlp/kernel: only in the checkpoint, 'float32[3, 2]'",
        "item/tower/kernel: not in the checkpoint, expected 'float32[3, 2]'",
    ):
        assert line in str(error.value)


def test_wrong_optimizer_template_is_refused(saved, tmp_path):
    like = {"opt_state": jax.eval_shape(optax.sgd(1.0, momentum=0.9).init, small())}
    refused(ValueError, "expected opt_state like the template", checkpoint.load, saved, like=like)
    checkpoint.save(tmp_path / "bare", trained(small()))
    message = r"expected \['opt_state'\], but it was saved without"
    refused(ValueError, message, checkpoint.load, tmp_path / "bare", like={"opt_state": ()})
    message = r"expected \['optimizer'\], but it was saved without"
    refused(ValueError, message, checkpoint.load, saved, like={"optimizer": ()})


def test_missing_and_foreign_folders(saved, tmp_path):
    refused(FileNotFoundError, "nowhere: no checkpoint", checkpoint.load, tmp_path / "nowhere")
    refused(CheckpointError, "not a complete checkpoint", checkpoint.load, tmp_path)
    arrays, record = storage.pack({"rows": np.ones(2)}, {})
    storage.write(tmp_path / "other", (arrays, record | {"format": "test/1"}))
    refused(CheckpointError, "expected the format 'aif_jax.checkpoint/2', got 'test/1'", checkpoint.load, tmp_path / "other")
    with Checkpoints(tmp_path / "run") as run:
        run.save_async(3, small(), CONFIG)
    refused(CheckpointError, r"it holds the steps \[3\] of a run", checkpoint.load, tmp_path / "run")


def test_nothing_is_overwritten_and_a_folder_that_cannot_be_made_is_an_error_at_once(saved, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused(OSError, "", checkpoint.save, tmp_path / "file" / "a", trained(small()))
    refused(FileExistsError, "expected a new folder", checkpoint.save, saved, trained(small(2.0)))
    assert_same(checkpoint.load(saved).params["item"], small()["item"])


def test_what_cannot_be_saved_is_refused(tmp_path):
    refused(ValueError, "position: expected plain JSON", save, tmp_path / "a", small(), position={"batch": np.int64(3)})
    run = aif.Checkpoints(tmp_path / "a")
    for leaf in (object(), np.array(["a", "bcd"])):
        refused(ValueError, "params/item: expected an array of numbers, got ", run.save_async, 1, {"item": leaf}, CONFIG)
    refused(ValueError, "checkpoint: expected at least one array", run.save_async, 1, {}, CONFIG)
    twice = {"a/b": np.ones(1), "a": {"b": np.ones(1)}}
    refused(ValueError, "expected a different path for every leaf", run.save_async, 1, twice, CONFIG)
    assert run.steps == [] and not list(tmp_path.glob("a/*"))


def test_altered_contents_are_named(copy):
    """A leaf other than the one that was saved, though every file is sound."""
    metadata = json.loads((copy / METADATA_FILE).read_text())
    shutil.rmtree(copy / "params")
    other = small()
    other["item"]["mlp"]["bias"] = jnp.ones(2)
    storage.write(copy.parent / "other", storage.pack({"params": other}, {}))
    shutil.move(copy.parent / "other" / "params", copy / "params")
    refused(CheckpointError, "params/item/mlp/bias was altered", checkpoint.load, copy)
    metadata["custom_metadata"]["config"]["width"] = 9
    (copy / METADATA_FILE).write_text(json.dumps(metadata))
    refused(CheckpointError, "_CHECKPOINT_METADATA was altered: expected sha256", checkpoint.load, copy)


@pytest.mark.parametrize("config, words", [
    ({"hologram": 1}, "the config inside cannot be read.*hologram"),
    ({"blocks": [{"block": "Hologram", "size": 3}]}, "got 'Hologram'; import the module with its `@block`$"),
    ({"blocks": [{"block": "Bea", "hue": 3}]}, "block 'Bea': expected fields among .*hue"),
    ({}, "the encoder inside cannot be read.* expected"),
])  # fmt: skip
def test_a_config_or_encoder_that_this_process_cannot_build_is_refused(tmp_path, config, words):
    encoder = damaged.encoder()
    record = {"config": CONFIG.to_json() | config, "encoder": encoder.to_record(), "step": 0, "position": None, "metrics": None}
    trees = {"params": small(), "encoder": {**encoder.to_arrays(), "item/ids": np.array([7, 9])}}
    storage.write(tmp_path / "a", storage.pack(trees, json.loads(json.dumps(record))))
    refused(CheckpointError, words, checkpoint.load, tmp_path / "a")


def test_the_last_and_the_best_are_kept(tmp_path):
    gauc = {1: 0.60, 2: 0.67, 3: 0.64, 4: 0.65, 5: 0.62}
    with Checkpoints(tmp_path, keep_last=2, keep_best=("gauc", "max")) as run:
        for step, figure in gauc.items():
            run.save_async(step, small(step), CONFIG, metrics={"gauc": figure})
    assert (run.steps, run.latest, run.best) == ([2, 4, 5], 5, 2)
    assert re.search(r"steps=\[2, 4, 5\], latest=5, best=2", repr(run))
    assert_same(run.restore("best").params["item"], small(2)["item"])
    assert run.restore("best").metrics == {"gauc": 0.67}
    assert (run.restore().step, run.restore(4).step) == (5, 4)
    refused(FileNotFoundError, r"expected step 3, found steps \[2, 4, 5\]", run.restore, 3)
    with Checkpoints(tmp_path, keep_last=1, keep_best=("gauc", "max")) as later:
        later.save_async(6, small(6), CONFIG, metrics={"gauc": 0.61})
    assert later.steps == [2, 6], "the best step of the earlier process stays"
    with Checkpoints(tmp_path / "smallest", keep_last=1, keep_best=("log_loss", "min")) as run:
        for step, figure in {1: 0.5, 2: 0.4, 3: 0.6, 10: 0.7}.items():
            run.save_async(step, small(), CONFIG, metrics={"log_loss": figure})
    assert (run.steps, run.best) == ([2, 10], 2)


def test_a_record_that_is_lost_or_of_another_step_is_no_reason_to_answer_with_another(tmp_path):
    """Its figures would decide which step is the best."""
    with Checkpoints(tmp_path, keep_best=("gauc", "max")) as run:
        for step, figure in {1: 0.61, 2: 0.66}.items():
            run.save_async(step, small(1), CONFIG, metrics={"gauc": figure})
    (tmp_path / "2" / METADATA_FILE).unlink()
    for read in (lambda: run.restore("best"), lambda: run.restore(1), lambda: run.latest):
        refused(CheckpointError, f"2: damaged, {METADATA_FILE} is missing; remove the folder", read)
    shutil.copy(tmp_path / "1" / METADATA_FILE, tmp_path / "2" / METADATA_FILE)
    for read in (lambda: run.best, lambda: run.restore("best"), lambda: run.restore(2)):
        refused(CheckpointError, "2: expected step 2, got step 1", read)


def test_what_a_kill_in_the_middle_of_a_removal_leaves_is_removed(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as run:
        for step in (1, 2):
            run.save_async(step, small(step), CONFIG)
    (tmp_path / ".0.abcdefgh.partial" / "0").mkdir(parents=True)  # as a process leaves it that is killed in `remove_folder`
    later = Checkpoints(tmp_path, keep_last=1)
    assert later.steps == [1, 2]
    later.tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_arrays_may_be_donated_after_save_async(tmp_path):
    params = {"item": {"table": jnp.zeros((500, 1000)), "host": np.zeros((500, 1000), np.float32)}}
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path) as run:
        run.save_async(1, params, CONFIG)
        params["item"]["table"] = bump(params["item"]["table"])
        params["item"]["host"] += 1
    loaded = run.restore().params
    assert not loaded["item"]["table"].any() and not loaded["item"]["host"].any()


FULL_DISK = """
import resource, signal
import jax, jax.numpy as jnp
from aif_jax.checkpoint import Checkpoints
from tests.test_checkpoint import CONFIG

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Checkpoints({folder!r})
run.save_async(1, {{"item": jnp.arange(12.0)}}, CONFIG)
run.wait()
table = jax.random.normal(jax.random.key(0), (500, 1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run.save_async(2, {{"item": table}}, CONFIG)
try:
    run.wait()
except Exception as error:
    print("raised by wait:", str(error)[:200].replace(chr(10), " "))
print(run.steps)
"""


def test_a_disk_that_fills_up_is_reported_by_wait(python, tmp_path):
    """A limit on the size of files plays the full disk: the error comes up in a thread in the background."""
    said = python(FULL_DISK.format(folder=str(tmp_path / "run")), env={"PYTHONWARNINGS": "default"})
    assert re.match(r"raised by wait: .*\n\[1\]\n", said), said
    with Checkpoints(tmp_path / "run") as run:
        np.testing.assert_array_equal(run.restore().params["item"], np.arange(12.0))


def test_steps_and_policies_are_checked(tmp_path):
    refused(ValueError, "keep_last: expected at least 1, got 0", Checkpoints, tmp_path, keep_last=0)
    refused(ValueError, "keep_best", Checkpoints, tmp_path, keep_best=("gauc", "highest"))
    with Checkpoints(tmp_path, keep_best=("gauc", "max")) as run:
        assert (run.steps, run.latest, run.best) == ([], None, None)
        refused(FileNotFoundError, "expected step latest, found steps", run.restore)
        for metrics in (None, {"auc": 0.7}, {"gauc": float("nan")}):
            refused(ValueError, "expected a finite 'gauc'", run.save_async, 1, small(), CONFIG, metrics=metrics)
        run.save_async(1, small(), CONFIG, metrics={"gauc": 0.7})
        refused(FileExistsError, "expected a new step, got 1", run.save_async, 1, small(), CONFIG, metrics={"gauc": 0.7})


def test_a_reader_leaves_an_unfinished_save_of_another_process_alone(tmp_path):
    with Checkpoints(tmp_path) as run:
        run.save_async(1, small(), CONFIG)
    work = tmp_path / ".2.abcd_123.partial"
    work.mkdir()
    with Checkpoints(tmp_path) as reader:
        assert reader.restore().step == 1
        assert reader.best == 1
    assert work.is_dir()
    refused(FileNotFoundError, "abcd_123.partial is being written, or was left by a save", checkpoint.load, tmp_path / "2")


@pytest.mark.lane("standing")
@pytest.mark.parametrize("what", ["deep record", "many files", METADATA_FILE, "params/d", "params/_METADATA"])
def test_deep_sparse_and_many_files_are_refused(copy, monkeypatch, what):
    if what == "deep record":
        (copy / METADATA_FILE).write_text('{"custom_metadata":' + "[" * 200_000 + "]" * 200_000 + "}")
    elif what == "many files":
        monkeypatch.setattr(storage, "MOST_FILES", 8)
    else:
        os.truncate(next((copy / what).iterdir()) if what == "params/d" else copy / what, 1 << 36)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(CheckpointError, "copy: ", checkpoint.load, copy)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
