"""An impression log: what was shown, what was clicked, and histories from another file, which have no times."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.data.candidates import SeenPairs, counts_before
from aif_jax.encoding.encoder import Encoder
from aif_jax.train.tasks import Impressions, NextItem

START = 1_700_000_000
ITEMS = {"item": list(range(1, 9)), "category": [1, 1, 2, 2, 3, 3, 4, 4]}
COLUMNS = aif.Columns(action="what", actions=("shown", "click", "buy"))
ENGAGED = dataclasses.replace(COLUMNS, history_actions=("click", "buy"))


def rows(*requests: tuple[int, int, str]) -> dict[str, list]:
    """A table of events from (user, minute, "item action, item action, ...")."""
    table: dict[str, list] = {"user": [], "item": [], "time": [], "what": []}
    for user, minute, events in requests:
        for event in events.split(", "):
            item, what = event.split()
            for name, value in zip(table, (user, int(item), START + 60 * minute, what), strict=True):
                table[name].append(value)
    return table


TABLE = rows(
    (1, 1, "1 click, 2 shown, 3 shown"), (1, 2, "4 shown, 5 shown"), (1, 3, "6 shown, 1 buy"), (1, 4, "7 shown, 8 click"),
    (2, 2, "3 shown, 2 click"), (2, 5, "5 shown, 6 shown"), (2, 6, "1 click, 4 shown"),
)  # fmt: skip


def data_of(columns: aif.Columns, table: dict[str, list] | None = None, **more: Any) -> aif.Dataset:
    return aif.read(table or TABLE, items=ITEMS, columns=columns, progress=False, **more)


def history(data: aif.Dataset, user: int, minute: int, length: int = 8) -> list[tuple[int, int, float]]:
    """Items, actions and minutes ago of a history, most recent first, from the log."""
    features = data.request_features(data.users.encode([user]), [START + 60 * minute], length=length)
    found = features.history
    parts = (part[found.mask].tolist() for part in (found.item, found.action, found.age / 60))
    return list(zip(*parts, strict=True))


def test_histories_hold_what_the_user_engaged_with():
    every, engaged = data_of(COLUMNS), data_of(ENGAGED)
    assert len(history(every, 1, 4)) == 7
    assert history(engaged, 1, 4) == [(1, 3, 1.0), (1, 2, 3.0)]
    assert history(engaged, 2, 6) == [(2, 2, 4.0)]
    positions = np.flatnonzero(engaged.log.time == START + 60 * 4)
    assert engaged.history_lengths(positions).tolist() == [2, 2]
    assert every.history_lengths(positions).tolist() == [7, 7]
    found = engaged.user_features(positions, length=4).history
    assert found.item[:, :2].tolist() == [[1, 1], [1, 1]] and found.mask.sum(1).tolist() == [2, 2]
    assert len(engaged.log) == len(TABLE["item"])  # the lists that were shown stay whole


@pytest.mark.parametrize("length", [1, 2, 8])
def test_the_encoder_leaves_out_what_training_left_out(length):
    data = data_of(ENGAGED)
    encoder = dataclasses.replace(data.encoder, length=length)
    for user, minute in ((1, 4), (1, 9), (2, 6), (2, 9)):
        own = {name: [v for v, u in zip(TABLE[name], TABLE["user"], strict=True) if u == user] for name in TABLE}
        online = encoder.user(None, own, START + 60 * minute).history
        offline = data.request_features(data.users.encode([user]), [START + 60 * minute], length=length).history
        for name in ("item", "action", "age", "mask"):
            np.testing.assert_array_equal(getattr(online, name), getattr(offline, name)[0], err_msg=name)


def test_the_encoder_of_a_saved_model_does_too():
    encoder = data_of(ENGAGED).encoder
    assert encoder is not None
    again = Encoder.from_record(encoder.to_record(), encoder.to_arrays())
    assert again.columns.history_actions == ("click", "buy") and again.version == encoder.version
    events = rows((1, 1, "1 click, 2 shown"), (1, 2, "3 shown, 4 other"))
    assert again.user(None, events, START + 600).history.item[:2].tolist() == [1, 0]
    assert data_of(COLUMNS).encoder.version != encoder.version  # type: ignore[union-attr]
    assert "history_actions" not in COLUMNS.to_json()


def test_positives_of_next_item_are_what_the_user_engaged_with():
    data = data_of(ENGAGED)
    positions = NextItem().positions(data, min_history=1, since=None, before=None)
    assert [(data.users.raw[data.log.user[at] - 1], int(data.log.item[at])) for at in positions] == [(1, 1), (1, 8), (2, 1)]
    assert counts_before(data, START + 60 * 5).tolist() == [0, 2, 1, 0, 0, 0, 0, 0, 1]
    assert data.repeated == pytest.approx(1 / 5)
    last = np.flatnonzero(data.log.time == START + 60 * 4)[:1]
    assert SeenPairs(data, last).items(0).tolist() == [1]


def test_a_request_counts_the_history_that_it_has():
    data = data_of(ENGAGED)
    task = Impressions(candidates=3, threshold=2)
    minutes = {
        least: ((data.log.time[task.positions(data, min_history=least, since=None, before=None)] - START) // 60).tolist()
        for least in (0, 1, 2)
    }
    assert minutes == {0: [1, 2, 3, 4, 2, 5, 6], 1: [2, 3, 4, 5, 6], 2: [4]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(action=None, actions=()), r"Columns.history_actions: expected a column for them in Columns.action, got None"),
        (dict(actions=("shown", "buy")), r"Columns.history_actions: expected actions among Columns.actions \('shown', 'buy'\)"),
    ],
)
def test_history_actions_are_actions(given, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ENGAGED, **given)


def test_history_actions_that_no_event_has_are_refused():
    columns = dataclasses.replace(ENGAGED, actions=(), history_actions=("clik",))
    with pytest.raises(
        ValueError, match=r"Columns.history_actions: expected actions that the events have, \['buy', 'click', 's"
    ):
        data_of(columns)
