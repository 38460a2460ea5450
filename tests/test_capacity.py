"""Ids that come and go: who has a row, and that nothing of an id stays at a row that another one gets."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import aif_jax as aif
from aif_jax import blocks, train
from aif_jax.blocks.item_offset import with_item_offset
from aif_jax.blocks.pure_svd import PureSvd, with_pure_svd
from aif_jax.checks import EncodingMismatch, VersionMismatch
from aif_jax.data.candidates import NegativeSampler, SampleKey
from aif_jax.encoding.capacity import Capacity, add_counts, assign, new_rows
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.export.consume.files import ExportError
from aif_jax.export.consume.model import _vocabularies
from aif_jax.index import ItemIndex
from aif_jax.readers import admit
from aif_jax.train.edits import carry_over, carry_over_state
from aif_jax.train.evaluate import catalogue_scores
from aif_jax.train.tasks import NextItem
from tests import demo
from tests.light import lightly_compiled

# the rule


def counted(times, counts=None):
    """Counts of events, seconds by id."""
    pairs = [(name, second) for name, seconds in times.items() for second in seconds]
    return add_counts(counts, [name for name, _ in pairs], [second for _, second in pairs])


def test_an_id_gets_a_row_after_n_events_and_keeps_it():
    rule = Capacity(rows=4, admit_after=3)
    first, turnover = assign(Vocabulary([]), counted({"a": [1, 2, 3], "b": [1, 2]}), rule, now=3)
    assert len(first) == 5 and first.fixed and (turnover.admitted, turnover.waiting, turnover.free) == (1, 1, 3)
    row = int(first.encode(["a"])[0])
    second, turnover = assign(first, counted({"b": [4], "c": [4, 5, 6]}, first.counts), rule, now=6)
    assert second.encode(["a", "b", "c"]).tolist()[0] == row and sorted(second.rows) == [1, 2, 3]
    assert (turnover.held, turnover.admitted, turnover.evicted) == (3, 2, 0)


def test_an_id_that_was_not_seen_for_long_loses_its_row_and_its_count():
    rule = Capacity(rows=2, admit_after=2, evict_after=10)
    first, _ = assign(Vocabulary([]), counted({7: [0, 1], 8: [0, 9]}), rule, now=9)
    second, turnover = assign(first, counted({9: [12, 12]}, first.counts), rule, now=12)
    assert second.encode([7, 8, 9]).tolist() == [0, first.encode([8])[0], first.encode([7])[0]]  # 9 has the row that 7 had
    assert (turnover.evicted, turnover.forgotten, turnover.free) == (1, 1, 0)
    third, turnover = assign(second, counted({7: [13]}, second.counts), rule, now=13)
    assert third.encode([7])[0] == 0 and turnover.waiting == 1  # one event again, not three


@pytest.mark.parametrize("when_full, rows, refused", [("evict", {"b", "c"}, 1), ("refuse", {"a", "b"}, 1)])
def test_a_full_vocabulary_evicts_the_oldest_or_refuses(when_full, rows, refused):
    rule = Capacity(rows=2, when_full=when_full)
    first, _ = assign(Vocabulary([]), counted({"a": [1], "b": [2]}), rule, now=2)
    second, turnover = assign(first, counted({"c": [3]}, first.counts), rule, now=3)
    assert set(second.raw.tolist()) == rows and turnover.refused == refused
    assert turnover.evicted == turnover.admitted == (when_full == "evict")
    back, _ = assign(second, counted({"a": [9]}, second.counts), rule, now=9)  # its count was kept
    assert "a" in back.raw.tolist()


def test_ids_of_an_ordinary_vocabulary_keep_their_rows():
    before = Vocabulary([5, 7, 9])
    after, _ = assign(before, counted({6: [20], 7: [30]}), Capacity(rows=5, evict_after=15), now=30)
    assert after.encode([5, 6, 7, 9]).tolist() == [1, 4, 2, 3]  # what was never counted is as old as the oldest
    full, turnover = assign(before, counted({6: [20], 7: [30]}), Capacity(rows=3), now=30)
    assert full.encode([5, 6, 7, 9]).tolist() == [1, 3, 2, 0] and turnover.evicted == 1
    for known in (Vocabulary([5, 7, 9, 11]), full):
        with pytest.raises(ValueError, match="Capacity.rows: expected those of the vocabulary"):
            assign(known, counted({6: [20]}), Capacity(rows=3 if known is not full else 4), now=30)


@given(st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 50)), max_size=20), max_size=5),
       st.integers(1, 6), st.integers(1, 3), st.sampled_from([None, 0, 10]), st.sampled_from(["evict", "refuse"]))  # fmt: skip
def test_no_collision_no_lost_row_and_no_order_of_files(days, rows, admit_after, evict_after, when_full):
    rule = Capacity(rows=rows, admit_after=admit_after, evict_after=evict_after, when_full=when_full)
    vocabulary, now = Vocabulary([]), 0
    for day, events in enumerate(days):
        now = 100 * day + 50
        ids, times = [item for item, _ in events], [100 * day + second for _, second in events]
        made = [assign(vocabulary, add_counts(vocabulary.counts, ids[::way], times[::way]), rule, now=now) for way in (1, -1)]
        assert made[0][0] == made[1][0] and made[0][1] == made[1][1]
        after, turnover = made[0]
        known = after.rows.tolist()
        assert len(set(known)) == len(known) == turnover.held <= rows and all(1 <= row <= rows for row in known)
        assert turnover.held + turnover.free == rows
        assert turnover.held == len(vocabulary.raw) - turnover.evicted + turnover.admitted
        place = new_rows(vocabulary, after)
        for item, row in zip(vocabulary.raw.tolist(), vocabulary.rows.tolist(), strict=True):
            now_at = int(after.encode([item])[0])
            assert place[row] == (now_at if now_at else -1) and now_at in (0, row)  # it stays where it was, or is gone
        vocabulary = after


# the vocabulary


@pytest.mark.parametrize("ids", [[30, 10, 20], ["tea", "cup", ""]])
def test_a_fixed_vocabulary_encodes_decodes_and_travels(ids):
    counts = add_counts(None, [*ids, ids[0]], [1, 2, 3, 4])
    vocabulary = Vocabulary(ids, rows=[5, 1, 3], size=8, counts=counts)
    assert vocabulary.encode(ids).tolist() == [5, 1, 3] and [vocabulary.decode(row) for row in (5, 1, 3)] == ids
    with pytest.raises(IndexError):
        vocabulary.decode(2)
    unknown = 99 if isinstance(ids[0], int) else "pot"
    assert vocabulary.encode(np.array([ids[0], unknown])).tolist() == [5, 0] and len(vocabulary) == 8
    again = Vocabulary.from_arrays(vocabulary.to_arrays())
    assert again == vocabulary and again.encode(ids).tolist() == [5, 1, 3] and len(again) == 8
    assert again.counts.ids == counts.ids and again.counts.count.tolist() == counts.count.tolist()
    assert again.counts.last.tolist() == counts.last.tolist()
    plain, moved = Vocabulary(ids), Vocabulary(ids, rows=[5, 1, 4], size=8)
    larger, uncounted = Vocabulary(ids, rows=[5, 1, 3], size=9), Vocabulary(ids, rows=[5, 1, 3], size=8)
    assert len({each.digest for each in (plain, vocabulary, moved, larger)}) == 4 and uncounted == vocabulary
    assert Vocabulary.from_arrays(uncounted.to_arrays()).counts is None


def test_ordinary_vocabularies_have_the_digest_that_they_had():
    assert Vocabulary([3, 1]).digest.startswith("6ee9e86bd9e1") and set(Vocabulary([3, 1]).to_arrays()) == {"ids"}
    assert Vocabulary(["b", "a"]).digest.startswith("a274a3a5ece9")


def test_damaged_arrays_are_refused():
    good = Vocabulary([7, 8], rows=[2, 1], size=4, counts=add_counts(None, [7], [3])).to_arrays()
    for name, array in {"rows": np.array([2, 2], np.int32), "size": np.zeros(2, int), "count": np.array([-1])}.items():
        with pytest.raises(ValueError, match=r"Vocabulary|IdCounts"):
            Vocabulary.from_arrays(good | {name: array})
    with pytest.raises(ValueError, match="'count' and 'last'"):
        Vocabulary.from_arrays({name: array for name, array in good.items() if name != "last"})


# a model

COLUMNS = aif.Columns(
    content="embedding", user_id=True, item_attributes=("brand",), action="event", actions=("view", "buy"), scale=False
)
RULES = {
    "item": Capacity(rows=8, evict_after=500), "category": Capacity(rows=4, evict_after=500),
    "brand": Capacity(rows=3, evict_after=500), "user": Capacity(rows=6, evict_after=500),
}  # fmt: skip
RAW = {item: ("tea" if item < 6 else "cup", "acme" if item % 2 else "zen") for item in (1, 2, 3, 4, 5, 6, 60, 61)}
RAW |= {60: ("pot", "acme"), 61: ("tea", "new brand")}
BASE = 1_700_000_000


def items_of(names):
    embedding = [np.random.default_rng(name).normal(size=6).tolist() for name in names]
    parts = {"category": [RAW[name][0] for name in names], "brand": [RAW[name][1] for name in names]}
    return {"item": list(names), "embedding": embedding} | parts


def events_of(day, users, names):
    pairs = [(user, item) for user in users for item in names]
    time = [BASE + 1000 * day + 3 * place for place in range(len(pairs))]
    event = ["view", "buy"] * len(pairs)
    return {"user": [u for u, _ in pairs], "item": [i for _, i in pairs], "time": time, "event": event[: len(pairs)]}


DAYS = (events_of(0, ["ann", "bob", "cem"], [1, 2, 3, 4, 5, 6]), events_of(1, ["ann", "bob", "dan"], [1, 2, 3, 4, 5, 60, 61]))
CATALOGUES = (items_of([1, 2, 3, 4, 5, 6]), items_of([1, 2, 3, 4, 5, 60, 61]))
KINDS = (blocks.MatchingStatistics(("item", "category")), blocks.LshDin(), blocks.SimTierCodes(codes=4, tiers=3, nearest=2),
         blocks.CosineTiers(tiers=3))  # fmt: skip


@dataclasses.dataclass
class World:
    """A model of the first day, the encoder and the data of the second."""

    before: aif.Trained
    encoder: Encoder
    data: aif.Dataset
    old_data: aif.Dataset


def model_of(encoder, data, seed=0):
    config = aif.Config(schema=data.schema, width=8, short_length=4, long_length=8, towers=(8,), head=(8,), blocks=KINDS)
    params = demo.init(aif.build(config), seed, items=data.catalogue)
    rng = np.random.default_rng(seed)
    size = len(encoder.vocabularies["item"])
    params, config = with_pure_svd(params, rng.normal(size=(size, 3)).astype(np.float32), config=config, block=PureSvd(width=3))
    params, config = with_item_offset(params, rng.normal(size=size).astype(np.float32), config=config)
    return aif.Trained(aif.build(config), params, encoder.with_length(config.history_length))


@pytest.fixture(scope="module")
def world():
    with lightly_compiled(keep=True):
        plain = aif.read(DAYS[0], items=CATALOGUES[0], columns=COLUMNS, progress=False)
        first, _ = admit(plain.encoder, DAYS[0], items=CATALOGUES[0], capacity=RULES, fresh=True)
        old_data = aif.read(DAYS[0], items=CATALOGUES[0], encoder=first, unknown="skip", progress=False)
        second, turnover = admit(first, DAYS[1], items=CATALOGUES[1], capacity=RULES)
        assert turnover["item"][:3] == (7, 2, 1) and turnover["category"][:3] == (2, 1, 1)
        data = aif.read(DAYS[1], items=CATALOGUES[1], encoder=second, unknown="skip", progress=False)
        yield World(model_of(first, old_data), second, data, old_data)


def test_counts_alone_change_no_version_and_rows_do(world):
    first = world.before.encoder
    again, turnover = admit(first, events_of(0, ["ann"], [1]), items=CATALOGUES[0], capacity=RULES, now=BASE)
    assert again.version == first.version and again.vocabularies["item"].counts is not first.vocabularies["item"].counts
    assert turnover["item"].admitted == 0
    assert world.encoder.version != first.version and world.encoder.schema == first.schema
    record, arrays = world.encoder.to_record(), world.encoder.to_arrays()
    loaded = Encoder.from_record(record, arrays)
    assert loaded.version == world.encoder.version
    counts, saved = loaded.vocabularies["item"].counts, world.encoder.vocabularies["item"].counts
    assert counts.last.tolist() == saved.last.tolist() and counts.count.tolist() == saved.count.tolist()
    with pytest.raises(ValueError, match="version"):
        Encoder.from_record(record, arrays | {"item/rows": arrays["item/rows"][::-1]})


def test_what_an_id_without_a_row_gets(world):
    """Evicted, waiting and never seen ids are encoded alike: row 0, in histories, as candidates and as users."""
    encode = world.encoder
    assert encode.vocabularies["item"].encode([6, 99]).tolist() == [0, 0]
    events = {"item": [6, 99, 1], "time": [BASE, BASE + 1, BASE + 2], "event": ["view"] * 3}
    user = encode.user({"user": "cem"}, events, BASE + 2000)
    assert user.history.item[:3].tolist() == [int(encode.vocabularies["item"].encode([1])[0]), 0, 0] and user.ids["user"] == 0
    _, features = encode.items(items_of([6, 1]))
    assert features.ids["item"].tolist()[0] == 0 and features.ids["item"][1] > 0
    assert features.ids["brand"][0] > 0 and (features.content[0] != 0).any()  # its other features stay
    assert features.ids["category"].tolist()[0] == 0  # no event of the second day has a cup


def rows_at(tree, name, size):
    """Leaves of a tree that have a row for each of a vocabulary: path to array."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {path: leaf for path, leaf in flat if np.shape(leaf)[:1] == (size,) and (name == "item" or name in str(path))}


def scrambled(world, seed):
    """The model before, with other values in everything that stands at the rows that lose their id."""
    rng, trained = np.random.default_rng(seed), world.before
    params = jax.tree.map(np.array, trained.params)
    old, new = trained.encoder.vocabularies, world.encoder.vocabularies
    for name in RULES:
        gone = np.flatnonzero(new_rows(old[name], new[name]) < 0)
        table = params["embedding"][name]
        table[gone] = rng.normal(size=table[gone].shape)
    gone = np.flatnonzero(new_rows(old["item"], new["item"]) < 0)
    for leaf in jax.tree.leaves(params["fitted"]):
        if len(leaf) == len(old["item"]):
            leaf[gone] = rng.integers(0, 2, leaf[gone].shape).astype(leaf.dtype)
    return trained.replace(params=jax.tree.map(jnp.asarray, params))


def test_nothing_of_an_id_stays_at_a_row_that_another_one_gets(world):
    """Two models that differ only in what stood at the rows of evicted ids are one model after these went."""
    models = [world.before, scrambled(world, 1), scrambled(world, 2)]
    assert len({each.version for each in models}) == 3
    after = [carry_over(each, world.encoder, key=jax.random.key(3)) for each in models]
    assert len({each.version for each in after}) == 1
    old, new, size = world.before.encoder.vocabularies["item"], world.encoder.vocabularies["item"], 9
    row = int(old.encode([6])[0])
    assert row == new.encode([60])[0] or row == new.encode([61])[0]  # 6 is gone, a new item has its row
    place = new_rows(old, new)
    kept = np.flatnonzero(place >= 0)
    params, result = world.before.params, after[0].params
    fitted = rows_at(result["fitted"], "item", size)
    # two fields and the item itself, LSH and cosine tables, code, nearest and weights, SVD factors, the correction
    assert len(fitted) >= 8, sorted(map(str, fitted))
    before = rows_at(params["fitted"], "item", size)
    for path, values in fitted.items():
        np.testing.assert_array_equal(values[row], values[0])
        if "fields" not in str(path):
            np.testing.assert_array_equal(values[kept], before[path][kept])
    table, then = result["embedding"]["item"], params["embedding"]["item"]
    np.testing.assert_array_equal(table[kept], then[kept])
    assert not np.isin(np.asarray(table[row]), np.asarray(then)).any() and np.isfinite(table).all()
    categories = world.before.encoder.vocabularies["category"], world.encoder.vocabularies["category"]
    cup = int(categories[0].encode(["cup"])[0])
    assert cup == categories[1].encode(["pot"])[0]  # a field's row is recycled too
    assert not (np.asarray(result["fitted"]["fields"]["category"]) == cup).any()
    # fitted again on the new catalogue, the row has the new item's values, as in a model that never knew the old one
    again = aif.fit_tables(after[0].config, world.data.catalogue)
    assert again["fields"]["category"][new.encode([60])[0]] == cup
    signature = again["signatures_64"]["table"]
    assert (signature[row] != params["fitted"]["signatures_64"]["table"][row]).any()


def test_the_shapes_and_so_the_programs_stay(world):
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    assert after.config == world.before.config and after.config.schema.encoding == world.encoder.version

    def lowered(trained, data):
        user = data.user_features([0], length=trained.config.history_length)
        one = jax.tree.map(lambda leaf: leaf[0], dataclasses.replace(user, encoding=""))
        items = dataclasses.replace(data.catalogue.features([1, 2, 3]), encoding="")
        return jax.jit(trained.model.joint).lower(trained.params, one, items).as_text()

    assert lowered(after, world.data) == lowered(world.before, world.old_data)


OPTIMIZERS = {"adam": optax.adam(0.1), "adagrad": optax.adagrad(0.1, initial_accumulator_value=0.3),
              "rowwise": train.rowwise_adagrad(0.1)}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_moments_of_a_recycled_row_start_new(world, name):
    optimizer, rng = OPTIMIZERS[name], np.random.default_rng(0)
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    first, second = (optimizer.init({g: p for g, p in each.params.items() if g != "fitted"}) for each in (world.before, after))
    then = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(1, 2, leaf.shape), leaf.dtype), first)
    moved = carry_over_state(then, optimizer, world.before, after)
    old, new = world.before.encoder.vocabularies, world.encoder.vocabularies
    gone, checked = {"item": 6, "category": "cup", "user": "cem"}, set()
    flat = jax.tree_util.tree_leaves_with_path(moved)
    for (path, leaf), start, was in zip(flat, jax.tree.leaves(second), jax.tree.leaves(then), strict=True):
        table = next((each for each in gone if jax.tree_util.keystr(path).endswith(f"['embedding']['{each}']")), None)
        if table is None:
            if "embedding" not in str(path):
                np.testing.assert_array_equal(leaf, was)
            continue
        row, kept = int(old[table].encode([gone[table]])[0]), np.flatnonzero(new_rows(old[table], new[table]) >= 0)
        np.testing.assert_array_equal(leaf[row], start[row])
        np.testing.assert_array_equal(leaf[kept], was[kept])
        checked.add(table)
    assert checked == set(gone)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, second)  # dense and sparse steps take it


def test_an_ordinary_model_gets_a_capacity():
    """Tables and moments grow once; ids keep their rows and what stands there."""
    with lightly_compiled(keep=True):
        data = aif.read(DAYS[0], items=CATALOGUES[0], columns=COLUMNS, progress=False)
        config = aif.presets.two_tower(data.schema, width=8, short_length=4, long_length=8, towers=(8,), sequence=False)
        before = aif.Trained(aif.build(config), demo.init(aif.build(config), items=data.catalogue), data.encoder)
        rules = {"item": Capacity(rows=20), "user": Capacity(rows=9)}
        encoder, turnover = admit(data.encoder, DAYS[1], capacity=rules)
        after, optimizer = carry_over(before, encoder, key=jax.random.key(0)), optax.adam(0.1)
    assert (turnover["item"].held, turnover["item"].free, turnover["user"].held) == (8, 12, 4)
    first, fresh = (optimizer.init({g: p for g, p in each.params.items() if g != "fitted"}) for each in (before, after))
    then = jax.tree.map(lambda leaf: leaf + 2, first)
    moved = carry_over_state(then, optimizer, before, after)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, fresh)
    for name, size in (("item", 21), ("user", 10), ("category", 3)):
        count = len(data.encoder.vocabularies[name].raw) + 1
        table, mu = after.params["embedding"][name], moved[0].mu["embedding"][name]
        assert len(table) == len(mu) == size
        np.testing.assert_array_equal(table[:count], before.params["embedding"][name])
        assert (mu[:count] == 2).all() and not mu[count:].any()
        assert encoder.vocabularies[name].encode(data.encoder.vocabularies[name].raw).tolist() == list(range(1, count))


def test_a_state_whose_rows_are_no_rows_is_refused(world):
    after, optimizer = carry_over(world.before, world.encoder, key=jax.random.key(3)), optax.adam(0.1)
    state = optimizer.init({name: group for name, group in world.before.params.items() if name != "fitted"})
    cut = jax.tree.map(lambda leaf: leaf[:3] if leaf.shape[:1] == (9,) else leaf, state)
    with pytest.raises(ValueError, match="one row for each of 9 rows of table 'item'"):
        carry_over_state(cut, optimizer, world.before, after)


def test_an_export_reads_rows_that_are_in_no_order():
    arrays = {f"item/{name}": array for name, array in Vocabulary([7, 8, 9], rows=[3, 1, 5], size=7).to_arrays().items()}
    (known, rows) = _vocabularies(arrays)["item"]
    assert rows[known.positions(np.array([9, 7, 4]))].tolist() == [5, 3, 0]
    with pytest.raises(ExportError, match="expected a row of at least 1 for each of 3 ids"):
        _vocabularies(arrays | {"item/rows": np.array([1, 2], np.int32)})


def test_indexes_and_user_states_of_the_model_before_are_refused(world, tmp_path):
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    with pytest.raises(EncodingMismatch):
        ItemIndex.build(after, world.old_data.catalogue, progress=False)
    ItemIndex.build(world.before, world.old_data.catalogue, progress=False).save(tmp_path / "index")
    with pytest.raises(VersionMismatch):
        ItemIndex.load(tmp_path / "index", after)
    rebuilt = ItemIndex.build(after, world.data.catalogue, progress=False)
    assert len(rebuilt) == 7  # free rows are no items
    new = int(world.encoder.vocabularies["item"].encode([60])[0])
    row, _ = rebuilt.take([60])
    expected = jax.jit(after.model.item)(after.params, jax.tree.map(lambda leaf: leaf[0], world.data.catalogue.features([new])))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(np.asarray(got)[0], want, rtol=1e-5, atol=1e-6), row, expected)


def test_a_history_with_an_evicted_item_meets_no_newcomer(world):
    """Matching statistics and every other block: an evicted item in the history is an unknown one, not who has its row."""
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    scores, candidates = [], world.data.catalogue.features(world.encoder.vocabularies["item"].encode([60, 61, 1]))
    for item in (6, 777, 60):
        events = {"item": [item, 2], "time": [BASE, BASE + 5], "event": ["buy", "view"]}
        user = after.encoder.user({"user": "ann"}, events, BASE + 2000)
        scores.append(np.asarray(jax.jit(after.model.joint)(after.params, user, candidates)))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).any()


def test_free_rows_are_no_candidates(world):
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    free = np.delete(np.arange(9), world.encoder.vocabularies["item"].rows)
    assert len(free) == 2  # the unknown one among them
    ((_, scores),) = catalogue_scores(after.model, after.params, world.data, np.array([3]), repeats=True, progress=False)
    assert np.isneginf(scores[:, free]).all() and np.isfinite(np.delete(scores, free, axis=1)).all()
    sampler = NegativeSampler(np.zeros(9), uniform=1.0, rows=world.data.catalogue.rows)
    assert set(np.flatnonzero(sampler.probabilities)) == set(world.encoder.vocabularies["item"].rows)
    for held_out in (False, True):  # uniform candidates: 0 ** 0 is 1
        source = NextItem(power=0, negatives=99).source(world.data, before=BASE + 9999, held_out=held_out, repeats=True)
        rows = source(np.array([0, 3]), SampleKey(0, 0, 0)).rows
        assert not np.isin(rows, free).any() and len(np.unique(rows)) == 7
    assert "7 items" in repr(world.data)
    with pytest.raises(ValueError, match=r"Catalogue\.rows"):
        dataclasses.replace(world.data.catalogue, rows=np.zeros(7, np.int32))


def test_values_of_bags_and_of_users_are_seen_by_their_events():
    columns = aif.Columns(item_bags=("tags",), user_attributes=("city",))
    items = {"item": [1, 2, 3], "category": ["a"] * 3, "tags": [["red", "old"], ["red"], ["new"]]}
    users = {"user": ["ann", "bob", "cem"], "city": ["Rome", "Oslo", None]}
    events = {"user": ["ann", "ann", "bob"], "item": [1, 2, 1], "time": [10, 20, 30]}
    data = aif.read(events, items=items, users=users, columns=columns, progress=False)
    rules = {"tags": Capacity(rows=5, admit_after=3), "city": Capacity(rows=5, admit_after=2), "category": Capacity(rows=2)}
    encoder, turnover = admit(data.encoder, events, items=items, users=users, capacity=rules, fresh=True)
    tags, city = encoder.vocabularies["tags"], encoder.vocabularies["city"]
    assert tags.raw.tolist() == ["red"] and city.raw.tolist() == ["Rome"]  # 3 events against 2, and 2 against 1
    assert dict(zip(tags.counts.ids.raw.tolist(), tags.counts.count.tolist(), strict=True)) == {"old": 2, "red": 3}
    assert city.counts.last.tolist() == [30, 20] and turnover["tags"].waiting == turnover["city"].waiting == 1
    assert encoder.vocabularies["category"].encode(["a"]).tolist() == [1]
    again = aif.read(events, items=items, users=users, encoder=encoder, unknown="skip", progress=False)
    assert (
        sorted(again.catalogue.ids["tags"].max(axis=1).tolist()) == [0, 0, 1, 1]
        and again.schema.item_attribute("tags").size == 6
    )
    assert sorted(again.user_ids["city"].tolist()) == [0, 0, 0, 1]


def test_other_encoders_and_names_are_refused(world):
    other = aif.read(DAYS[1], items=CATALOGUES[1], columns=dataclasses.replace(COLUMNS, scale=True), progress=False)
    with pytest.raises(ValueError, match="columns, actions and scales"):
        carry_over(world.before, other.encoder, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"capacity: expected names among .*'brand'"):
        admit(world.encoder, DAYS[1], capacity={"colour": Capacity(rows=3)})
    with pytest.raises(ValueError, match="admit items: expected a file"):
        admit(world.encoder, DAYS[1], capacity={"category": Capacity(rows=4)})
    with pytest.raises(ValueError, match="expected integers like the vocabulary"):
        admit(world.encoder, events_of(1, ["ann"], ["text"]), capacity={"item": RULES["item"]})
