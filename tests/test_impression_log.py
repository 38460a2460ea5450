"""An impression log: what was shown, what was clicked, and histories from another file, which have no times."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.blocks import MatchingStatistics
from aif_jax.blocks.matching import STATISTICS
from aif_jax.data.negatives import SeenPairs, counts_before
from aif_jax.encoding.encoder import Encoder
from aif_jax.train.tasks import Impressions, NextItem, task_of
from tests import demo
from tests.refusals import refused

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
    found = data.request_features(data.users.encode([user]), [START + 60 * minute], length=length).history
    return list(zip(*(part[found.mask].tolist() for part in (found.item, found.action, found.age / 60)), strict=True))


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


def test_histories_of_all_events_count_what_a_user_was_shown_and_clicked_of_each_field():
    data, block = data_of(COLUMNS), MatchingStatistics(("category",))
    model = aif.build(aif.Config(schema=data.schema, width=4, towers=(4,), long_length=16, short_length=4, blocks=(block,)))
    at = np.flatnonzero((data.log.time == START + 60 * 4) & (data.log.user == data.users.encode([1])[0]))[:1]
    user = jax.tree.map(lambda leaf: leaf[0], data.user_features(at, length=16))
    (met,) = model.user(model.init(jax.random.key(0), data.catalogue), user).blocks[block.name]
    counts = np.expm1(np.asarray(met.statistics)[:, STATISTICS:]).round().astype(int)
    category = data.catalogue.items.ids["category"][data.items.encode([1, 3, 5, 7])]
    assert counts[category, 1:].tolist() == [[1, 1, 1], [2, 0, 0], [2, 0, 0], [0, 0, 0]]  # the request's own do not count


@pytest.mark.parametrize("length", [1, 2, 8])
def test_the_encoder_leaves_out_what_training_left_out(length):
    data = data_of(ENGAGED)
    assert data_of(COLUMNS).encoder.version != data.encoder.version and "history_actions" not in COLUMNS.to_json()
    encoder = Encoder.from_record(data.encoder.to_record(), data.encoder.to_arrays()).with_length(length)  # of a saved model
    assert encoder.columns.history_actions == ("click", "buy") and encoder.version == data.encoder.version
    other = rows((1, 1, "1 click, 2 shown"), (1, 2, "3 shown, 4 other"))
    assert encoder.user(None, other, START + 600).history.item.sum() == 1
    for user, minute in ((1, 4), (1, 9), (2, 6), (2, 9)):
        own = {name: [v for v, u in zip(TABLE[name], TABLE["user"], strict=True) if u == user] for name in TABLE}
        online = encoder.user(None, own, START + 60 * minute).history
        offline = data.request_features(data.users.encode([user]), [START + 60 * minute], length=length).history
        for name in ("item", "action", "age", "mask"):
            np.testing.assert_array_equal(getattr(online, name), getattr(offline, name)[0], err_msg=name)


def test_positives_of_next_item_are_what_the_user_engaged_with():
    data = data_of(ENGAGED)
    positions = NextItem().positions(data, min_history=1, since=None, before=None)
    assert [(data.users.raw[data.log.user[at] - 1], int(data.log.item[at])) for at in positions] == [(1, 1), (1, 8), (2, 1)]
    assert counts_before(data, START + 60 * 5).tolist() == [0, 2, 1, 0, 0, 0, 0, 0, 1]
    assert data.repeated == pytest.approx(1 / 5)
    last = np.flatnonzero(data.log.time == START + 60 * 4)[:1]
    assert SeenPairs(data, last).items(0).tolist() == [1]
    refused(ValueError, f"at position {last[0]}", NextItem().source(data, before=2**40), last, aif.data.BatchKey(0, 0, 0))


def test_a_request_counts_the_history_that_it_has():
    data = data_of(ENGAGED)
    for least, minutes in enumerate(([1, 2, 3, 4, 2, 5, 6], [2, 3, 4, 5, 6], [4])):
        positions = TASK.positions(data, min_history=least, since=None, before=None)
        assert ((data.log.time[positions] - START) // 60).tolist() == minutes


def test_history_actions_that_no_event_has_are_refused():
    columns, ratings = aif.Columns(action="what", history_actions=("2", "clik")), [1 + (w != "shown") for w in TABLE["what"]]
    assert [p.got for p in aif.check(TABLE, items=ITEMS, columns=columns).problems] == ["['buy', 'click', 'shown']"] * 2
    message = r"'what': missing action: expected 'clik' among its values, as Columns.history_actions says, got \['1', '2'\]$"
    refused(ValueError, message, data_of, columns, TABLE | {"what": ratings})
    engaged = data_of(dataclasses.replace(columns, history_actions=("2",)), TABLE | {"what": ratings})
    assert len(engaged.history_log) == sum(w != "shown" for w in TABLE["what"])


TASK = Impressions(candidates=3, threshold=2)
SMALL: dict[str, Any] = dict(batch_size=2, epochs=1, validation=0.2, test=0.2, k=None, keep_best=None, progress=False)


def model_of(data: aif.Dataset) -> aif.PreRanker:
    return aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False, short_length=4))


def test_several_actions_must_name_their_positives_or_the_task():
    data = data_of(COLUMNS)
    message = (
        r"task: expected a task, or positives by Columns.history_actions, for events of several actions, got none for 10 "
        r"'shown', 4 'click', 1 'buy'; give task=Impressions\(.*\) to rank what was shown, or Columns\(history_actions=\("
    )
    refused(ValueError, message, demo.fit, model_of(data), data, **SMALL)
    assert task_of(data_of(ENGAGED), None) == NextItem()
    assert task_of(data, TASK) is TASK and task_of(data, NextItem()) == NextItem()
    assert task_of(data_of(COLUMNS, rows((1, 1, "1 click, 2 click"), (1, 2, "3 click"))), None) == NextItem()


HISTORY = rows((3, -9, "1 click"), (3, -8, "2 click, 4 buy"), (3, -7, "5 click"), (4, -9, "6 click"))
"""Of user 3, who has impressions later on, and of user 4, who has none."""


def test_histories_without_times_are_no_lists():
    later = rows((3, 3, "1 shown, 7 click"), (3, 4, "8 click"))
    data = data_of(ENGAGED, {name: [*HISTORY[name], *later[name], *TABLE[name]] for name in TABLE})
    starts = TASK.positions(data, min_history=0, since=None, before=None)
    minutes, users = (data.log.time[starts] - START) // 60, data.users.raw[data.log.user[starts] - 1]
    assert {user: minutes[users == user].tolist() for user in (1, 3, 4)} == {1: [1, 2, 3, 4], 3: [3, 4], 4: []}
    found = data.user_features([starts[data.log.user[starts] == data.users.encode([3])[0]][0]], length=8).history
    assert found.item[found.mask].tolist() == [5, 4, 2, 1]  # they are history all the same


@pytest.mark.parametrize(("columns", "task", "message"), [
    (COLUMNS, Impressions(candidates=3, threshold=1), r"threshold: expected an action row in \[2, 4\): 1 is 'shown'"),
    (
        dataclasses.replace(COLUMNS, actions=("no", "shown", "click", "buy")), TASK,
        r"threshold: expected positives and negatives among the events, got 100% positives for 2; events by least action "
        r"row: 1 \('no'\): 100.0%, 2 \('shown'\): 100.0%, 3 \('click'\): 33.3%, 4 \('buy'\): 6.7%; take one that",
    ),
    (
        dataclasses.replace(COLUMNS, actions=("shown", "click", "buy", "gift")), Impressions(candidates=3, threshold=4),
        r"threshold: expected positives and negatives among the events, got 0% positives for 4",
    ),
    (
        dataclasses.replace(COLUMNS, actions=()), TASK,
        r"threshold: expected Columns.actions in ascending order of what they mean, such as \('shown', 'click'\), for a "
        r"threshold, got none, which leaves them in alphabetical order: 1 is 'buy', 2 is 'click', 3 is 'shown'",
    ),
])  # fmt: skip
def test_a_threshold_that_makes_one_label_of_all_is_refused(columns, task, message):
    data = data_of(columns)
    refused(ValueError, message, demo.fit, model_of(data), data, task=task, **SMALL)


TWO = ("click", "like")


@pytest.mark.parametrize(("objectives", "task", "message"), [
    (TWO, Impressions(candidates=2, threshold={"clik": 2, "like": 2}),
     r"labels: expected one for each objective of the model \['click', 'like'\], by name, got \['clik', 'like'\]"),
    (TWO, TASK, r"labels: expected one for each .* \['click', 'like'\], by name, got one array; take a task or source"),
    (TWO, NextItem(), r"labels: expected one for each objective of the model \['click', 'like'\], by name, got one array"),
    ((), Impressions(candidates=2, threshold={"click": 2}), r"Config.objectives: expected names of the objectives"),
    (("click",), Impressions(candidates=2, threshold={"click": "clik"}),
     r"threshold\['click'\]: expected an action row in \[2, 4\): 1 is 'shown', 2 is 'click', 3 is 'buy', got 'clik'"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused_with_the_names_that_there_are(objectives, task, message):
    data = data_of(COLUMNS)
    model = aif.build(model_of(data).config.replace(head=aif.heads.Mlp((4,)), objectives=objectives))
    refused(ValueError, message, demo.fit, model, data, task=task, **SMALL)
