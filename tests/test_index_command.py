"""`python -m aif_jax.index`, and catalogues in Arrow and Parquet."""

from __future__ import annotations

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aif_jax import checkpoint
from aif_jax.index import ItemIndex, string_ids
from aif_jax.index.__main__ import main
from aif_jax.index.arrow import from_arrow
from tests import demo


def arrow(ids, features, **more) -> pa.Table:
    columns = {"id": ids, **features.ids, **features.side, "floats": features.floats, "content": features.content, **more}
    return pa.table({name: pa.array(list(c) if np.ndim(c) > 1 else c) for name, c in columns.items()})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder with a checkpoint and a catalogue, model, params, features, ids)."""
    folder = tmp_path_factory.mktemp("world")
    model, params = demo.build()
    features, ids = demo.items(model.config, 90), np.arange(1000, 1090)
    checkpoint.save(folder / "model", params, model.config)
    (folder / "catalogue").mkdir()
    for name, at in (("a", slice(0, 40)), ("b", slice(40, 90))):
        pq.write_table(arrow(ids[at], jax.tree.map(lambda x, at=at: x[at], features)), folder / "catalogue" / f"{name}.parquet")
    return folder, model, params, features, ids


def run(*words, capsys) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def same(a: ItemIndex, b: ItemIndex) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(*(jax.tree.leaves(i.stored()) for i in (a, b)), strict=True))


def test_build_update_inspect_verify(world, tmp_path, capsys):
    folder, model, params, features, ids = world
    build = ["build", "--checkpoint", folder / "model", "--catalogue", folder / "catalogue", "--batch-size", 64, "--quiet"]
    code, out, _ = run(*build, "--output", tmp_path / "one", "--dry-run", capsys=capsys)
    assert code == 0 and out.startswith("dry run: 90 items, table of 1024 rows") and not (tmp_path / "one").exists()
    assert run(*build, "--output", tmp_path / "one", "--position", 5, capsys=capsys)[0] == 0
    built = ItemIndex.build(model, params, features, ids=ids, batch_size=64, progress=False)
    assert same(ItemIndex.load(tmp_path / "one", model, params), built)

    new = demo.items(model.config, 3, seed=5)
    changes = arrow([1000, 7, 1000], new, deleted=[False, False, True]).append_column("ignored", [["x"] * 3])
    pq.write_table(changes, tmp_path / "changes.parquet")
    update = [
        "update",
        "--index",
        tmp_path / "one",
        "--checkpoint",
        folder / "model",
        "--changes",
        tmp_path / "changes.parquet",
    ]
    code, out, _ = run(*update, "--output", tmp_path / "two", "--dry-run", capsys=capsys)
    assert code == 0 and "1 upserts, 1 deletes for an index of 90 items" in out and not (tmp_path / "two").exists()
    code, out, _ = run(*update, "--output", tmp_path / "two", capsys=capsys)
    assert code == 0 and "90 -> 90 items" in out
    wanted = built.delete([1000]).upsert([7], jax.tree.map(lambda x: x[1:2], new))
    assert same(ItemIndex.load(tmp_path / "two", model, params), wanted)

    code, out, _ = run("inspect", tmp_path / "two", capsys=capsys)
    manifest = json.loads(out)
    assert code == 0 and (manifest["items"], manifest["position"], manifest["version"]) == (90, 5, built.version)
    code, out, _ = run("verify", tmp_path / "two", capsys=capsys)
    assert code == 0 and "intact, 90 items" in out


def test_exit_codes(world, tmp_path, capsys):
    folder, model, params, features, ids = world
    code, _, err = run("verify", tmp_path / "nothing", capsys=capsys)
    assert code == 1 and "no checkpoint" in err
    (tmp_path / "there").mkdir()
    build = ["build", "--checkpoint", folder / "model", "--quiet", "--output"]
    code, _, err = run(*build, tmp_path / "there", "--catalogue", folder / "catalogue", capsys=capsys)
    assert code == 1 and "expected a new folder" in err
    code, _, err = run(*build, tmp_path / "a", "--catalogue", tmp_path / "none", capsys=capsys)
    assert code == 1 and "no Parquet file or directory" in err
    pq.write_table(arrow(ids[[0, 0]], jax.tree.map(lambda x: x[:2], features)), tmp_path / "twice.parquet")
    code, _, err = run(*build, tmp_path / "a", "--catalogue", tmp_path / "twice.parquet", "--dry-run", capsys=capsys)
    assert code == 1 and "1 repeated" in err
    with pytest.raises(SystemExit) as usage:
        main(["build", "--storage", "float8"])
    assert usage.value.code == 2
    other = {**params, "item": jax.tree.map(lambda x: x + 1, params["item"])}
    checkpoint.save(tmp_path / "other", other, model.config)
    ItemIndex.build(model, params, features, ids=ids, batch_size=64, progress=False).save(tmp_path / "index")
    code, _, err = run(
        "update", "--index", tmp_path / "index", "--checkpoint", tmp_path / "other", "--changes", tmp_path / "twice.parquet",
        "--output", tmp_path / "b", capsys=capsys,
    )  # fmt: skip
    assert code == 3 and "expected version" in err and not (tmp_path / "b").exists()


def test_help(python):
    """The command runs as a module."""
    out = python("import runpy, sys; sys.argv = ['x', '--help']; runpy.run_module('aif_jax.index', run_name='__main__')")
    assert "build|update|inspect|verify" in out and "Exit codes: 0 done" in out


def test_arrow_columns(world):
    _, model, params, features, ids = world
    schema = model.config.schema
    table = arrow([f"sku-{i}" for i in ids], features)
    ragged = pa.array([row[row > 0].tolist() for row in features.ids["tags"]], pa.list_(pa.int64()))
    got_ids, got = from_arrow(table.set_column(table.schema.names.index("tags"), "tags", ragged).slice(10, 30), schema)
    assert np.array_equal(got_ids, string_ids([f"sku-{i}" for i in ids[10:40]]))
    for wanted, row in zip(features.ids["tags"][10:40], got.ids["tags"], strict=True):
        assert np.array_equal(row, np.pad(wanted[wanted > 0], (0, 3 - (wanted > 0).sum())))
    assert np.array_equal(got.content, features.content[10:40]) and np.array_equal(got.side["bid"], features.side["bid"][10:40])
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(features.content.ravel()), schema.content)
    fixed_table = table.set_column(table.schema.names.index("content"), "content", fixed).slice(5, 7)
    assert np.array_equal(from_arrow(fixed_table, schema)[1].content, features.content[5:12])
    built = ItemIndex.build(model, params, table.to_batches(max_chunksize=17), batch_size=64, progress=False)
    assert same(built, ItemIndex.build(model, params, features, ids=string_ids(table["id"].to_pylist()), batch_size=64,
                                       progress=False))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("category", None, "expected a column 'category'"),
        ("category", [1.5], "expected integers, got float64"),
        ("category", [2**40], "expected values that fit int32"),
        ("category", pa.array([None], pa.int32()), "expected no nulls, got 1"),
        ("tags", [[1, 2, 3, 4]], "expected lists of 3, got one of 4"),
        ("content", [[0.5]], "expected lists of 12, got one of 1"),
        ("content", [1], "expected lists, got int64"),
        ("bid", ["dear"], "expected numbers, got object"),
        ("id", [1.5], "expected integers, got dtype float64"),
    ],
)
def test_columns_that_do_not_fit(world, name, values, message):
    _, model, _, features, _ = world
    table = arrow([1], jax.tree.map(lambda x: x[:1], features))
    at = table.schema.names.index(name)
    table = table.remove_column(at) if values is None else table.set_column(at, name, pa.array(values))
    with pytest.raises((ValueError, TypeError), match=message):
        from_arrow(table, model.config.schema)
