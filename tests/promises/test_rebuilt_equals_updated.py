"""Promise: an index that was updated equals one rebuilt from the final catalogue, bit for bit."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax import Trained
from aif_jax.index import STORAGES, ItemIndex
from tests import demo

IDS = np.array([-(2**62), -1, 0, 1, 7, 2**40, 2**40 + 1, 2**62, 99, 100, 101, 102])
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("upsert"), st.lists(st.tuples(st.sampled_from(range(12)), st.integers(0, 199)), max_size=9)),
        st.tuples(st.just("delete"), st.lists(st.sampled_from(range(12)), max_size=4)),
        st.tuples(st.just("hold"), st.none()),
    ),
    max_size=12,
)


@pytest.fixture(scope="module", params=[*((storage, "integers") for storage in STORAGES), ("float32", "strings")], ids=" ".join)
def world(request):
    """(model, params, features of 200 states of items, raw ids of 12 items, options)."""
    storage, kind = request.param
    model, params = demo.build()
    ids = IDS if kind == "integers" else np.array([f"sku {i}" for i in IDS], np.dtypes.StringDType())
    return Trained(model, params).with_version("v"), demo.items(200), ids, dict(batch_size=8, storage=storage, progress=False)


@settings(max_examples=15, deadline=None)
@given(changes=CHANGES)
def test_any_sequence_of_updates_equals_a_rebuild(world, changes):
    trained, features, ids, options = world
    state = {i: i * 17 for i in range(5)}

    def build(state):
        rows = jax.tree.map(lambda leaf: leaf[np.array(list(state.values()), np.int64)], features)
        return ItemIndex.build(trained, [(ids[np.array(list(state), np.int64)], rows)], **options)

    index, held = build(state), []
    for kind, what in changes:
        if kind == "upsert":
            at = np.array([version for _, version in what], np.int64)
            index = index.upsert(ids[[i for i, _ in what]], jax.tree.map(lambda leaf, at=at: leaf[at], features))
            state |= dict(what)
        elif kind == "delete":
            index = index.delete(ids[what])
            state = {i: version for i, version in state.items() if i not in what}
        else:
            held.append((index, dict(state)))
    for snapshot, expected in [*held[-2:], (index, state)]:
        assert len(snapshot) == len(expected)
        assert demo.same(snapshot.stored(), build(expected).stored())
