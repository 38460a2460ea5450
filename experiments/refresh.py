"""What refreshing a model is worth and costs, day by day, and whether the gate tells bad models from good ones.

Claim     A model that is trained on each day's events from yesterday's parameters ranks like one trained from scratch every day
          (within 0.2 GAUC points) at 15 % of its CPU time or less, and finds new items, which a model that is never refreshed
          cannot. Refreshed every hour by whole publishes it loses at most 0.2 GAUC points against a training from scratch every
          hour. The gate refuses at least 99 of 100 planted bad models and passes at least 95 of 100 good ones.
Command   python -m experiments.refresh --data DIR --json FILE      (or --smoke; --help lists all)
Time      about 55 minutes on one CPU core, most of it for the trainings from scratch within the last day (--hours 0: without)
Method    Three worlds by time: MovieLens (its last 120,000 ratings), Taobao (its excerpt of 9 days) and a synthetic shop whose
          users change and whose new items sell. All arms start from the model of the days before the first. Each day ends with
          a training: none ("never"), on all events so far ("scratch", two epochs), or one epoch on the day's events and a
          share (`--replay`) of earlier ones, from yesterday's parameters ("warm"). The next day's requests judge all three,
          new users and items among them: an item without an event before a model's training ended is the unknown row to it.
          Tables have rows for the items of all days, which HR@100 ranks, with each model's popularity correction. Pipeline,
          step and loss are those of `aif.fit`, at one learning rate. CPU seconds are of training, without compilation. One
          seed, intervals over users. Gate: on a day of the shop, good models are warm trainings that differ by seed, epochs
          and replay; bad ones have NaN in a parameter, wrong labels, items' rows exchanged, half of the day's events lost,
          uniform candidates, or new items unknown. Within the day: "hourly" trains every hour from the parameters of the hour
          before, as "warm" does; "hourly scratch" on all events so far, every hour of the last day. Events that fill no batch
          wait. Each answers the requests of its hour. Bytes published: arrays of an export.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import aif_jax as aif
from aif_jax import Dataset, Trained, metrics
from aif_jax.blocks import ItemOffset, popularity_offset, with_table
from aif_jax.data.candidates import CandidateLists, SourceFn, sampled_negatives
from aif_jax.data.negatives import NegativeSampler, counts_before
from aif_jax.data.order import BatchKey
from aif_jax.data.pipeline import Pipeline
from aif_jax.output import track
from aif_jax.refreshing import GateConfig, Requests, judge, measure, volume
from aif_jax.refreshing.warm import ROWS, map_ids
from aif_jax.train import NextItem, init_state, make_step
from aif_jax.train.evaluate import list_scores, rank_catalogue
from aif_jax.train.loop import loop
from aif_jax.types import Params
from experiments import common
from experiments.study import datasets
from experiments.study.models import SMOKE

DAY = 86_400
ARMS = ("never", "scratch", "warm")
WITHIN = ("hourly", "hourly scratch")
"""Arms that train within the day, the second on the last day alone."""
WORLDS = ("synthetic", "movielens", "taobao")
TASK = NextItem()
K = 100
OF_NEW = f"hr@{K} of new items"
KEYS = (
    "stale_loss_gauc_points", "warm_minus_scratch_gauc_points", "warm_cost_share", "new_item_hr100_gain",
    "hourly_minus_scratch_gauc_points", "hourly_cpu_seconds",
)  # fmt: skip
"""Figures by world, next to each world's own."""
BATCH = 128
REPLAY = 0.2
RATE = 2e-3


class World(NamedTuple):
    """Raw events and items by time."""

    name: str
    user: np.ndarray  # these three: int64 [n] events, in the order of time
    item: np.ndarray
    time: np.ndarray
    category: np.ndarray  # of item ids 0 to N - 1
    days: tuple[int, ...]  # moments; the first is where the start's training ends, each later one ends a day

    def read(self) -> Dataset:
        """Return all events and the items that they name."""
        ids = np.unique(self.item)
        events = {"user": self.user, "item": self.item, "time": self.time}
        items = {"item": ids, "category": self.category[ids]}
        return aif.read(events, items=items, columns=aif.Columns(), name=self.name, progress=False)


def of_dataset(name: str, folder: Path, *, events: int | None, start: float, days: int) -> World:
    """Return public data set, its last `events`; the start has the first share, and days are of as many events or true days."""
    data = datasets.load(name, folder).dataset
    order = np.argsort(data.log.time, kind="stable")[-(events or len(data.log)) :]
    times = data.log.time[order]
    first = int(len(times) * start)
    cuts = np.linspace(first, len(times) - 1, days + 2).astype(int)
    moments = tuple(int(times[cut]) for cut in cuts[:-1]) + (int(times[-1]) + 1,)
    user, item = np.asarray(data.log.user[order], np.int64), np.asarray(data.log.item[order], np.int64)
    category = np.asarray(data.catalogue.items.ids["category"], np.int64)
    return World(name=name, user=user, item=item, time=times, category=category, days=moments)


def shop(*, users: int, items: int, new: int, a_day: int, start: int, days: int, seed: int = 0) -> World:
    """Return a world that drifts: users love two of 20 categories and exchange one in ten days; new items sell at first."""
    rng, categories = np.random.default_rng(seed), 20
    total, all_items = start + days + 1, items + new * (start + days + 1)
    category = rng.integers(0, categories, all_items)
    appeal = rng.lognormal(0, 1, all_items)
    loves = rng.integers(0, categories, (users, 2))
    born = np.concatenate([np.zeros(items, int), np.repeat(np.arange(total), new)])
    parts: list[tuple[np.ndarray, ...]] = []
    for day in range(total):
        changed = rng.random(users) < 0.1
        loves[changed, rng.integers(0, 2, changed.sum())] = rng.integers(0, categories, changed.sum())
        age = day - born
        weight = np.where(age >= 0, appeal * (1 + 6 * np.exp(-age / 3.0) * (born > 0)), 0.0)
        who = rng.integers(0, int(users * (0.7 + 0.3 * day / total)), a_day)  # new users come too
        of = np.where(rng.random(a_day) < 0.8, loves[who, rng.integers(0, 2, a_day)], rng.integers(0, categories, a_day))
        item = np.zeros(a_day, np.int64)
        for each in range(categories):
            mine = np.flatnonzero(category == each)
            here = of == each
            p = weight[mine] / weight[mine].sum()
            item[here] = rng.choice(mine, here.sum(), p=p)
        parts.append((who, item, 1_700_006_400 + day * DAY + np.sort(rng.integers(0, DAY, a_day))))
    user, item, when = (np.concatenate(part) for part in zip(*parts, strict=True))
    moments = tuple(1_700_006_400 + day * DAY for day in range(start, total + 1))
    return World(name="synthetic", user=user.astype(np.int64), item=item, time=when, category=category, days=moments)


class Arm:
    """A model of a world, trained by the pipeline and the step of `aif.fit`, which are compiled once for all arms."""

    def __init__(self, data: Dataset, *, small: bool, replay: float = REPLAY):
        self.data, self.replay = data, replay
        sizes: dict[str, Any] = SMOKE if small else dict(width=16, long_length=64)
        config = aif.presets.aif(data.schema, **sizes)
        self.model = aif.build(config.replace(blocks=(*config.blocks, aif.blocks.ItemOffset())))
        self.served = map_ids(self.model, self.model.config, data.encoding)
        self.optimizer = optax.adamw(RATE, weight_decay=1e-5)
        self.step = make_step(self.model, self.optimizer, loss=TASK.loss)
        params = jax.eval_shape(lambda key: self.model.init(key, data.catalogue), jax.random.key(0))
        row = jax.eval_shape(jax.vmap(self.model.item, (None, 0)), params, data.catalogue.features([0]))
        self.export_bytes = common.size_of(params) + len(data.catalogue) * common.size_of(row)

    def positions(self, since: int | None, before: int, *, seed: int, replay: float = 0.0) -> np.ndarray:
        """Return samples of a span, and a share as many earlier ones."""
        positions = TASK.positions(self.data, min_history=1, since=since, before=before)
        return self.replayed(positions, since, (seed, 1), replay) if replay else positions

    def replayed(self, positions: np.ndarray, before: int | None, key: tuple[int, int], share: float) -> np.ndarray:
        """Return samples, and a share as many that are earlier than a moment."""
        earlier = TASK.positions(self.data, min_history=1, since=None, before=before)
        count = min(len(earlier), round(share * len(positions)))
        return np.union1d(positions, np.random.default_rng(key).choice(earlier, count, replace=False))

    def train(
        self, params: Params, positions: np.ndarray, before: int, *, epochs: int, seed: int = 0, source: SourceFn | None = None
    ) -> tuple[Params, float]:
        """Return trained parameters, and CPU seconds of this process; the first training compiles."""
        feed = Pipeline(
            dataset=self.data, positions=positions, config=self.model.config, batch_size=BATCH, epochs=epochs, seed=seed,
            source=source or TASK.source(self.data, before=before),
        )  # fmt: skip
        state, began = init_state(params, self.optimizer), time.process_time()
        state = jax.block_until_ready(loop(state, self.step, feed.batches(), total=len(feed), progress=False))
        return state.params, time.process_time() - began

    def hours(self, params: Params, first: int, before: int, *, hours: int, seed: int) -> Iterator[Span]:
        """Yield a model through a day: for each hour the model refreshed before it; the last is of the day's end."""
        waiting, spent = np.zeros(0, np.int64), 0.0
        for hour, (start, end) in enumerate(_hours(first, before, hours)):
            yield Span(params, start, end, spent)
            came = TASK.positions(self.data, min_history=1, since=start, before=end)
            waiting = np.concatenate([waiting, came[np.argsort(self.data.log.time[came], kind="stable")]])
            count = len(waiting) // BATCH * BATCH
            new, waiting = waiting[:count], waiting[count:]
            if not count:
                continue
            some = self.replayed(new, start, (seed, hour), self.replay)
            params, seconds = self.train(params, some, end, epochs=1, seed=seed * 100 + hour)
            spent += seconds
        yield Span(params, before, before, spent)

    def hours_from_scratch(
        self, fresh: Params, first: int, before: int, *, hours: int, epochs: int, seed: int
    ) -> Iterator[Span]:
        """Yield a model through a day that is trained from scratch before each hour, on all events before it."""
        spent = 0.0
        for start, end in _hours(first, before, hours):
            params, seconds = self.train(fresh, self.positions(None, start, seed=seed), start, epochs=epochs, seed=seed)
            spent += seconds
            yield Span(params, start, end, spent)

    def serving(self, params: Params, before: int, *, corrected: bool = False) -> Trained:
        """Return the model as it serves when it has met the users and items before a moment; others are unknown to it."""
        counts = counts_before(self.data, before)
        rows = {a.name: np.arange(a.size, dtype=np.int32) for a in self.data.schema.item_attributes}
        rows["item"] = np.where(counts > 0, rows["item"], 0)
        if corrected:
            params, _ = with_table(params, popularity_offset(counts, untrained=None), ItemOffset(), config=self.model.config)
        return Trained(self.served, params | {ROWS: rows}, self.data.encoder)


class Span(NamedTuple):
    """A model that answers the requests of a while, trained on what was before it."""

    params: Params
    first: int
    before: int
    spent: float = 0.0  # CPU seconds of its trainings since midnight


def _hours(first: int, before: int, count: int) -> Iterator[tuple[int, int]]:
    """Start and end of each hour of a day."""
    cuts = np.linspace(first, before, count + 1).astype(np.int64).tolist()
    return zip(cuts[:-1], cuts[1:], strict=True)


def answered(arm: Arm, spans: list[Span], requests: Requests, new: np.ndarray) -> dict[str, metrics.ByUser]:
    """Return the metrics of requests, each answered by the model of its span, and HR@K of those for new items."""
    data, at = arm.data, requests.positions
    users, lists = data.log.user[at], requests.candidates(at, BatchKey(0, 0, 0))
    scores, ranks = np.zeros(lists.rows.shape, np.float32), np.zeros(len(at), np.int64)
    for span in spans:
        mine = np.flatnonzero((data.log.time[at] >= span.first) & (data.log.time[at] < span.before))
        if not len(mine):
            continue
        served = arm.serving(span.params, span.first)
        scores[mine] = list_scores(served.model, served.params, data, at[mine], lists.rows[mine])
        corrected = arm.serving(span.params, span.first, corrected=True)
        ranks[mine] = rank_catalogue(corrected.model, corrected.params, data, at[mine])
    where, hit, of_new = lists.rows > 0, ranks < K, new[data.log.item[at]]
    found = {"gauc": metrics.gauc_by_user(scores, lists.labels, users[:, None], where=where)}
    found |= metrics.probabilities_by_user(scores[:, :16], lists.labels[:, :16], users[:, None], where=where[:, :16])
    found[f"hr@{K}"] = metrics.mean_by_user(hit, users)
    return found | ({OF_NEW: metrics.mean_by_user(hit[of_new], users[of_new])} if of_new.any() else {})


def requests_of(data: Dataset, first: int, before: int, *, count: int) -> Requests:
    """Return requests of a day, new users among them."""
    positions = TASK.positions(data, min_history=0, since=first, before=before)
    if len(positions) > count:
        positions = np.sort(np.random.default_rng(0).choice(positions, count, replace=False))
    return Requests(data=data, positions=positions, candidates=TASK.source(data, before=first, held_out=True), k=K)


def days_of(arm: Arm, world: World, epochs: int, options: Any) -> dict[str, Any]:
    """Return the arms of a world day by day."""
    hours, replay = options.hours, options.replay
    fresh = arm.model.init(jax.random.key(0), arm.data.catalogue)
    base, _ = arm.train(fresh, arm.positions(None, world.days[0], seed=0), world.days[0], epochs=epochs)
    params: dict[str, Params] = dict.fromkeys((*ARMS, "hourly"), base)
    spent: dict[str, float] = dict.fromkeys((*ARMS, *WITHIN), 0.0)
    new = counts_before(arm.data, world.days[0]) == 0
    by_day: list[dict[str, Any]] = []
    last: dict[str, dict[str, metrics.ByUser]] = {}
    for number, before in enumerate(track(world.days[1:], label=world.name, unit="days")):
        first = world.days[number]
        if number:  # the day that has just ended is trained on
            scratch = arm.positions(None, first, seed=number)
            warm = arm.positions(world.days[number - 1], first, seed=number, replay=replay)
            for name, start, positions, times in (("scratch", fresh, scratch, epochs), ("warm", params["warm"], warm, 1)):
                params[name], seconds = arm.train(start, positions, first, epochs=times, seed=number)
                spent[name] += seconds
        models = {name: [Span(params[name], world.days[0] if name == "never" else first, before)] for name in ARMS}
        if hours:
            models["hourly"] = list(arm.hours(params["hourly"], first, before, hours=hours, seed=number))
            params["hourly"] = models["hourly"][-1].params
        if hours and before == world.days[-1]:
            again = arm.hours_from_scratch(fresh, first, before, hours=hours, epochs=epochs, seed=number)
            models["hourly scratch"] = list(again)
        requests = requests_of(arm.data, first, before, count=options.requests)
        for name, spans in models.items():
            spent[name] += spans[-1].spent * bool(number)
            last[name] = answered(arm, spans, requests, new)
        by_day.append({"day": number} | {name: {metric: of.mean for metric, of in last[name].items()} for name in models})
    after, days = by_day[1:], len(by_day) - 1

    def gain(metric: str, name: str, than: str) -> float:
        return float(np.mean([row[name][metric] - row[than][metric] for row in after]))

    def points(name: str, than: str) -> tuple[float, list[float]]:
        value, *ends = metrics.paired_intervals(last[name], last[than])["gauc"]
        return 100 * value, [100 * end for end in ends]

    within: dict[str, Any] = {}
    if hours:
        value, interval = points("hourly", "hourly scratch")
        within = {
            "hours": hours, "hourly_cpu_seconds": spent["hourly"] / days / hours,
            "bytes_published_a_day_within": {"hourly": hours * arm.export_bytes},
            "cpu_seconds_a_day_within": {"hourly": spent["hourly"] / days, "hourly scratch": spent["hourly scratch"]},
            "hourly_minus_scratch_gauc_points": value, "hourly_minus_scratch_interval": interval,
            "hourly_minus_daily_warm_gauc_points": 100 * gain("gauc", "hourly", "warm"),
        }  # fmt: skip
    lost, interval = points("warm", "never")
    return within | {
        "days": days, "by_day": by_day,
        "stale_loss_gauc_points": lost, "stale_loss_interval": interval,
        "warm_minus_scratch_gauc_points": 100 * gain("gauc", "warm", "scratch"),
        "new_item_hr100_gain": gain(OF_NEW, "warm", "never"),
        "cpu_seconds_a_day": {name: spent[name] / days for name in ("scratch", "warm")},
        "bytes_published_a_day": {name: arm.export_bytes for name in ("scratch", "warm")},
        "warm_cost_share": spent["warm"] / spent["scratch"],
    }  # fmt: skip


# the gate


class Planter:
    """Trains many models of one day, good ones and bad ones."""

    def __init__(self, arm: Arm, world: World, *, small: bool, count: int, epochs: int):
        self.config = GateConfig(users=20) if small else GateConfig()
        self.arm, self.since = arm, world.days[0]
        self.end = self.since + int(0.8 * (world.days[1] - self.since))  # the last fifth of the day is for the gate
        fresh = arm.model.init(jax.random.key(0), arm.data.catalogue)
        self.start, _ = arm.train(fresh, arm.positions(None, self.since, seed=0), self.since, epochs=epochs)
        self.requests = requests_of(arm.data, self.end, world.days[1], count=count)
        self.old = measure(arm.serving(self.start, self.since), self.requests)
        self.times = arm.data.log.time[arm.data.log.time < world.days[1]]

    def trained(
        self, seed: int, *, replay: float = REPLAY, keep: np.ndarray | None = None, epochs: int = 1,
        source: SourceFn | None = None,
    ) -> Params:  # fmt: skip
        """Return a warm training of the day; `keep` says which of the log's events there are."""
        positions = self.arm.positions(self.since, self.end, seed=seed, replay=replay)
        positions = positions if keep is None else positions[keep[positions]]
        return self.arm.train(self.start, positions, self.end, epochs=epochs, seed=seed, source=source)[0]

    def judged(self, params: Params, *, times: np.ndarray | None = None, known_before: int | None = None) -> tuple[str, ...]:
        """Return the gate's reasons."""
        share = volume(self.times if times is None else times, self.since)
        served = self.arm.serving(params, int(self.times.max()) + 1 if known_before is None else known_before)
        return judge({"newest": (measure(served, self.requests), self.old)}, self.config, volume=share).reasons

    def good(self, number: int) -> tuple[str, ...]:
        """Return the verdict on a good model."""
        return self.judged(self.trained(number, replay=(0.1, 0.2, 0.5)[number % 3], epochs=1 + number % 2))

    def bad(self, number: int, fault: str) -> tuple[str, ...]:
        """Return the verdict on a model with one of FAULTS."""
        rng, data = np.random.default_rng(number), self.arm.data
        if fault == "lost half of the data":
            keep = rng.random(len(data.log)) < 0.5
            there = data.log.time[(keep | (data.log.time < self.since)) & (data.log.time <= self.times.max())]
            return self.judged(self.trained(number, keep=keep), times=there)
        usual, uniform = TASK.source(data, before=self.end), NegativeSampler((np.arange(len(data.items)) > 0).astype(int))

        def wrong(*asked: Any) -> CandidateLists:
            lists = usual(*asked)
            return lists._replace(labels=1 - np.asarray(lists.labels))

        sources = {"wrong labels": wrong, "sampled differently": sampled_negatives(data, sampler=uniform, negatives=7)}
        params = self.trained(number, source=sources.get(fault))
        rows = np.array(params["embedding"]["item"])
        if fault == "NaN":
            rows.flat[rng.integers(0, rows.size)] = np.nan
        elif fault == "swapped columns":
            rows[1:] = rng.permutation(rows[1:])
        known = self.since if fault == "stale vocabulary" else None
        return self.judged(params | {"embedding": params["embedding"] | {"item": rows}}, known_before=known)


FAULTS = ("NaN", "wrong labels", "swapped columns", "lost half of the data", "sampled differently", "stale vocabulary")


def gate(arm: Arm, world: World, epochs: int, options: Any) -> dict[str, Any]:
    """Return how many of the planted bad models are refused, and of the good ones passed."""
    planter = Planter(arm, world, small=options.smoke, count=150 if options.smoke else 600, epochs=epochs)
    passed, by_fault, why = 0, {name: [0, 0] for name in FAULTS}, []
    for number in track(range(options.models), label="gate", unit="pairs of models"):
        fault = FAULTS[number % len(FAULTS)]
        by_fault[fault][0] += bool(planter.bad(number, fault))
        by_fault[fault][1] += 1
        reasons = planter.good(number)
        passed += not reasons
        why += list(reasons)
    return {
        "models": options.models, "gate_refused_bad": sum(refused for refused, _ in by_fault.values()),
        "gate_passed_good": passed, "refused_by_fault": by_fault, "reasons_against_good": why,
    }  # fmt: skip


# the command


def world_of(name: str, options: Any) -> tuple[World, int]:
    """Return a world by name, and the epochs of a training from scratch."""
    if options.smoke:
        return shop(users=80, items=120, new=6, a_day=400, start=3, days=options.days), 1
    if name == "synthetic":
        return shop(users=1200, items=1500, new=30, a_day=6000, start=8, days=options.days), 2
    sizes: dict[str, Any] = {"movielens": dict(events=120_000, start=0.7), "taobao": dict(events=None, start=0.5)}[name]
    return of_dataset(name, options.data, days=options.days, **sizes), 2


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Run the study and print its figures."""
    parser = common.parser(__doc__)
    parser.add_argument("--worlds", nargs="*", choices=WORLDS, help="some of them (default: all that --data has)")
    settings = {
        "days": (3, 2, "trained days of each world"),
        "models": (100, 6, "planted models of each kind", 0),
        "requests": (400, 150, "requests a day that judge each model"),
        "hours": (24, 3, "trainings within a day of the arms hourly and hourly scratch; 0 leaves them out", 0),
        "replay": (REPLAY, REPLAY, "share of earlier events that warm and hourly train on too", 0.0),
    }
    options = common.options(parser, arguments, settings, data="folder with the public data sets")
    names = options.worlds
    if names is None:
        names = WORLDS[:1] if options.smoke or options.data is None else WORLDS
    known = {name: world_of(name, options) for name in dict.fromkeys((*names, *WORLDS[: options.models > 0]))}
    arms = {name: Arm(world.read(), small=options.smoke, replay=options.replay) for name, (world, _) in known.items()}
    worlds = {name: days_of(arms[name], *known[name], options) for name in names}
    figures: dict[str, Any] = {"worlds": worlds}
    if options.models:
        figures["gate"] = gate(arms[WORLDS[0]], *known[WORLDS[0]], options)
        figures |= {key: figures["gate"][key] for key in ("gate_refused_bad", "gate_passed_good")}
    for key in KEYS:
        figures[key] = {name: found[key] for name, found in worlds.items() if key in found}
    common.report(figures, options.json)


if __name__ == "__main__":
    main()
