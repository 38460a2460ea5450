"""Orders and position sets that are computed, not held: exactly once each, evenly mixed, equal to the plain way."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aif_jax.data import negatives, split
from aif_jax.data import order as order_module
from aif_jax.data.events import EventLog
from aif_jax.data.negatives import item_counts
from aif_jax.data.order import EpochOrder
from aif_jax.data.split import sample_positions
from aif_jax.encoding.times import FLOOR, LATEST
from tests.test_sampling import dataset


def whole(positions, **given_) -> np.ndarray:
    return EpochOrder(positions, **given_).take(0, len(positions))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(0, 700),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    block=st.integers(0, 40),
    window=st.integers(1, 9),
    small=st.sampled_from([2, 1 << 12]),
)
def test_every_index_once_and_any_part_is_part_of_the_whole(monkeypatch, size, seed, epoch, block, window, small):
    monkeypatch.setattr(order_module, "SMALL", small)
    order = EpochOrder(range(size), seed=seed, epoch=epoch, block=block, window=window)
    all_ = order.take(0, size + 5)
    assert sorted(all_.tolist()) == list(range(size))
    for start, stop in ((0, size // 3), (size // 3, size // 2), (size // 2, size), (size, size + 9)):
        np.testing.assert_array_equal(order.take(start, stop), all_[start:stop])


def test_a_large_range_is_permuted_without_a_list_of_it():
    size = 10**12
    order = EpochOrder(range(size), seed=0, epoch=0)
    taken = order.take(size - 100_000, size)
    assert len(np.unique(taken)) == 100_000 and taken.min() >= 0 and taken.max() < size
    shares = np.histogram(taken, bins=10, range=(0, size))[0] / len(taken)
    assert np.all(np.abs(shares - 0.1) < 5 * np.sqrt(0.09 / len(taken)))
    assert abs(np.corrcoef(taken[1:], taken[:-1])[0, 1]) < 5 / np.sqrt(len(taken))


@pytest.mark.parametrize("size, block, runs", [(5, 0, 2000), (12, 2, 1000), (5000, 0, 2000)])
def test_every_index_is_as_likely_in_every_place(size, block, runs):
    """The first place, and of large orders the tenth of the range that it points into."""
    bins = min(size, 10 if size > 12 else size)
    first = np.array([EpochOrder(range(size), seed=seed, epoch=0, block=block, window=3).take(2, 3)[0] for seed in range(runs)])
    shares = np.bincount(first * bins // size, minlength=bins) / runs
    assert np.all(np.abs(shares - 1 / bins) < 5 * np.sqrt((1 / bins) * (1 - 1 / bins) / runs)), shares


def test_neighbours_of_a_computed_order_are_independent():
    """Of two neighbouring places, which tenths of the range do they point into? A chi-square test of all pairs."""
    size = 200_000
    tenth = EpochOrder(range(size), seed=3, epoch=1).take(0, size) * 10 // size
    pairs = np.bincount(tenth[1:] * 10 + tenth[:-1], minlength=100)
    expected = (size - 1) / 100
    assert np.sum((pairs - expected) ** 2) / expected < 99 + 5 * np.sqrt(2 * 99)


def test_a_block_order_reads_from_few_places_at_a_time():
    order = EpochOrder(range(100_000), seed=0, epoch=0, block=100, window=8)
    for start in range(0, 100_000, 800):
        blocks = np.unique(order.take(start, start + 800) // 100)
        assert len(blocks) <= 8 * 2 + 1  # borders of blocks are shifted, so that one of them covers two of these
    assert len(np.unique(order.take(0, 800) // 10_000)) > 4  # the blocks come from all over the range


def ties(seed: int, size: int = 300) -> EventLog:
    rng = np.random.default_rng(seed)
    return EventLog(
        rng.integers(1, 9, size), rng.integers(0, 4, size), rng.integers(0, 4, size), rng.integers(0, 15, size), users=12
    )


@pytest.mark.parametrize("block", [8, 60, 1 << 22])  # users and ties that cross the borders of blocks
@pytest.mark.parametrize("min_history", [0, 1, 5])
def test_positions_of_a_span_equal_a_plain_selection(monkeypatch, tmp_path, block, min_history):
    monkeypatch.setattr(split, "BLOCK", block)
    for seed in range(5):
        log = ties(seed)
        parts = split.split_by_time(log, validation=0.2, test=0.2, min_history=min_history)
        earlier = [int(((log.user == user) & (log.time < time)).sum()) for user, time in zip(log.user, log.time, strict=True)]
        able = (np.array(earlier) >= min_history) & (log.item > 0)
        _, first, second = split.time_cuts(log.time[log.item > 0], validation=0.2, test=0.2)
        spans = ({"before": first}, {"since": first, "before": second}, {"since": second})
        for number, (part, span) in enumerate(zip(parts, spans, strict=True)):
            inside = (log.time >= span.get("since", 0)) & (log.time < span.get("before", 99))
            plain = np.flatnonzero(able & inside)
            np.testing.assert_array_equal(part, plain)
            np.testing.assert_array_equal(sample_positions(log, min_history=min_history, **span), plain)
            file = tmp_path / f"{seed}-{number}.npy"
            mapped = sample_positions(log, min_history=min_history, **span, file=file)
            assert isinstance(mapped, np.memmap) and mapped.dtype == np.int64 and not mapped.flags.writeable
            np.testing.assert_array_equal(np.load(file), plain)


def test_no_position_is_none_in_a_file_too_which_must_be_new(tmp_path):
    log = ties(0)
    assert sample_positions(log, min_history=0, since=99).tolist() == []
    assert sample_positions(log, min_history=0, since=99, file=tmp_path / "none.npy").tolist() == []
    assert sample_positions(EventLog([], [], [], []), min_history=0).tolist() == []
    (tmp_path / "there.npy").write_text("mine")
    with pytest.raises(FileExistsError, match="there.npy: expected a new file"):
        sample_positions(ties(0), min_history=0, file=tmp_path / "there.npy")
    assert (tmp_path / "there.npy").read_text() == "mine"


@settings(max_examples=40, deadline=None)
@given(times=st.lists(st.integers(FLOOR, LATEST) | st.integers(0, 9), min_size=1, max_size=60), data=st.data())
def test_a_time_found_by_rank_equals_sorting(times, data):
    rank = data.draw(st.integers(0, len(times) - 1))
    assert split._time_of_rank(np.array(times), rank) == sorted(times)[rank]


@pytest.mark.parametrize("block", [0, 10])
@pytest.mark.parametrize("positions", [range(50), range(5, 105, 2), np.arange(1, 200, 4), [5, 9, 2] * 5 + [7] * 35])
def test_an_epoch_of_any_positions_holds_each_once_in_parts_that_fit(positions, block):
    given_ = dict(seed=1, epoch=2, block=block, window=3)
    all_ = whole(positions, **given_)
    assert all_.dtype == np.int64 and sorted(all_.tolist()) == sorted(np.asarray(positions).tolist()) != all_.tolist()
    take = EpochOrder(positions, **given_).take
    np.testing.assert_array_equal(np.concatenate([take(0, 8), take(8, 40), take(40, 99)]), all_)


def test_the_order_depends_on_seed_and_epoch_and_leaves_the_positions_alone():
    positions = np.arange(200)
    for given_ in (positions, range(200)):
        one, again, *others = (whole(given_, seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0)))
        np.testing.assert_array_equal(one, again)
        assert one.tolist() != list(range(200)) == positions.tolist() and not np.array_equal(*others)
        assert all(np.mean(one == other) < 0.2 for other in others)
    assert EpochOrder([], seed=0, epoch=0).take(0, 5).tolist() == []


@pytest.mark.parametrize("block", [2, negatives.BLOCK])
@pytest.mark.parametrize("positions", [range(0, 6, 2), np.array([0, 2, 4]), [0, 2, 4]])
def test_counts_are_of_training_events_alone(monkeypatch, positions, block):
    monkeypatch.setattr(negatives, "BLOCK", block)
    assert item_counts(dataset(), positions).tolist() == [0, 1, 0, 1, 1, 0, 0]
