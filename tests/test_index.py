"""The item index: build, look-up, updates, snapshots in memory and on disk, storage."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

import aif_jax as aif
from aif_jax import item
from aif_jax.export.consume.ids import TEXT, hashes
from aif_jax.index import ItemIndex, capacity_for, verify
from aif_jax.index import ids as ids_module
from aif_jax.index.ids import EMPTY, IdMap
from aif_jax.index.item_index import FORMAT
from aif_jax.index.store import ItemProgram
from aif_jax.readers import encode_items
from aif_jax.store import sealed
from aif_jax.store.codec import Packed, Scaled, decode, encode, pack, unpack
from aif_jax.store.folders import CheckpointError
from aif_jax.trees import take
from tests import demo
from tests.beside import meanwhile
from tests.demo import same
from tests.refusals import refused
from tests.writer_world import CONFIG, MODEL, PARAMS, TRAINED, build, features

FEATURES, IDS = demo.items(300), np.random.default_rng(0).integers(-(2**62), 2**62, 300)


@functools.cache
def trained() -> aif.Trained:
    return aif.Trained(*demo.build())


def make(features=FEATURES, ids=IDS, **options) -> ItemIndex:
    return ItemIndex.build(trained(), [(ids, features)], **{"batch_size": 64, "progress": False, **options})


@pytest.fixture(scope="module")
def index() -> ItemIndex:
    """Of 300 items; no test changes it."""
    return make()


def test_rows_are_the_item_function(index):
    rows, mask = index.take(IDS)
    want = jax.jit(jax.vmap(trained().model.item, (None, 0)))(trained().params, FEATURES)
    assert mask.all() and jax.tree.structure(rows) == jax.tree.structure(want)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), rows, want)
    assert np.array_equal(rows.fitted["signatures_32"], want.fitted["signatures_32"])


@pytest.mark.lane("standing")
@pytest.mark.usefixtures("lightly")
@pytest.mark.parametrize("variant", ["the last tiers", "two SIM fields", "exact"])
def test_every_kind_of_model_scores_from_the_table_as_from_features(variant):
    model, params = demo.build(**demo.VARIANTS[variant])
    features = demo.items(20)
    index = ItemIndex.build(aif.Trained(model, params), [(np.arange(20), features)], batch_size=64, progress=False)
    state = jax.jit(model.user)(params, demo.user(model.config))
    candidates, _ = index.lookup([7, 3, 11])
    with index.reading() as table:
        got = jax.jit(lambda table, rows: model.interaction(params, state, index.decode(table, rows)))(table, candidates)
    items = take(features, np.array([7, 3, 11]))
    want = jax.jit(lambda items: model.interaction(params, state, jax.vmap(model.item, (None, 0))(params, items)))(items)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_lookup(index):
    rows, mask = index.lookup(np.concatenate([IDS[:5], [12345, EMPTY]]))
    assert rows.dtype == np.int32 and mask.tolist() == [True] * 5 + [False] * 2
    assert rows[5:].tolist() == [-1, -1] and len(set(rows[:5])) == 5
    assert [len(part) for part in index.lookup([])] == [0, 0]
    assert index.lookup(IDS[:5].tolist())[1].all() and index.lookup(IDS[:10:2])[1].all()
    refused(ValueError, r"one axis, got shape \[1, 2\]", index.lookup, [[1, 2]])


@pytest.mark.parametrize(("bad", "message"), [
    ([1.5], "expected integers or strings.*, got dtype float64"),
    (["7"], "expected integers, got strings"),
    (np.array([7, None], object), "int, then NoneType at position 1"),
    ([7, "7"], "int, then str at position 1"),
    ([7, 2**63], "got 9223372036854775808"),
    (np.array([7, 2**63], np.uint64), "got 9223372036854775808"),
    ([True], "got dtype bool"),
])  # fmt: skip
def test_ids_that_are_none_are_refused_and_do_not_make_all_unknown(index, bad, message):
    for call in (index.lookup, index.delete, lambda ids: index.upsert(ids, take(FEATURES, slice(len(ids))))):
        refused(TypeError, f"ids: .*{message}", call, bad)


def test_a_table_of_a_million_ids_finds_exactly_what_was_put_in():
    rng = np.random.default_rng(3)
    ids = np.unique(np.concatenate([rng.integers(-(2**63) + 1, 2**63 - 1, 100_000), np.arange(100_000) << 32]))
    ids = rng.permutation(ids)
    table = IdMap(len(ids))
    view, *_ = table.assign(table.fill(ids[:150_000]), ids[150_000:], np.arange(150_000, len(ids), dtype=np.int32))
    assert np.array_equal(view.lookup(ids), np.arange(len(ids)))
    assert (view.lookup(np.setdiff1d(rng.integers(-(2**63) + 1, 2**63 - 1, 50_000), ids)) == -1).all()
    keys, rows = view.items()
    assert np.array_equal(keys, np.sort(ids)) and np.array_equal(ids[rows], keys)


def test_ids_that_share_a_bucket_overflow_into_the_next():
    table = IdMap(90)  # 128 places in 16 buckets
    numbers = np.arange(20_000, dtype=np.int64)
    crowd = numbers[table.home(numbers) == 15]
    last = crowd[:30]  # three and a half buckets full, wrapping round the end
    view, *_ = table.assign(table.fill(crowd[:0]), last, np.arange(30, dtype=np.int32))
    assert np.array_equal(view.lookup(last), np.arange(30))
    assert np.array_equal(IdMap(90).fill(last).lookup(last), np.arange(30))
    assert (table.find(crowd[30:60]) == -1).all()


def test_old_snapshots_keep_their_rows():
    first = make()
    before, changed = first.take(IDS)[0], demo.items(300, seed=9)
    snapshots, expected = [first], [FEATURES]
    for step in range(12):
        at, wanted = np.arange(step, 300, 7), jax.tree.map(np.array, expected[-1])
        for old, new in zip(jax.tree.leaves(wanted), jax.tree.leaves(changed), strict=True):
            old[at] = new[at]
        expected.append(wanted)
        snapshots.append(snapshots[-1].upsert(IDS[at], take(changed, at)))
    assert snapshots[-1].capacity == first.capacity, "updates in place, or this test shows nothing"
    assert snapshots[-1]._store is first._store
    assert same(first.take(IDS)[0], before)
    for snapshot, wanted in zip(snapshots, expected, strict=True):
        assert same(snapshot.take(IDS)[0], make(wanted).take(IDS)[0])


def test_rows_come_back_when_their_snapshots_are_gone():
    index = make()
    store, free = index._store, index._store.room
    for _ in range(50):  # 15,000 changes in 1024 rows
        index = index.upsert(IDS, FEATURES)
    assert index._store is store and index.capacity == 1024
    assert free - store.room in (0, 300)
    pages = len(store.ids.pages)
    for _ in range(50):
        index = index.upsert(IDS, FEATURES)
    assert len(store.ids.pages) == pages
    held = index
    index = index.upsert(IDS, FEATURES)
    assert store.room == free - 300, "the held snapshot still reads its rows"
    del held
    assert store.room == free


def test_delete_and_insert(index):
    less = index.delete(IDS[:10])
    assert len(less) == 290 and not less.lookup(IDS[:10])[1].any() and index.lookup(IDS[:10])[1].all()
    assert less.delete([4]) is less and less.delete([]) is less and index.upsert([], take(FEATURES, slice(0))) is index
    again = less.upsert(IDS[:3], take(FEATURES, slice(3)))
    assert len(again) == 293 and same(again.take(IDS[:3])[0], index.take(IDS[:3])[0])
    assert np.array_equal(again.ids, np.sort(np.concatenate([IDS[:3], IDS[10:]])))


def test_growth_keeps_old_and_new_snapshots(index):
    many = demo.items(2000, seed=4)
    grown = index.upsert(np.arange(2000), many)
    assert len(grown) == 2300 and grown.capacity == capacity_for(2300) and index.capacity == 1024
    assert same(grown.take(IDS)[0], index.take(IDS)[0])
    assert same(grown.take(np.arange(2000))[0], make(many, np.arange(2000)).take(np.arange(2000))[0])


def test_an_update_of_an_older_snapshot_branches_off():
    root = make()
    left = root.upsert([1], take(FEATURES, [0]))
    right = root.upsert([2], take(FEATURES, [1])).delete(IDS[:1])
    assert left.lookup([1, 2, IDS[0]])[1].tolist() == [True, False, True]
    assert right.lookup([1, 2, IDS[0]])[1].tolist() == [False, True, False]
    assert root.lookup([1, 2, IDS[0]])[1].tolist() == [False, False, True]


def test_an_update_writes_in_place():
    index = make()
    with index.reading() as lent:
        pass
    index.upsert(IDS, demo.items(300, seed=5))
    assert lent.words.is_deleted()


def test_readers_and_a_writer_in_threads():
    """A reader sees every row of its snapshot made from one and the same update."""
    ids = np.arange(200)

    def generation(number):
        features = demo.items(200, seed=7)
        features.side["bid"][:] = number
        return features

    current, seen = [make(generation(0), ids)], set()
    score = jax.jit(lambda table, rows: ItemIndex.decode(table, rows).side["bid"])

    def read():
        index = current[0]
        rows, _ = index.lookup(ids)
        with index.reading() as table:
            values = set(np.asarray(score(table, rows)).tolist())
        assert len(values) == 1, f"torn: {values}"
        seen.update(values)

    with meanwhile(read, read):
        for number in range(1, 60):
            current[0] = current[0].upsert(ids, generation(number))
    assert len(seen) > 3


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_storage_error_is_within_its_bound(storage, tolerance):
    rows = jax.random.normal(jax.random.key(0), (50, 16)) * jnp.logspace(-3, 3, 50)[:, None]
    rows = rows.at[0].set(0.0)
    stored = jax.vmap(lambda row: encode({"v": row, "bid": row[0], "code": jnp.int32(3)}, storage))(rows)
    back = decode(jax.vmap(pack)(stored), np.arange(50))
    bound = tolerance * (np.abs(rows) if storage == "bfloat16" else np.abs(rows).max(1, keepdims=True)) * 1.001
    assert (np.abs(back["v"] - rows) <= bound).all()
    assert np.array_equal(back["bid"], rows[:, 0]) and back["code"].tolist() == [3] * 50
    assert isinstance(stored["v"], Scaled) if storage == "int8" else stored["v"].dtype == storage


@pytest.mark.parametrize("width", [1, 31, 32, 33, 44, 64, 100])
def test_rows_of_every_width_are_read_in_place(width):
    """Wide ones in pairs of words: no copy of the table."""
    values = np.random.default_rng(0).integers(0, 2**32, (1000, width), np.uint32)
    layout = jax.eval_shape(jax.vmap(pack), {"v": jax.ShapeDtypeStruct(values.shape, np.uint32)}).layout
    rows = np.array([999, 0, -1, 7, 7, -300], np.int32)
    compiled = jax.jit(decode).lower(Packed(words=values, layout=layout), rows).compile()
    np.testing.assert_array_equal(compiled(Packed(words=values, layout=layout), rows)["v"], values[np.maximum(rows, 0)])
    assert compiled.memory_analysis().temp_size_in_bytes < values.nbytes / 2


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint32", "float16", "uint16", "int8", "uint8", "bool"])
def test_packed_rows_keep_every_bit(dtype):
    """Of columns of any width, also where they leave part of a word free, and the columns beside them."""
    columns = {}
    for shape in ((), (1,), (3,), (4,), (2, 3)):
        values = np.random.default_rng(0).integers(0, 2**10, (5, *shape))
        columns[f"b{shape}"] = (values % 3 if dtype == "bool" else values).astype(dtype)
    rows = {"a": np.arange(5, dtype=np.int32), **columns, "c": np.linspace(0, 1, 5, dtype=np.float32)}
    packed = jax.jit(jax.vmap(pack))(rows)
    assert packed.words.shape == (5, 2 + sum(-(-column[0].size * column.itemsize // 4) for column in columns.values()))
    back = jax.jit(unpack)(packed)
    assert all(np.array_equal(back[name], rows[name]) and back[name].dtype == rows[name].dtype for name in rows)


def test_a_row_wider_than_a_word_is_refused():
    refused(TypeError, "at most 32 bits, see jax_enable_x64, got dtype complex64", pack, {"v": jnp.zeros(2, jnp.complex64)})


@pytest.mark.parametrize(("storage", "limit"), [("bfloat16", 0.02), ("int8", 0.02)])
def test_score_error_of_compact_storage(index, storage, limit):
    compact = make(storage=storage)
    assert compact.bytes_per_row < index.bytes_per_row
    model, params = trained().model, trained().params
    score = jax.jit(lambda rows: model.interaction(params, model.user(params, demo.user(model.config)), rows))
    want, got = (np.asarray(score(each.take(IDS)[0])) for each in (index, compact))
    assert 0 < np.abs(got - want).max() < limit * np.abs(want).max()


def test_sources():
    names = [f"sku-{i}" for i in range(49)]
    attributes = {name: ids[:49] for name, ids in FEATURES.ids.items() if name != "item"}
    rest = take(FEATURES, slice(49))
    rest = dict(floats=rest.floats, content=rest.content, side=rest.side)
    catalogue = aif.Catalogue.from_items(trained().config.schema, names, ids=attributes, **rest)
    named = ItemIndex.build(trained(), catalogue, batch_size=64, progress=False)
    assert same(named.take(catalogue.raw)[0].side, catalogue.features(np.arange(1, 50)).side)
    assert len(named.upsert(["sku-1", "new"], take(FEATURES, slice(2)))) == 50
    for source, error, message in (
        (3, TypeError, "catalogue: expected a Catalogue, raw items as `aif.read` takes them, or batches .*, got int"),
        ("items.csv", ValueError, "raw items: expected a model with an encoder"),
        ([{"item": [1]}], ValueError, "raw items: expected a model with an encoder"),
    ):
        refused(error, message, ItemIndex.build, trained(), source, progress=False)


TABLE = {
    "item": [f"sku-{i}" for i in range(40)],
    "category": ["tea", "cup"] * 20,
    "brand": ["x", None, "y", "z"] * 10,
    "price": np.linspace(1, 9, 40),
    "bid": np.arange(40.0),
}


@pytest.fixture(scope="module")
def raw() -> aif.Trained:
    """A model of items with a brand, a scaled price and a bid."""
    columns = aif.Columns(item_attributes=("brand",), item_floats=("price",), side=("bid",))
    data = aif.read({"user": ["ann"], "item": ["sku-0"], "time": [1_600_000_000]}, items=TABLE, columns=columns)
    model = aif.build(aif.presets.two_tower(data.schema))
    return aif.Trained(model, demo.init(model, items=data.catalogue), data.encoder)


def test_raw_items_come_in_as_training_read_them(raw, tmp_path):
    arrow = pa.table({name: pa.array(list(values)) for name, values in TABLE.items()})
    csv.write_csv(arrow, tmp_path / "items.csv")
    parquet.write_table(arrow, tmp_path / "items.parquet")
    options = dict(batch_size=16, progress=False)
    index = ItemIndex.build(raw, [encode_items(TABLE, raw.encoder)], **options)
    assert index.version == aif.fingerprint(raw.params, raw.config, raw.encoder)
    rows, mask = index.take(["sku-3", "sku-40"])
    _, features = encode_items({name: values[3:4] for name, values in TABLE.items()}, raw.encoder)
    want = jax.vmap(raw.model.item, (None, 0))(raw.params, features)
    assert mask.tolist() == [True, False] and rows.side["bid"][0] == 3.0
    np.testing.assert_allclose(rows.vector[:1], want.vector, rtol=1e-5, atol=1e-6)
    files = tmp_path / "items.csv", str(tmp_path / "items.parquet")
    frame = type("DataFrame", (), {"__arrow_c_stream__": lambda self, schema=None: arrow.__arrow_c_stream__(schema)})()
    for catalogue in (*files, arrow.to_batches(max_chunksize=7), [arrow], arrow, arrow.to_reader(), frame, TABLE, [TABLE]):
        assert same(ItemIndex.build(raw, catalogue, **options).stored(), index.stored())


def test_what_is_no_catalogue_is_named(raw):
    build = functools.partial(ItemIndex.build, raw, progress=False)
    for wrong, error, message in (
        (["item", "category"], FileNotFoundError, "item: expected a file or folder, got no such file"),
        ((TABLE["item"], None), TypeError, "items: expected a path, a mapping of columns or an Arrow table, got list"),
        ([3], TypeError, "items: expected a path, a mapping of columns or an Arrow table, got int"),
    ):
        refused(error, message, build, wrong)
    refused(ValueError, "items, column 'item': missing column: expected .*, got the columns 'sku'", build, {"sku": [1]})


def test_raw_updates(raw):
    index = ItemIndex.build(raw, [TABLE], batch_size=16, progress=False)
    record = {"item": "sku-5", "category": "tea", "brand": "y", "price": 2.5, "bid": 99.0}
    new = {"item": "brand new", "category": "unheard of", "price": 1.0, "bid": 1.0}
    columns = {name: [one.get(name) for one in (record, new)] for name in TABLE}
    changed = index.upsert(columns)
    assert len(changed) == 41 and changed.take(["sku-5", "brand new"])[0].side["bid"].tolist() == [99.0, 1.0]
    for update in (pa.table(columns), pa.record_batch(columns)):
        assert same(index.upsert(update).stored(), changed.stored())
    assert same(index.upsert(*encode_items(columns, raw.encoder)).stored(), changed.stored())
    other = dataclasses.replace(raw.encoder, scales={"item/price": (5.0, 3.0)})
    refused(aif.EncodingMismatch, "ItemFeatures: expected the encoding", index.upsert, *encode_items(columns, other))
    refused(aif.EncodingMismatch, "", ItemIndex.build, raw, [encode_items(TABLE, other)], progress=False)
    wrong = {name: [value] for name, value in record.items()}
    refused(ValueError, "column 'price'", index.upsert, wrong | {"price": [float("nan")]})
    del wrong["bid"]
    refused(ValueError, "items, column 'bid': missing column", index.upsert, wrong)


def test_a_stream_of_unknown_length_grows_the_table():
    many = demo.items(3600, seed=2)
    cuts = [0, 100, 100, *range(107, 300, 7), *range(300, 3601, 500), 3600]
    stream = [(np.arange(i, j), take(many, slice(i, j))) for i, j in itertools.pairwise(cuts)]
    for batch_size in (64, 4096):  # one batch may be larger than twice the first table
        streamed = ItemIndex.build(trained(), iter(stream), batch_size=batch_size, progress=False)
        known = make(many, np.arange(3600), batch_size=batch_size)
        assert same(streamed.take(np.arange(3600))[0], known.take(np.arange(3600))[0]) and streamed.capacity == known.capacity
    message = "capacity: expected at least the catalogue's items, got 2000"
    refused(ValueError, message, ItemIndex.build, trained(), stream, batch_size=64, capacity=2000, progress=False)


def test_an_empty_index_works():
    empty = ItemIndex.build(trained(), [], batch_size=64, progress=False)
    assert len(empty) == 0 and not empty.lookup(IDS)[1].any() and len(empty.ids) == 0
    assert len(empty.upsert(IDS, FEATURES)) == 300


def test_strings_are_found_by_what_they_are():
    names = [f"{i:03d}" for i in range(300)]
    index = make(FEATURES, names)
    assert index.lookup(names)[1].all() and index.lookup(np.array(names))[1].all()
    assert index.lookup(["7", "007", "", "007 "])[1].tolist() == [False, True, False, False]
    assert np.array_equal(index.ids, np.sort(hashes(names))) and hashes([]).shape == (0,)
    assert not make(take(FEATURES, slice(0)), []).lookup(names)[1].any() and len(index.lookup([])[0]) == 0
    for form in (np.array(names), np.array(names, np.dtypes.StringDType())):
        assert np.array_equal(ids_module.raw_keys(form, "ids"), hashes(names))
    assert len(np.unique(hashes([f"item {i}" for i in range(100_000)]))) == 100_000
    refused(TypeError, "ids: expected strings, got integers", index.lookup, np.arange(3))
    one = take(FEATURES, slice(1))
    for call in (index.lookup, index.delete, lambda ids: index.upsert(ids, one), lambda ids: make(one, ids)):
        refused(ValueError, "expected ids of at most 1024 characters, got 1025 at position 0", call, ["x" * 1025])
    less = index.delete(["007", "nothing"])
    assert len(less) == 299 and len(less.upsert(["007", "300"], take(FEATURES, slice(2)))) == 301
    assert same(less.take(["008"])[0], index.take(["008"])[0])


def test_two_strings_with_one_hash_are_two_items(monkeypatch):
    """In a build, an update, a deletion, on disk: the second hash tells them apart."""
    clash = lambda strings: np.array([(len(text), sum(map(ord, text))) for text in strings], TEXT)  # noqa: E731
    monkeypatch.setattr(ids_module, "hashes", clash)
    names = ["a", "b", "c", "dd"]
    index = make(take(FEATURES, slice(4)), names)
    whole = index.take(names)[0]
    assert index.lookup([*names, "e"])[1].tolist() == [True] * 4 + [False]
    updated = make(take(FEATURES, [3, 1]), ["c", "a"]).upsert(["b", "a", "dd", "c"], take(FEATURES, [1, 0, 3, 2]))
    assert same(updated.take(names)[0], whole) and same(updated.stored(), index.stored())
    assert updated.delete(["e", "b"]).lookup(names)[1].tolist() == [True, False, True, True]
    message = "expected distinct ids, got repeated ones: one comes twice, at positions 0 and 2"
    refused(ValueError, message, make, take(FEATURES, slice(3)), ["a", "b", "a"])


def test_what_is_refused(index):
    bad, twice = jax.tree.map(lambda leaf: np.array(leaf[:1]), FEATURES), take(FEATURES, slice(3))
    bad.content[0, 3] = np.nan
    for call, message in (
        (lambda: make(twice, [7, 8, 7]), r"got repeated ones: 7 comes twice, at positions 0 and 2 \(1 repeated"),
        (lambda: index.upsert([1, 2], twice), "features: expected 2 items like ids, got 3"),
        (lambda: index.upsert([EMPTY], take(FEATURES, slice(1))), "expected ids but -9223372036854775808, which is reserved"),
        (lambda: index.upsert([1], bad), "ItemFeatures.content: expected finite values, got nan"),
        (lambda: make(storage="float16"), "storage: expected one of .* got 'float16'"),
        (lambda: make(batch_size=0), "batch_size: expected at least 1, got 0"),
    ):
        refused(ValueError, message, call)


def test_an_update_that_fails_leaves_everything_as_it_was(monkeypatch):
    index = make()
    free = index._store.room
    monkeypatch.setattr(index._store.program, "_compiled", lambda *_: 1 / 0)
    refused(ZeroDivisionError, "", index.upsert, [1, 2], take(FEATURES, slice(2)))
    assert index._store.room == free and len(index) == 300 and not index.lookup([1])[1].any()


def test_nothing_compiles_after_the_first_update():
    index = make()
    index = index.upsert(IDS[:5], take(FEATURES, slice(5)))
    with jax.no_tracing():
        for count in (1, 63, 64, 65, 300):
            index = index.upsert(IDS[:count], take(FEATURES, slice(count))).delete(IDS[:1])
    assert len(index) == 299


def test_rows_without_the_side_values_of_the_schema_are_refused():
    """Orders and answers read them: without them every candidate would score 0."""
    schema = dataclasses.replace(demo.schema(), side=("bid",))
    bare = lambda params, features, *, config: dataclasses.replace(item.apply(params, features, config=config), side={})  # noqa: E731
    model = aif.assemble(demo.config(schema=schema), item=aif.Component(item.init, bare))
    params = jax.eval_shape(lambda: aif.build(demo.config()).init(jax.random.key(0), demo.catalogue()))
    message = r"ItemRow.side: .* side values \['bid'\] of the schema, got \[\]"
    refused(ValueError, message, ItemProgram, aif.Trained(model, params), storage="float32", batch_size=8)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_snapshot_comes_back_from_disk(tmp_path, storage):
    index = build(storage=storage).upsert([9], features([4])).delete([5])
    index.save(tmp_path / "a", positions={0: 17, 3: 5})
    back = ItemIndex.load(tmp_path / "a", TRAINED)
    assert same(back.stored(), index.stored()) and back.version == index.version
    assert same(back.upsert([5], features([1])).stored(), index.upsert([5], features([1])).stored())
    manifest = verify(tmp_path / "a")
    assert (manifest.items, manifest.storage, manifest.version) == (3, storage, index.version)
    assert (manifest.positions, manifest.ids, manifest.batch_size) == ({0: 17, 3: 5}, "integers", 16)
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
    index.delete(["a", "bb", ""]).save(tmp_path / "none")
    assert len(ItemIndex.load(tmp_path / "none", TRAINED).upsert(["a"], features([1]))) == 1
    index.save(tmp_path / "a")
    back = ItemIndex.load(tmp_path / "a", TRAINED)
    assert (verify(tmp_path / "empty").items, verify(tmp_path / "a").ids) == (0, "strings")
    assert back.lookup(["bb", "", "b"])[1].tolist() == [True, True, False]
    trees, record = sealed.read(tmp_path / "a", format=FORMAT), sealed.inspect(tmp_path / "a", format=FORMAT)
    del trees["ids"]["marks"]
    record = {name: value for name, value in record.items() if name not in ("files", "sha256")}
    sealed.write(tmp_path / "without", trees, record, format=FORMAT)
    refused(CheckpointError, "without: ids: expected hashes of strings, int64", ItemIndex.load, tmp_path / "without", TRAINED)
    assert same(*(each.upsert(["c"], features([4])).delete(["a"]).stored() for each in (back, index)))


def test_a_snapshot_of_another_config_is_refused(tmp_path):
    build().save(tmp_path / "a")
    other = aif.Trained(MODEL._replace(config=CONFIG.replace(width=16)), PARAMS)
    refused(aif.VersionMismatch, f"expected version {other.version}", ItemIndex.load, tmp_path / "a", other)
