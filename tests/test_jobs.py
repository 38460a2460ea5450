"""Jobs over Arrow batches without any engine: rows of a build bit for bit, the way back from parts, what is refused."""

import pickle
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import dataset, parquet

import aif_jax as aif
from aif_jax import checkpoint, export
from aif_jax.checks import VersionMismatch
from aif_jax.engines import items
from tests import demo
from tests import jobs_world as world
from tests.conftest import ROOT, child_environment
from tests.refusals import refused


@pytest.fixture(scope="module")
def encoded() -> list[pa.RecordBatch]:
    """The catalogue, encoded from batches of 100 items."""
    return list(world.job()(world.items().to_batches(max_chunksize=100)))


@pytest.fixture(scope="module")
def whole() -> aif.ItemIndex:
    return world.built()


@pytest.mark.parametrize("cut", [1000, 64, 9])
def test_rows_are_those_of_a_build(whole, encoded, cut):
    """However the engine cuts the catalogue; the order of rows too."""
    out = list(world.job()(world.items().to_batches(max_chunksize=cut)))
    assert [batch.num_rows for batch in out] == [64] * 10 + [60] and all(batch.schema == world.job().schema for batch in out)
    assert pa.Table.from_batches(out) == pa.Table.from_batches(encoded)
    index = world.merged(out, items=world.ITEMS)
    assert world.same(index, whole) and np.array_equal(index.lookup(index.ids)[0], whole.lookup(whole.ids)[0])
    changed = world.items(5).set_column(4, "price", pa.array(np.arange(5.0)))
    assert world.same(index.upsert(changed), whole.upsert(changed))


@pytest.mark.parametrize(("storage", "strings"), [("bfloat16", False), ("int8", False), ("float32", True)])
def test_compact_rows_and_string_ids_are_those_of_a_build(storage, strings):
    out = list(world.job(storage=storage, strings=strings)(world.items(strings=strings).to_batches(max_chunksize=100)))
    assert out[0].column("id")[3].as_py() == ("sku-3" if strings else 24)
    assert world.same(world.merged(out, strings=strings), world.built(storage=storage, strings=strings))


def test_a_partition_of_its_own_gives_the_same_rows(whole):
    """As on many workers: parts of uneven length, in any order, from a job that was pickled."""
    job, table = pickle.loads(pickle.dumps(world.job())), world.items()
    parts = [job(table.slice(start, 130).to_batches(max_chunksize=50)) for start in (390, 0, 520, 650, 130, 260)]
    merged = world.merged(batch for part in parts for batch in part)
    assert world.same(merged, whole) and not np.array_equal(merged.lookup(merged.ids)[0], whole.lookup(whole.ids)[0])


def test_nothing_in_nothing_out(whole):
    for batches in ([], world.items(0).to_batches(), world.items().slice(0, 0).to_batches()):
        assert list(world.job()(iter(batches))) == []
    assert len(world.merged([])) == 0 and world.merged([]).version == whole.version


def test_memory_is_bounded():
    taken = []

    def batches():
        for number in range(100):
            taken.append(number)
            yield world.items(64).to_batches()[0]

    next(world.job()(batches()))
    assert len(taken) <= 4


@pytest.mark.parametrize(("change", "message"), [
    ({"price": [0.0] * 36 + [np.nan] + [0.0] * 63}, r" \(item 1655\): items, row 37, column 'price': not finite"),
    ({"item": [*range(40), None, *range(59)]}, r" \(item None\): items, row 41, column 'item': null: expected an id"),
    ({"item": [f"no {n}" for n in range(100)]}, ": items, column 'item': wrong type: expected integers like the vocabulary"),
    ({"bid": None}, ": items, column 'bid': missing column: expected a column of this name"),
    ({"item": pa.array([2**63 + n for n in range(100)], pa.uint64())}, r" \(item 92.*8\): items, row 1, .*below 2.63"),
])  # fmt: skip
def test_bad_input_is_named_by_batch_and_row(change, message):
    batches = world.items().to_batches(max_chunksize=100)
    columns = {name: batches[2].column(name) for name in batches[2].schema.names} | change
    batches[2] = pa.RecordBatch.from_pydict({name: values for name, values in columns.items() if values is not None})
    refused(ValueError, f"batch 2{message}", list, world.job()(batches))


@pytest.mark.parametrize("kind", ["export", "checkpoint"])
def test_a_folder_is_enough(tmp_path, kind):
    encoder = world.data().encoder
    model = aif.build(aif.presets.two_tower(world.data().schema, width=8, sequence=False, towers=(8,)))
    params = demo.init(model, items=world.data().catalogue)
    if kind == "export":
        export.save(tmp_path / "model", aif.Trained(model, params, encoder), platforms=("cpu",))
    else:
        checkpoint.save(tmp_path / "model", aif.Trained(model, params, encoder))
    job, trained = aif.engines.ItemJob(tmp_path / "model"), aif.Trained(model, params, encoder)
    assert job.version == trained.version and len(pickle.dumps(job)) < 1000 and pickle.loads(pickle.dumps(job)) == job
    rows = pa.Table.from_batches(list(pickle.loads(pickle.dumps(job))(world.items().to_batches())))
    built = aif.ItemIndex.build(trained, world.items().to_batches(), progress=False)
    assert world.same(aif.ItemIndex.from_parts(trained, [rows], items=world.ITEMS, progress=False), built)


@pytest.mark.lane("standing")
def test_a_worker_needs_the_pickle_alone(encoded, tmp_path):
    (tmp_path / "job").write_bytes(pickle.dumps(world.job()))
    parquet.write_table(world.items(), tmp_path / "items.parquet")
    code = f"""
import pickle, pyarrow as pa
from pyarrow import dataset, parquet
job = pickle.load(open({str(tmp_path / "job")!r}, "rb"))
out = list(job(parquet.ParquetFile({str(tmp_path / "items.parquet")!r}).iter_batches(200)))
parquet.write_table(pa.Table.from_batches(out), {str(tmp_path / "out.parquet")!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=child_environment(flags=""), check=True, timeout=200)
    assert parquet.read_table(tmp_path / "out.parquet") == pa.Table.from_batches(encoded)


def another() -> aif.Trained:
    """The model with other parameters."""
    doubled = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == np.float32 else leaf, world.trained().params)
    return world.trained().replace(params=doubled)


def test_another_model_in_the_folder_is_refused(tmp_path):
    checkpoint.save(tmp_path / "model", world.trained())
    sent = pickle.dumps(aif.engines.ItemJob(tmp_path / "model"))
    (tmp_path / "model").rename(tmp_path / "old")
    checkpoint.save(tmp_path / "model", another())
    job = pickle.loads(sent)
    items._program.cache_clear()  # as in a new process
    refused(VersionMismatch, f"job, model in .*model: expected version {job.version}", list, job(world.items(8).to_batches()))


def test_what_is_no_job(tmp_path):
    checkpoint.save(tmp_path / "bare", world.trained().replace(encoder=None))
    refused(ValueError, "bare: expected a model with an encoder", aif.engines.ItemJob, tmp_path / "bare")
    refused(FileNotFoundError, "nowhere", aif.engines.ItemJob, tmp_path / "nowhere")
    refused(ValueError, "storage: expected one of", world.job, storage="int4")


def test_batches_of_files_and_of_any_size_are_merged(encoded, whole, tmp_path):
    for number, part in enumerate(encoded):
        parquet.write_table(pa.Table.from_batches([part]), tmp_path / f"part-{number:03}.parquet")
    (tmp_path / "_SUCCESS").touch()
    index = world.merged(dataset.dataset(tmp_path).to_batches(), items=world.ITEMS)
    assert world.same(index, whole) and np.array_equal(index.lookup(index.ids)[0], whole.lookup(whole.ids)[0])
    assert world.same(world.merged(pa.Table.from_batches(encoded).to_batches(max_chunksize=7)), whole)
    large = pa.Table.from_batches(encoded).cast(encoded[0].schema.set(1, pa.field("row", pa.large_binary())))
    assert world.same(world.merged([large]), whole)
    index.save(tmp_path / "merged")
    assert world.same(aif.ItemIndex.load(tmp_path / "merged", world.trained()), whole)


def changed(part: pa.RecordBatch, **columns) -> pa.RecordBatch:
    """A part with some columns other than they were; None for one that is missing."""
    values = {name: part.column(name) for name in part.schema.names} | columns
    return pa.RecordBatch.from_pydict({name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize(("place", "word"), [(0, "0" * 64), (1, "int8"), (2, "32")], ids=["version", "storage", "batch size"])
def test_parts_that_another_job_made_are_refused(encoded, place, word):
    made_by = encoded[0].column("made_by")[0].as_py()
    words = made_by.split()
    mixed = [" ".join([*words[:place], word, *words[place + 1 :]]) if n == 9 else made_by for n in range(64)]
    message = f"batch 3, row 9: expected version {made_by}, got {mixed[9]}"
    refused(VersionMismatch, message, world.merged, [*encoded[:3], changed(encoded[3], made_by=mixed)])


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"row": None}, ValueError, "batch 1: expected columns id, row and made_by once each, got id: int64, made_by: string"),
    ({"made_by": None}, ValueError, "batch 1: expected columns .*, got id: int64, row: binary "),
    ({"row": list(range(64))}, ValueError, "batch 1: expected columns .*, got id: int64, row: int64"),
    ({"row": [b"1234"] * 64}, ValueError, "batch 1, row 0: expected a row of [0-9]+ bytes, got 4"),
    ({"row": [b"1234"] * 63 + [None]}, ValueError, "batch 1, column 'row': expected values, got 1 nulls"),
    ({"id": [0.5] * 64}, TypeError, "batch 1, column 'id': expected integers or strings, got dtype float64"),
    ({"id": ["a"] * 64}, TypeError, "batch 1, column 'id': expected integers, got strings"),
])  # fmt: skip
def test_bad_parts_are_refused(encoded, change, error, message):
    refused(error, message, world.merged, [encoded[0], changed(encoded[1], **change)])


def test_bad_stamps_and_sources_and_an_id_in_two_parts_are_refused(encoded):
    made_by = encoded[0].column("made_by")[0].as_py()
    message = f"batch 0, row 0: expected version .*, got {made_by}"
    refused(VersionMismatch, message, aif.ItemIndex.from_parts, another(), encoded)
    ids = encoded[4].column("id").to_pylist()
    ids[5] = encoded[2].column("id")[7].as_py()
    twice = [*encoded[:4], changed(encoded[4], id=ids)]
    refused(ValueError, f"ones: {ids[5]} comes twice, at positions 135 and 261", world.merged, twice)
    for stamp in (made_by.replace("float32", "int4"), f"{made_by} 7", "version float32 0"):
        other, message = changed(encoded[0], made_by=[stamp] * 64), "expected a version, one of .* and a batch size"
        refused(ValueError, f"batch 0, row 0: {message}, got '{stamp}'", world.merged, [other])
    refused(ValueError, "parts: expected 701 items, got 700", world.merged, encoded, items=701)
    refused(TypeError, "parts: expected an iterable of Arrow batches, got int", world.merged, 7)
    refused(TypeError, "parts, batch 0: expected Arrow record batches, got str", world.merged, "/shared/encoded")
