"""Orders and position sets that are computed, not held: exactly once each, evenly mixed, equal to the plain way."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from aif_jax.data import negatives, order, split
from aif_jax.data.events import EventLog
from aif_jax.data.negatives import item_counts
from aif_jax.data.split import sample_positions
from aif_jax.encoding.times import FLOOR, LATEST
from tests.test_candidates import two_users


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 5), small=st.sampled_from([2, 1 << 12]))
def test_every_index_once_and_any_part_is_part_of_the_whole(monkeypatch, size, seed, epoch, small):
    monkeypatch.setattr(order, "SMALL", small)
    all_ = order.permuted(size, 0, size + 5, seed=seed, epoch=epoch)
    assert sorted(all_.tolist()) == list(range(size)) and all_.dtype == np.int64
    for start, stop in ((0, size // 3), (size // 3, size // 2), (size // 2, size), (size, size + 9)):
        np.testing.assert_array_equal(order.permuted(size, start, stop, seed=seed, epoch=epoch), all_[start:stop])


def test_a_large_range_is_permuted_without_a_list_of_it():
    size = 10**12
    taken = order.permuted(size, size - 100_000, size, seed=0, epoch=0)
    assert len(np.unique(taken)) == 100_000 and taken.min() >= 0 and taken.max() < size
    shares = np.histogram(taken, bins=10, range=(0, size))[0] / len(taken)
    assert np.all(np.abs(shares - 0.1) < 5 * np.sqrt(0.09 / len(taken)))
    assert abs(np.corrcoef(taken[1:], taken[:-1])[0, 1]) < 5 / np.sqrt(len(taken))


@pytest.mark.parametrize("size", [5, 5000])
def test_every_index_is_as_likely_in_every_place(size):
    """The first place, and of large orders the tenth of the range that it points into."""
    bins, runs = min(size, 10), 2000
    first = np.array([order.permuted(size, 2, 3, seed=seed, epoch=0)[0] for seed in range(runs)])
    shares = np.bincount(first * bins // size, minlength=bins) / runs
    assert np.all(np.abs(shares - 1 / bins) < 5 * np.sqrt((1 / bins) * (1 - 1 / bins) / runs)), shares


def test_neighbours_of_a_computed_order_are_independent():
    """Of two neighbouring places, which tenths of the range do they point into? A chi-square test of all pairs."""
    size = 200_000
    tenth = order.permuted(size, 0, size, seed=3, epoch=1) * 10 // size
    pairs = np.bincount(tenth[1:] * 10 + tenth[:-1], minlength=100)
    expected = (size - 1) / 100
    assert np.sum((pairs - expected) ** 2) / expected < 99 + 5 * np.sqrt(2 * 99)


def test_the_order_depends_on_seed_and_epoch():
    one, again, *others = (order.permuted(200, 0, 200, seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0)))
    np.testing.assert_array_equal(one, again)
    assert one.tolist() != list(range(200)) and not np.array_equal(*others)
    assert all(np.mean(one == other) < 0.2 for other in others)


def ties(seed: int, size: int = 300) -> EventLog:
    rng = np.random.default_rng(seed)
    return EventLog(*(rng.integers(low, high, size) for low, high in ((1, 9), (0, 4), (0, 4), (0, 15))), users=12)


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
            plain = np.flatnonzero(able & (log.time >= span.get("since", 0)) & (log.time < span.get("before", 99)))
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
    share = data.draw(st.floats(0.05, 0.95))
    try:
        cut = split.time_cuts(np.array(times), validation=0.0, test=share)[2]
    except ValueError:  # nothing is left to train on, or to test
        assume(False)
    assert cut == [*sorted(times), max(times) + 1][len(times) - round(len(times) * share)]


@pytest.mark.parametrize("block", [2, negatives.BLOCK])
@pytest.mark.parametrize("positions", [range(0, 6, 2), np.array([0, 2, 4]), [0, 2, 4]])
def test_counts_are_of_training_events_alone(monkeypatch, positions, block):
    monkeypatch.setattr(negatives, "BLOCK", block)
    assert item_counts(two_users(), positions).tolist() == [0, 1, 0, 1, 1, 0, 0]
