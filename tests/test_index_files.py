"""Snapshots of the item index on disk: round trip, checks, damage."""

import jax
import pytest

import aif_jax as aif
from aif_jax.index import ItemIndex, verify
from tests import demo
from tests.refusals import refused
from tests.writer_world import CONFIG, MODEL, PARAMS, SCHEMA, TRAINED, build, features


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_round_trip(tmp_path, storage):
    index = build(storage=storage).upsert([9], features([4])).delete([5])
    index.save(tmp_path / "a", positions={0: 17, 3: 5})
    back = ItemIndex.load(tmp_path / "a", TRAINED)
    assert demo.same(back.stored(), index.stored()) and back.version == index.version
    assert demo.same(back.upsert([5], features([1])).stored(), index.upsert([5], features([1])).stored())
    manifest = verify(tmp_path / "a")
    assert (manifest.items, manifest.storage, manifest.version) == (3, storage, index.version)
    assert (manifest.positions, manifest.ids, manifest.batch_size) == ({0: 17, 3: 5}, "integers", 16)
    assert manifest.config == CONFIG and manifest.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(index.stored()))
    refused(FileExistsError, "something is there", index.save, tmp_path / "a")


def test_the_same_items_give_the_same_record_whatever_their_history(tmp_path):
    build().save(tmp_path / "a")
    build((7,), (9,)).upsert([6, 5], features([2, 1])).upsert([7, 8], features([3, 4])).delete([8]).save(tmp_path / "b")
    for name in ("manifest.json", "arrays.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_empty_index_and_strings_go_to_disk_and_back(tmp_path):
    build().delete([5, 6, 7]).save(tmp_path / "empty")
    assert ItemIndex.load(tmp_path / "empty", TRAINED).upsert([1], features([1])).ids.tolist() == [1]
    index = build(["a", "bb", ""])
    index.save(tmp_path / "a")
    back = ItemIndex.load(tmp_path / "a", TRAINED)
    assert (verify(tmp_path / "empty").items, verify(tmp_path / "a").ids) == (0, "strings")
    assert back.lookup(["bb", "", "b"])[1].tolist() == [True, True, False]
    assert demo.same(*(each.upsert(["c"], features([4])).delete(["a"]).stored() for each in (back, index)))


def test_a_snapshot_of_another_config_is_refused(tmp_path):
    build().save(tmp_path / "a")
    wider = aif.Schema(item_attributes=SCHEMA.item_attributes, item_floats=9)
    for changes, message in (
        ({"width": 16}, "config.width: expected 16, the snapshot has 8"),
        ({"schema": wider}, "config.schema.item_floats: expected 9, the snapshot has 8"),
    ):
        other = aif.Trained(MODEL._replace(config=CONFIG.replace(**changes)), PARAMS)
        refused(ValueError, message, ItemIndex.load, tmp_path / "a", other)
