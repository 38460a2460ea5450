"""Users nearline: what an event costs, what a request costs with it, how large a user is, and how exact the scores are.

Claim     The user side of a request with up to 16 new events takes at most a quarter of the CPU of a whole history of 4,096,
          and the same for any length of the history; an event takes less than 50 microseconds in batches of 256 users; a user
          fits in 8 KiB; scores are those of the whole history.
Command   python -m experiments.user_state --data DIR --json user_state.json      (or --smoke; --help lists all)
Time      8 minutes on 2 CPU cores, 4 of them training
Data      DIR holds movielens-small-merged/; without --data the synthetic world of the study.
Model     `presets.streaming`, trained for one epoch with L=512; whole histories are those of `presets.aif`, which would be
          served without a table, with weights as initialised. Histories are drawn at random over eight years; rows and
          histories of the same users.
Method    Interleaved round by round in one process, a length at a time, compilation left out. CPU of the user side:
          `time.process_time` of checking, packing, upload and user function, as the engine runs them, from features in host
          memory as a store delivers them: a whole encoded history, or a row of the table and the encoded events since. Updates:
          `UserProgram` on rows in host memory. Exactness: the last event of users against 99 items that others met, states made
          event by event in each storage, against those of the whole history, whose ages are float32; AUC within each list.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import Dataset, Events, Streamed, UserFeatures, UserTable
from aif_jax.encoding.times import stamps
from aif_jax.features import SINCE, behaviours, no_events, pack
from aif_jax.output import track
from aif_jax.serving.programs import HistoryLayout, Programs
from aif_jax.store.codec import STORAGES, Packed
from aif_jax.user_table.rows import UserProgram
from experiments import common, plots
from experiments.study import datasets

NEW = SINCE[0]
YEARS = 8 * 365 * 86400
NOW = 1_700_000_000


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs the study and prints its figures."""
    settings = {
        "rounds": (60, 3, "rounds of every time"),
        "users": (400, 10, "users whose scores are compared"),
        "lengths": ([64, 512, 4096, 32768], [16, 64], "lengths of histories"),
        "storages": (list(STORAGES), ["float32", "int8"], "storage of rows"),
    }
    data = "folder that holds movielens-small-merged/"
    options = common.options(__doc__, arguments, settings, data=data, figures="folder for the picture")
    name = "smoke" if options.smoke else "synthetic" if options.data is None else "movielens"
    loaded = datasets.load(name, options.data)
    data, small = loaded.dataset, dict(width=16, towers=(16,), head=(16,)) if options.smoke else {}
    config = aif.presets.streaming(data.schema, **small)
    run = aif.fit(aif.build(config), data, batch_size=256, requests=500, k=None)
    print(f"{name}: {run}")
    figures = requests(run.model, run.params, options) | updates(run.model, run.params, options)
    figures |= encoding(run, data, options) | rebuild(run, data, options) | exactness(run, data, options)
    if options.figures:
        plots.draw_user_state(figures, options.figures / "user_state.png")
    common.report(figures, options.json)


def requests(model: aif.PreRanker, params: Any, options) -> dict[str, Any]:
    """CPU and bytes of the user side, by length of the history: whole, and streamed with 16 new events."""
    schema, params = model.config.schema, jax.device_put(params)
    rng, users, cpu = np.random.default_rng(0), 16, {}
    widths: dict[str, Any] = {name: getattr(model.config, name) for name in ("width", "towers", "head")}
    streamed = Programs(model, max_k=8, bid="bid", user_storage="float32")
    program = UserProgram(model, params, storage="float32", batch_size=users)
    sizes: dict[str, dict[int, int]] = {"whole": {}, "streamed": {}}
    for length in options.lengths:
        windowed = aif.build(aif.presets.aif(schema, long_length=length, **widths))
        drawn_params = windowed.init(jax.random.key(0), None, fitted=params["fitted"])
        whole = Programs(windowed, max_k=8, bid="bid")
        logs = [drawn(schema, length, rng) for _ in range(users)]
        given = {"whole": [], "streamed": []}
        for events in logs:
            given["whole"].append(whole_history(schema, events))
            before, since = part(events, slice(0, -NEW)), part(events, slice(-NEW, None))
            words = program(np.zeros((1, len(program.empty)), np.uint32), before, np.array([len(before.time)])).words[0]
            history = Streamed(memory=Packed(words=words, layout=program.layout), since=since, now=stamps(NOW)[()])
            given["streamed"].append(dataclasses.replace(given["whole"][-1], history=history))
        work: dict[str, Any] = {}
        ways = (("whole", whole, drawn_params, HistoryLayout(length)), ("streamed", streamed, params, HistoryLayout(NEW, True)))
        for way, programs, weights, layout in ways:
            work[way] = side(programs, programs.user(weights, layout), given[way])
            sizes[way][length] = pack(given[way][0]).nbytes
        spent = common.medians(work, options.rounds, clock=time.process_time)
        cpu |= {f"{way}_{length}": median / users for way, median in spent.items()}
    longest = 4096 if 4096 in options.lengths else max(options.lengths)
    full, short = cpu[f"whole_{longest}"], cpu[f"streamed_{longest}"]
    return {
        "request_cpu_ms": cpu,
        f"request_cpu_ms_full_{longest}": full,
        "request_cpu_ms_streamed": short,
        "request_cpu_share": short / full,
        "feature_bytes_full": sizes["whole"][longest],
        "feature_bytes_streamed": sizes["streamed"][longest],
        "lengths": list(options.lengths),
    }


def side(programs: Programs, compiled: Any, features: list[UserFeatures]):
    """The user side of some requests, as the engine runs it, once run."""

    def work() -> None:
        for one in features:
            words = pack(programs.plain(one, version="", encoding=""))
            jax.block_until_ready(compiled(programs.upload_features([words])))

    work()
    return work


def updates(model: aif.PreRanker, params: Any, options) -> dict[str, Any]:
    """Microseconds an event, of wall time: one user and one event, and batches of users with one event and with 16."""
    schema, rng = model.config.schema, np.random.default_rng(1)
    work, counts = {}, {}
    batch = 16 if options.smoke else 256
    for storage in ("float32", "int8"):
        program = UserProgram(model, params, storage=storage, batch_size=batch)
        for users, each in ((1, 1), (batch, 1), (batch, NEW)):
            history = drawn(schema, 200 * users, rng)
            words = program(np.zeros((users, len(program.empty)), np.uint32), history, np.full(users, 200)).words
            new, name = drawn(schema, each * users, rng), f"{storage}, {users} users, {each} events each"
            work[name] = partial(program, words, new, np.full(users, each))
            work[name]()
            counts[name] = users * each
    spent = common.medians(work, options.rounds - 1, warm=1)
    each_event = {name: median * 1e3 / counts[name] for name, median in spent.items()}
    single, batched = (each_event[f"float32, {users} users, 1 events each"] for users in (1, batch))
    return {"update_us_per_event": {"single": single, "batched": batched}, "update_us": each_event}


def encoding(run: aif.Run, data: Dataset, options) -> dict[str, Any]:
    """CPU of making features from raw events: a whole history, or the row of a table and 16 new events."""
    length, rng = max(options.lengths) if options.smoke else 4096, np.random.default_rng(3)
    columns, made, table = data.encoder.columns, data.encoder.with_length(length), UserTable(run.trained)
    user = np.asarray(data.users.raw)[0].item()
    names = [columns.item, columns.time, *([] if columns.action is None else [columns.action])]
    unit = 1000 if columns.time_unit == "ms" else 1

    def raw(count: int, until: int) -> dict[str, np.ndarray]:
        at = rng.integers(0, len(data.log), count)
        item = np.asarray(data.items.raw)[np.maximum(data.log.item[at], 1) - 1]
        action = np.asarray(columns.actions or range(1, data.schema.actions))[np.maximum(data.log.action[at], 1) - 1]
        time_ = np.sort(rng.integers(until - 10**7, until, count)) * unit
        values = {columns.item: item, columns.time: time_, columns.action: action}
        return {name: values[name] for name in names}

    old, new = raw(length, NOW - 100), raw(NEW, NOW - 1)
    table.update(old | {columns.user: np.repeat(user, length)})

    ways = {
        "encode_cpu_ms_full": lambda: [made.user(None, old, NOW * unit) for _ in range(16)],
        "encode_cpu_ms_streamed": lambda: [table.features(user, now=NOW * unit, events=new) for _ in range(16)],
    }
    spent = common.medians(ways, options.rounds, warm=1, clock=time.process_time)
    return {name: median / 16 for name, median in spent.items()}


def rebuild(run: aif.Run, data: Dataset, options) -> dict[str, Any]:
    """Events a second of a table built from the log, and bytes of a row by storage."""
    rates, sizes = {}, {}
    for storage in options.storages:
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            table = UserTable.build(run.trained, data, storage=storage, progress=False)
            rates[storage] = len(data.log) / (time.perf_counter() - start)
        sizes[storage] = table.row_bytes
    return {"rebuild_events_per_s": rates["float32"], "rebuild_by_storage": rates, "state_bytes": sizes}


def exactness(run: aif.Run, data: Dataset, options) -> dict[str, Any]:
    """Scores of states made event by event, in each storage, against those of the whole history.

    Of users with at most `long_length` events: of longer histories matching statistics read the last events alone, both ways.
    """
    model, params, log = run.model, run.params, data.log
    rng, events = np.random.default_rng(2), np.diff(log.offsets)
    long = np.flatnonzero((events > min(50, model.config.long_length // 2)) & (events <= model.config.long_length))
    users = rng.permutation(long)[: options.users]
    last = log.offsets[users + 1] - 1
    lists = np.concatenate([log.item[last][:, None], log.item[rng.integers(0, len(log), (len(users), 99))]], 1)
    ends = log.history_end(last)
    whole = aif.build(model.config.replace(long_length=int((ends - log.offsets[users]).max())))
    full = jax.jit(jax.vmap(whole.joint, (None, 0, 0)))
    expected = []
    for some in np.array_split(np.arange(len(users)), -(-len(users) // 16)):
        features = data.user_features(last[some], length=whole.config.history_length)
        expected.append(np.asarray(full(params, features, data.catalogue.features(lists[some]))))
    expected = np.concatenate(expected)
    worst, auc, found = {}, {"whole": list_auc(expected)}, {}
    for storage in options.storages:
        program = UserProgram(model, params, storage=storage, batch_size=64)
        for each in (1, NEW):
            got = streamed_scores(program, data, users, ends, last, lists, each=each)
            name = f"{storage}, {each} at a time"
            found[name] = got
            worst[name], auc[name] = float(np.abs(got - expected).max()), list_auc(got)
    split = float(np.abs(found["float32, 1 at a time"] - found[f"float32, {NEW} at a time"]).max())
    figures = {"max_abs_streamed_minus_full": worst["float32, 1 at a time"], "max_abs_by_split": split}
    return figures | {"max_abs_by_storage": worst, "list_auc": auc, "deviation_of_scores": float(expected.std())}


def streamed_scores(
    program: UserProgram, data: Dataset, users: np.ndarray, ends: np.ndarray, last: np.ndarray, lists: np.ndarray, *, each: int
) -> np.ndarray:
    """Scores [U, 100] of rows to which events were applied `each` at a time, stored in between."""
    log, starts = data.log, data.log.offsets[users]
    words = np.zeros((len(users), len(program.empty)), np.uint32)
    at_once = f"{program.storage}, {each} at a time"
    for step in track(range(0, int((ends - starts).max()), each), label=at_once, unit="steps", leave=False):
        counts = np.clip(ends - starts - step, 0, each)
        at = np.flatnonzero(counts)
        index = np.concatenate([np.arange(starts[i] + step, starts[i] + step + counts[i]) for i in at])
        events = Events(item=log.item[index], action=log.action[index], time=stamps(log.time[index]))
        words[at] = program(words[at], events, counts[at]).words

    def score(words, features, now, items):
        memory = Packed(words=words, layout=program.layout).widened()
        history = Streamed(memory=memory, since=no_events(1), now=now)
        features = dataclasses.replace(features, history=history)
        return program.model.joint(program.params, features, items)

    scores = jax.jit(jax.vmap(score))
    profiles, now = data.user_features(last, length=1), stamps(log.time[last])
    found = []
    for some in np.array_split(np.arange(len(users)), -(-len(users) // 16)):
        one = jax.tree.map(lambda leaf, some=some: leaf[some], profiles)
        found.append(np.asarray(scores(words[some], one, now[some], data.catalogue.features(lists[some]))))
    return np.concatenate(found)


def list_auc(scores: np.ndarray) -> float:
    """The share of a list's other items that score below the first, mean over lists."""
    below = (scores[:, 1:] < scores[:, :1]) + 0.5 * (scores[:, 1:] == scores[:, :1])
    return float(below.mean())


def drawn(schema: aif.Schema, count: int, rng: np.random.Generator) -> Events:
    """Events drawn at random over eight years, the oldest first."""
    time = np.sort(NOW - 1 - (YEARS * rng.random(count) ** 2).astype(np.int64))
    item = rng.integers(1, schema.item_attribute("item").size, count, dtype=np.int32)
    return Events(item=item, action=rng.integers(0, schema.actions, count, dtype=np.int32), time=stamps(time))


def whole_history(schema: aif.Schema, events: Events) -> UserFeatures:
    """The same events as a history."""
    age = (stamps(NOW) - events.time[::-1]).astype(np.float32)
    item, action = (np.asarray(column)[::-1] for column in (events.item, events.action))
    history = behaviours(item, action, age, np.ones(len(age), bool))
    return dataclasses.replace(aif.empty_user(schema, length=len(age)), history=history)


def part(events: Events, at: slice) -> Events:
    """Some of the events."""
    return jax.tree.map(lambda leaf: leaf[at], events)


if __name__ == "__main__":
    main()
