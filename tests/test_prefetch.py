"""Prefetched items: the same items in the same order, errors where they belong, no thread left behind, not too many ahead."""

import threading
import time

import pytest

from aif_jax.data.pipeline import prefetch
from tests.refusals import refused
from tests.service_world import until


def threads() -> int:
    return sum(thread.name.startswith("aif_jax.prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_items_come_in_order_and_then_it_ends(ahead):
    with prefetch(range(20), ahead=ahead) as items:
        assert list(items) == list(range(20))
        assert list(items) == []
    assert threads() == 0


def test_work_is_done_in_another_thread():
    with prefetch(threading.current_thread().name for _ in range(1)) as names:
        (name,) = names
        assert name.startswith("aif_jax.prefetch") and name != threading.current_thread().name


def test_no_more_is_made_than_allowed():
    made = []
    with prefetch((made.append(i) or i for i in range(100)), ahead=3) as items:
        until(lambda: len(made) == 4)  # three wait, one is in the hand of the thread
        time.sleep(0.05)
        assert len(made) == 4
        assert next(items) == 0
        until(lambda: len(made) == 5)


def test_an_error_is_raised_where_its_item_would_have_come():
    def items():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    with prefetch(items(), ahead=5) as prefetched:
        assert [next(prefetched), next(prefetched)] == [1, 2]
        refused(OSError, "the disk is gone", next, prefetched)
        assert list(prefetched) == []
    assert threads() == 0


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_in_the_middle_stops_the_thread(taken):
    def endless():
        while True:
            yield 0

    with prefetch(endless(), ahead=2) as items:
        for _ in range(taken):
            next(items)
        assert threads() == 1
    assert threads() == 0
