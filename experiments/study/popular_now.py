"""Do statistics of items as of the sample's time rank better?

Claim     Counts and rates of an item and of its category over windows up to the sample's time, and the ages of the item's first
          and last event, as item features of every model: worth on the validation split, one epoch.
Command   python -m experiments.study.popular_now --data DIR --results DIR --work DIR
Protocol  That of `question` (sizes, recipe, optimizer, steps, requests), each model with and without the statistics. Counts are
          of all events strictly earlier than the sample, those of the held-out slice among them, as a nearline job would have
          them; in the catalogue they are those of the first of `CHUNK` requests by time. Negatives of training are drawn by the
          counts of all training events ("training"), or by the counts up to the sample ("so far").
Measured  in experiments/results/question/popular_now.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import checkpoint, metrics, train
from aif_jax.blocks.item_offset import popularity_offset
from aif_jax.data import candidates
from aif_jax.data.candidates import CandidateLists, Draw
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.pipeline import Batch, Fed, Pipeline, make_batch
from aif_jax.data.sampling import NegativeSampler, Seen, item_counts
from aif_jax.data.split import eligible
from aif_jax.train.evaluate import predict, rank_of
from aif_jax.train.loop import loop
from aif_jax.types import Params
from experiments import common
from experiments.study import datasets, question, recipes, records
from experiments.study.question import Trial

HOUR, DAY = 3600, 86400
WINDOWS = (HOUR, 6 * HOUR, DAY, 7 * DAY, 30 * DAY, 365 * DAY, 0)  # seconds; 0 for all time
CHUNK = 8  # requests of the catalogue that share one refresh of the item rows
SMOOTH = 0.5
NONE, NOW = "none", "so far"


class Counts:
    """How often each value occurs in a log before a time: binary searches in (value, time) keys."""

    def __init__(self, values: np.ndarray, times: np.ndarray, size: int):
        self.start = int(times.min())
        self.span = int(times.max()) - self.start + 2
        self.keys = np.sort(values.astype(np.int64) * self.span + (times - self.start))
        self.first = np.searchsorted(self.keys, np.arange(size) * self.span)
        self.size = size

    def before(self, values: np.ndarray, times: np.ndarray) -> np.ndarray:
        """How many events of each value are strictly earlier than its time."""
        at = np.clip(times - self.start, 0, self.span - 1)
        return np.searchsorted(self.keys, values.astype(np.int64) * self.span + at) - self.first[values]

    def time_of(self, values: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Time of the event of a value with that number, which exists."""
        return self.keys[self.first[values] + number] - values * self.span + self.start


HALF_LIVES = (6 * HOUR, 7 * DAY, 180 * DAY)


class Decayed(Counts):
    """Counts whose events lose half of their weight in each half-life, float64 [events, half-lives] just after each event."""

    def __init__(self, values: np.ndarray, times: np.ndarray, size: int):
        super().__init__(values, times, size)
        value, time = np.divmod(self.keys, self.span)
        place, lives = np.arange(len(time)) - self.first[value], np.array(HALF_LIVES, float)
        self.sums, step = np.ones((len(time), len(lives))), 1
        while (far := place >= step).any():
            at = np.flatnonzero(far)
            gap = (time[at] - time[at - step])[:, None]
            added = self.sums[at - step] * np.exp2(-gap / lives)
            self.sums[at] += added
            step *= 2

    def sums_before(self, values: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count and decayed counts [..., half-lives] of the events strictly earlier."""
        count = self.before(values, times)
        at = np.maximum(self.first[values] + count - 1, 0)
        gap = np.maximum(times - (self.keys[at] % self.span + self.start), 0)[..., None]
        return count, np.where((count > 0)[..., None], self.sums[at] * np.exp2(-gap / np.array(HALF_LIVES, float)), 0)


class DecayedStatistics:
    """The same as `Statistics` by decayed counts in place of windows; `parts`: what is in them."""

    def __init__(self, dataset: Dataset, parts: str = "items, categories, totals"):
        log, category = dataset.log, dataset.catalogue.ids["category"]
        self.category, self.parts = category, parts
        self.items = Decayed(log.item, log.time, len(category))
        self.categories = Decayed(category[log.item], log.time, int(category.max()) + 1)
        self.all = Decayed(np.zeros(len(log), np.int64), log.time, 1)

    @property
    def width(self) -> int:
        lives = len(HALF_LIVES)
        return 3 + lives + lives * ("totals" in self.parts) + lives * ("categories" in self.parts)

    def __call__(self, rows: np.ndarray, times: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        times = np.broadcast_to(times, rows.shape)
        unique, place = np.unique(times, return_inverse=True)
        count, of_item = self.items.sums_before(rows, times)
        total = self.all.sums_before(np.zeros(len(unique), np.int64), unique)[1][place.reshape(rows.shape)]
        found = [np.log1p(count), *np.moveaxis(np.log1p(of_item), -1, 0)]
        groups = [(of_item, self.items.size)] if "totals" in self.parts else []
        if "categories" in self.parts:
            groups.append((self.categories.sums_before(self.category[rows].astype(np.int64), times)[1], self.categories.size))
        for decayed, size in groups:
            found += [*np.moveaxis(np.log((decayed + SMOOTH) / (total + SMOOTH * size) * size), -1, 0)]
        for number in (np.zeros_like(rows), np.maximum(count - 1, 0)):
            moment = self.items.time_of(np.where(count > 0, rows, self.items.keys[0] // self.items.span), number)
            found.append(np.where(count > 0, np.log1p(np.maximum(times - moment, 0) / HOUR), 0))
        return np.where((rows > 0)[..., None], np.stack(found, -1) / 4, 0).astype(np.float32)


class Statistics:
    """Features of items as of a time, from events strictly earlier than it."""

    def __init__(self, dataset: Dataset):
        log, category = dataset.log, dataset.catalogue.ids["category"]
        self.category = category
        self.items = Counts(log.item, log.time, len(category))
        self.categories = Counts(category[log.item], log.time, int(category.max()) + 1)
        self.all = Counts(np.zeros(len(log), np.int64), log.time, 1)

    @property
    def width(self) -> int:
        return 3 * len(WINDOWS) + 2

    def __call__(self, rows: np.ndarray, times: np.ndarray) -> np.ndarray:
        """float32 [..., width] of item rows at times of a shape that broadcasts."""
        rows = np.asarray(rows, np.int64)
        times = np.broadcast_to(times, rows.shape)
        found = []
        groups = self.category[rows].astype(np.int64)
        unique, place = np.unique(times, return_inverse=True)
        place = place.reshape(rows.shape)
        zeros = np.zeros(len(unique), np.int64)
        whole = self.items.before(rows, times)
        for window in WINDOWS:
            since = times - window
            of_item, of_group = whole, self.categories.before(groups, times)
            total = self.all.before(zeros, unique)
            if window:
                of_item = of_item - self.items.before(rows, since)
                of_group = of_group - self.categories.before(groups, since)
                total = total - self.all.before(zeros, unique - window)
            total = total[place]
            found.append(np.log1p(of_item))
            for count, size in ((of_item, self.items.size), (of_group, self.categories.size)):
                found.append(np.log((count + SMOOTH) / (total + SMOOTH * size) * size))
        met = whole > 0
        last = self.items.time_of(rows, np.maximum(whole - 1, 0))
        first = self.items.time_of(rows, np.zeros_like(rows)) if len(self.items.keys) else last
        for moment in (first, last):
            found.append(np.where(met, np.log1p(np.maximum(times - moment, 0) / HOUR), 0))
        return np.where((rows > 0)[..., None], np.stack(found, -1) / 4, 0).astype(np.float32)


def fast(dataset: Dataset, width: int) -> Dataset:
    """The data set whose items have places for the statistics, zeros."""
    schema = dataclasses.replace(dataset.schema, item_floats=width, encoding="")
    floats = np.zeros((len(dataset.catalogue), width), np.float32)
    catalogue = dataclasses.replace(dataset.catalogue, schema=schema, floats=floats)
    return dataclasses.replace(dataset, schema=schema, catalogue=catalogue, encoder=None)


def with_floats(batch: Batch, floats: np.ndarray) -> Batch:
    """A batch with other floats of its items."""
    return dataclasses.replace(batch, items=dataclasses.replace(batch.items, floats=floats))


def drawn_so_far(dataset: Dataset, counts: Counts, *, negatives: int, repeats: bool, tries: int = 8) -> candidates.Source:
    """The event's item and negatives drawn by count ** 0.75 of the events before the sample: events drawn at random, kept
    with probability count ** -0.25."""
    log = dataset.log
    order = np.argsort(log.time, kind="stable")
    ordered, items = log.time[order], log.item[order]

    def lists(positions: np.ndarray, draw: Draw) -> CandidateLists:
        rng = np.random.default_rng(np.random.SeedSequence(draw.seed, spawn_key=(9, draw.epoch, draw.step)))
        times, target = log.time[positions], log.item[positions]
        end = np.searchsorted(ordered, times)
        tried = items[(rng.random((len(positions), tries * negatives)) * end[:, None]).astype(np.int64)]
        count = counts.before(tried.astype(np.int64), np.broadcast_to(times[:, None], tried.shape))
        good = rng.random(tried.shape) < np.maximum(count, 1) ** -0.25
        good &= (tried != target[:, None]) & (tried > 0)
        if not repeats:
            good &= ~Seen.before(log, positions).contains(np.arange(len(positions))[:, None], tried)
        first = np.argsort(~good, axis=1, kind="stable")[:, :negatives]
        chosen = np.where(np.take_along_axis(good, first, 1), np.take_along_axis(tried, first, 1), 0)
        rows = np.concatenate([target[:, None], chosen], 1).astype(np.int32)
        labels = np.zeros(rows.shape, np.float32)
        labels[:, 0] = 1
        return CandidateLists(rows, labels)

    return candidates.Source(lists, {"kind": "drawn so far", "negatives": negatives})


def train_model(trial: Trial, data: datasets.StudyData, statistics: Any, negatives: str, *, progress: bool):
    """As `question.train_model`, with the statistics of each sample's time."""
    dataset, seen = data.dataset, data.split.train
    model = aif.build(question.config_of(trial, data))
    if negatives == NOW:
        source = drawn_so_far(
            dataset, Counts(dataset.log.item, dataset.log.time, len(dataset.catalogue)), negatives=question.NEGATIVES,
            repeats=data.repeats,
        )  # fmt: skip
    else:
        source = candidates.sampled(
            dataset, sampler=NegativeSampler(item_counts(dataset, seen)), negatives=question.NEGATIVES, repeats=data.repeats
        )
    feed = Pipeline(
        dataset=dataset, positions=eligible(dataset.log, seen, min_history=1), config=model.config, seed=trial.seed,
        candidates=source, batch_size=64 if trial.dataset == "smoke" else 256, epochs=trial.epochs,
        buckets=recipes.shorter(model.config.history_length),
    )  # fmt: skip

    def filled() -> Iterator[Fed]:
        for fed in feed.batches():
            assert fed.batch is not None and fed.positions is not None
            if statistics is not None:
                rows = np.asarray(fed.batch.items.ids["item"])
                floats = statistics(rows, dataset.log.time[fed.positions][:, None])
                fed = dataclasses.replace(fed, batch=with_floats(fed.batch, floats))
            yield fed

    optimizer = train.default_optimizer(len(feed), learning_rate=trial.learning_rate, weight_decay=trial.weight_decay)
    fitted = aif.fit_tables(model.config, dataset.catalogue, seed=0)
    state = train.init_state(model.init(jax.random.key(trial.seed), None, fitted=fitted), optimizer)
    step, began = train.make_step(model, optimizer, loss=recipes.loss(recipes.DEFAULT)), time.perf_counter()
    state = loop(state, step, filled(), total=len(feed), label=trial.id, progress=progress)
    params = jax.block_until_ready(state.params)
    return model, params, {"steps": int(state.step), "train_seconds": time.perf_counter() - began}


def list_scores(model, params: Params, dataset: Dataset, at: np.ndarray, rows: np.ndarray, statistics: Any):
    """Scores of lists [R, C] with the statistics of each request's time."""

    def batches() -> Iterator[Batch]:
        for start in range(0, len(at), 100):
            some = (np.arange(100) + start) % len(at)
            batch = make_batch(dataset, at[some], rows[some], np.zeros((100, rows.shape[1]), np.float32), config=model.config)
            if statistics is not None:
                batch = with_floats(batch, statistics(rows[some], dataset.log.time[at[some]][:, None]))
            yield batch

    return np.concatenate(list(predict(model, params, batches())))[: len(at)]


def evaluate(model, params: Params, data: datasets.StudyData, trial: Trial, statistics: Any) -> dict[str, Any]:
    """Metrics by user: GAUC of the protocol, of requests for items with a training event, of candidates drawn so far; HR@100."""
    dataset, log = data.dataset, data.dataset.log
    part = question.parts_of(trial, data)[0]
    requests = question.requests_of(trial, part, data)
    at = requests.positions
    scores = list_scores(model, params, dataset, at, requests.rows, statistics)
    users, sample = log.user[at][:, None], np.arange(len(at))[:, None]
    seen = Seen.before(log, at)
    kept = np.full(requests.rows.shape, True) if data.repeats else ~seen.contains(sample, requests.rows)
    counts = item_counts(dataset, part.seen)
    known = kept & (counts[log.item[at]] > 0)[:, None]
    found = {
        "gauc": metrics.gauc_by_user(scores, requests.labels, users, where=kept),
        "gauc_trained": metrics.gauc_by_user(scores, requests.labels, users, where=known),
    }
    by_time = Counts(log.item, log.time, len(counts))
    source = drawn_so_far(dataset, by_time, negatives=99, repeats=data.repeats)
    lists = source(at, Draw(0, 0, 0))
    now = list_scores(model, params, dataset, at, lists.rows, statistics)
    met = by_time.before(log.item[at].astype(np.int64), log.time[at]) > 0
    found["gauc_so_far"] = metrics.gauc_by_user(now, lists.labels, users, where=(lists.rows > 0) & met[:, None])
    at = np.sort(np.random.default_rng(2).permutation(at)[: question.CATALOGUE_REQUESTS])
    at = at[np.argsort(log.time[at], kind="stable")]
    every, length = np.arange(len(dataset.catalogue)), model.config.history_length
    item_rows = jax.jit(lambda params, items: jax.vmap(model.item, (None, 0))(params, items))
    rank = jax.jit(
        lambda params, users, rows: jax.vmap(model.interaction, (None, 0, None))(
            params, jax.vmap(model.user, (None, 0))(params, users), rows
        )
    )
    features = dataset.catalogue.features(every, content=model.config.reads_content)
    rows = None
    names = [f"{kind}@{untrained:g}" for kind in ("hr100", "hr100_now") for untrained in question.UNTRAINED]
    hits = {name: np.zeros(len(at)) for name in names}
    fixed = [popularity_offset(counts, untrained=untrained) for untrained in question.UNTRAINED]
    for start in range(0, len(at), CHUNK):
        here = at[start : start + CHUNK]
        pad = np.resize(here, CHUNK)
        moment = int(log.time[here[0]])
        if rows is None or statistics is not None:
            if statistics is not None:
                features = dataclasses.replace(features, floats=statistics(every, np.full(1, moment)))
            rows = item_rows(params, features)
        logits = np.array(rank(params, dataset.user_features(pad, length=length), rows))[: len(here)]
        target, each = log.item[here], np.arange(len(here))
        of_target = logits[each, target]
        logits[:, 0] = -np.inf
        if not data.repeats:
            for row, position, end in zip(each, here, log.history_end(here), strict=True):
                logits[row, log.item[log.offsets[log.user[position]] : end]] = -np.inf
        logits[each, target] = of_target
        so_far = by_time.before(every, np.full(len(every), moment))
        for place, untrained in enumerate(question.UNTRAINED):
            for kind, offset in (("hr100", fixed[place]), ("hr100_now", popularity_offset(so_far, untrained=untrained))):
                hits[f"{kind}@{untrained:g}"][start : start + len(here)] = rank_of(logits + offset, target) < 100
    for name, values in hits.items():
        found[name] = metrics.mean_by_user(values, log.user[at])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trained", type=Path, help="where `question` keeps its models")
    parser.add_argument("--dataset", nargs="+", default=["movielens", "taobao"])
    parser.add_argument("--model", nargs="+", default=[question.BASE, question.WITH_MATCHING, question.AIF])
    parser.add_argument("--statistics", nargs="+", default=[NONE, NOW])
    parser.add_argument("--negatives", nargs="+", default=["training"])
    options = parser.parse_args()
    for name in options.dataset:
        plain = datasets.load(name, options.data)
        for negatives in options.negatives:
            for model_name in options.model:
                for kind in options.statistics:
                    began = time.perf_counter()
                    trial = Trial(dataset=name, model=model_name)
                    given = None
                    if kind != NONE:
                        given = Statistics(plain.dataset) if kind == NOW else DecayedStatistics(plain.dataset, kind)
                    data = plain if given is None else dataclasses.replace(plain, dataset=fast(plain.dataset, given.width))
                    key = f"{trial.id}/statistics {kind}/negatives {negatives}"
                    if key in records.read(options.results):
                        continue
                    file = options.work / f"{trial.file}--{kind}--{negatives}".replace(" ", "_")
                    theirs = options.trained / trial.file if options.trained else None
                    if theirs and theirs.exists() and kind == NONE and negatives == "training":
                        file = theirs
                    if file.exists():
                        model, params, said = aif.build(question.config_of(trial, data)), checkpoint.load(file).params, {}
                    else:
                        model, params, said = train_model(trial, data, given, negatives, progress=False)
                        checkpoint.save(file, aif.Trained(model, params))
                    found = evaluate(model, params, data, trial, given)
                    folder = options.results / "by_user"
                    folder.mkdir(parents=True, exist_ok=True)
                    arrays = {f"{n}.{p}": v for n, one in found.items() for p, v in question.pack(one).items()}
                    np.savez_compressed(folder / (key.replace("/", "--").replace(" ", "_") + ".npz"), **arrays)
                    record = {"id": key, "dataset": name, "model": model_name, "statistics": kind, "negatives": negatives,
                              "figures": {n: one.mean for n, one in found.items()}, **said,
                              "seconds": time.perf_counter() - began, "commit": common.machine()["commit"]}  # fmt: skip
                    records.append(options.results, record)
                    print(key, json.dumps(records.rounded(record["figures"])), said, flush=True)
                    jax.clear_caches()


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("out/question/compiled").absolute()))
    main()
