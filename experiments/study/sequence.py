"""A ranker of sequences: SASRec, causal self-attention over the last events, and a dot product with the candidate.

An event is the sum of the embeddings of its item, of the item's fields and of its action; a candidate is that of its item and
fields, with a bias. If users return to items, log(1 + sum_n w_n) is added for the earlier events n of that very item, weighted
by place and action.

After every event of a window the next one is taught: a softmax over its item, negatives that the batch shares, drawn by
popularity ** 0.75, and, if users return to items, the earlier items of the window. Logits are less logQ, so the model learns
log P of the catalogue; what the popularity correction of serving adds is taken off its scores. An event at the time of the one
before it is not taught, since a request reads what is strictly earlier.

Sources: W. Kang and J. McAuley, Self-Attentive Sequential Recommendation, arXiv 1808.09781; repeats, P. Ren et al., RepeatNet,
arXiv 1812.02646.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from aif_jax.data import BatchKey, EventLog, NegativeSampler
from aif_jax.output import track
from aif_jax.store import sealed
from aif_jax.store.trained import digest
from aif_jax.train import default_optimizer
from aif_jax.train.distillation import Scores
from experiments.study.datasets import StudyData
from experiments.study.question import Part
from experiments.study.trees import fields_of

FORMAT = "ranker of sequences 1"
WIDTH, LENGTH, LAYERS, HEADS, DROPOUT = 64, 128, 2, 2, 0.2
STEPS, WINDOWS, NEGATIVES = 1000, 32, 512
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.01
FOLDS = 2  # of users
REQUESTS = 128  # scored together
Params = Any


class Encoder(nn.Module):
    """The user after each of their events [B, L, WIDTH], which are embedded and read themselves and earlier ones."""

    @nn.compact
    def __call__(self, events: jax.Array, train: bool = False) -> jax.Array:
        drop = partial(nn.Dropout(DROPOUT), deterministic=not train)
        states = drop(events + self.param("place", nn.initializers.normal(0.02), events.shape[1:])[None])
        earlier = nn.make_causal_mask(events[..., 0])
        for _ in range(LAYERS):
            states += drop(nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(states), mask=earlier))
            states += drop(nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(states)))))
        return nn.LayerNorm()(states)


class Events(NamedTuple):
    """Events of each of B users, in time."""

    item: np.ndarray  # int32 [B, L]
    action: np.ndarray  # int32 [B, L]


def init(data: StudyData) -> Params:
    """Return random tables and encoder."""
    sizes = {name: int(ids.max()) + 1 for name, ids in fields_of(data).items()}
    key, *keys = jax.random.split(jax.random.key(0), 1 + len(sizes))
    tables = {
        name: jax.random.normal(of, (size, WIDTH)) / WIDTH**0.5 for of, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    encoder = Encoder().init(key, jnp.zeros((1, LENGTH, WIDTH)))["params"]
    action, bias = jnp.zeros((int(data.dataset.log.action.max()) + 1, WIDTH)), jnp.zeros(len(data.dataset.catalogue))
    repeat = {"place": jnp.zeros(LENGTH), "action": action[:, 0], "gain": jnp.ones(())}
    return {"tables": tables, "action": action, "bias": bias, "repeat": repeat, "encoder": encoder}


def embedded(params: Params, ids: dict[str, jax.Array], rows: Any) -> jax.Array:
    """Return items [..., WIDTH] of catalogue rows; `ids` are the catalogue's fields."""
    return sum((table[ids[name][rows]] for name, table in params["tables"].items()), jnp.zeros(()))


def encoded(params: Params, ids: dict[str, jax.Array], events: Events, key: jax.Array | None = None) -> jax.Array:
    """Return users [B, L, WIDTH] after each event; a key makes it training."""
    inputs = embedded(params, ids, events.item) + params["action"][events.action]
    rngs = None if key is None else {"dropout": key}
    return Encoder().apply({"params": params["encoder"]}, inputs, train=key is not None, rngs=rngs)


def repeated(params: Params, events: Events) -> jax.Array:
    """Return weights [B, L, L] of events (the last axis) for the user after each event, 0 of what is later."""
    place, action = params["repeat"]["place"], params["repeat"]["action"]
    past = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    return jnp.where((past >= 0)[None], jnp.exp(place[np.maximum(past, 0)][None] + action[events.action][:, None]), 0)


def repeat_term(params: Params, weights: jax.Array) -> jax.Array:
    """Return what the summed weights of the events of an item add to its logit."""
    return params["repeat"]["gain"] * jnp.log1p(weights)


def windows(log: EventLog, seen: np.ndarray, rng: np.random.Generator, count: int) -> tuple[Events, np.ndarray, np.ndarray]:
    """Return events [B, LENGTH] from a random training event of a user on, the items after them, and which are taught."""
    ends = log.offsets[:-1] + np.bincount(log.user[seen], minlength=log.users)  # training events come first
    at = seen[rng.integers(0, len(seen), count)]
    first = np.maximum(at - rng.integers(0, LENGTH, count), log.offsets[log.user[at]])[:, None]
    place = first + np.arange(LENGTH + 1)
    there = place < ends[log.user[at]][:, None]
    place = np.where(there, place, first)
    item, time = np.where(there, log.item[place], 0), log.time[place]
    taught = there[:, 1:] & (time[:, 1:] > time[:, :-1]) & (item[:, 1:] > 0)
    return Events(item[:, :-1], np.where(there, log.action[place], 0)[:, :-1]), item[:, 1:], taught


def loss(
    params: Params, ids: dict[str, jax.Array], batch: tuple, key: jax.Array, *, log_q: jax.Array, repeats: bool
) -> jax.Array:
    """Return mean cross-entropy of the item after each event that is taught; `batch` is of `windows` and negatives [n].

    Args:
      log_q: float32 [N], logarithms of how often the negatives are expected to hold an item.
      repeats: whether the earlier items of the window are negatives too.
    """
    events, after, taught, negatives = batch
    users, bias = encoded(params, ids, events, key), params["bias"]
    right = (users * embedded(params, ids, after)).sum(-1) + bias[after] - log_q[after]
    drawn = users @ embedded(params, ids, negatives).T + (bias - log_q)[negatives][None, None]
    wrong = [jnp.where(negatives[None, None] == after[..., None], -jnp.inf, drawn)]
    if repeats:
        earlier = nn.make_causal_mask(events.item, dtype=bool)[:, 0]  # [B, L, L]
        same, weights = events.item[:, None] == after[..., None], repeated(params, events)
        often = jnp.logaddexp(log_q, 0.0)  # of an item that stands in the window too
        own = users @ embedded(params, ids, events.item).mT + (bias - often)[events.item][:, None]
        alike = (events.item[:, None] == events.item[..., None]).astype(users.dtype)
        wrong.append(jnp.where(earlier & ~same, own + repeat_term(params, weights @ alike), -jnp.inf))
        right += jnp.where((earlier & same).any(-1), (log_q - often)[after], 0)
        right += repeat_term(params, jnp.where(same, weights, 0).sum(-1))
    each = jax.nn.logsumexp(jnp.concatenate([right[..., None], *wrong], -1), -1) - right
    return jnp.where(taught, each, 0).sum() / jnp.maximum(taught.sum(), 1).astype(each.dtype)


def fit(
    data: StudyData, part: Part, *, counts: np.ndarray, offset: np.ndarray, folder: Path, steps: int = STEPS
) -> tuple[Scores, str]:
    """Return the scores of the model and its version; trained, or read from `folder` if it was trained before.

    Requests of the training events get the scores of a model that was trained without their user, as a log has scores from
    before the event: those of a model that knows what comes next would teach what it has learned by heart.

    Args:
      counts: [N] training events.
      offset: float32 [N], what serving adds to the scores of items.
    """
    log = data.dataset.log
    fold = np.full(len(log), FOLDS)
    fold[part.seen] = log.user[part.seen] % FOLDS
    names = {n: f"without users of fold {n}" for n in range(FOLDS)} | {FOLDS: "all"}
    parts = {name: part.seen[fold[part.seen] != n] for n, name in names.items()}
    models = _trained(data, parts, counts=counts, folder=folder, steps=steps)
    by_fold = dict(zip(names, _scores_of(data, models), strict=True))

    def scores(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        made = np.empty(rows.shape, np.float32)
        for n in np.unique(fold[positions]):
            at = fold[positions] == n
            made[at] = by_fold[n](positions[at], rows[at])
        return made - offset[rows]

    return scores, " ".join(digest(np.asarray(one["bias"])).sha256[:8] for one in models)


def _trained(data: StudyData, parts: dict[str, np.ndarray], *, counts: np.ndarray, folder: Path, steps: int) -> list[Params]:
    """Return the parameters after training on each part of the events, or those in `folder`, by the name of the part."""
    log, ids = data.dataset.log, {name: jnp.asarray(of) for name, of in fields_of(data).items()}
    sampler = NegativeSampler(counts)
    log_q = jnp.asarray(np.log(np.maximum(NEGATIVES * sampler.probabilities, 1e-6)), jnp.float32)
    objective = jax.grad(partial(loss, log_q=log_q, repeats=data.repeats))
    optimizer = default_optimizer(steps, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    @jax.jit
    def step(params: Params, state: Any, batch: tuple, key: jax.Array) -> tuple[Params, Any]:
        gradients = objective(params, ids, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # schedules divide integers
            updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for name in [name for name in parts if not sealed.is_complete(folder / name)]:
        params, rng = init(data), np.random.default_rng(0)
        state = optimizer.init(params)
        for n in track(range(steps), label="sequences", unit="steps"):
            negatives = sampler.sample(1, NEGATIVES, key=BatchKey(0, 0, n))[0]
            batch = (*windows(log, parts[name], rng, WINDOWS), negatives)
            params, state = step(params, state, batch, jax.random.key(n))
        folder.mkdir(parents=True, exist_ok=True)
        sealed.write(folder / name, params, {}, format=FORMAT)
    return [jax.tree.map(jnp.asarray, sealed.read(folder / name, format=FORMAT)) for name in parts]


def _scores_of(data: StudyData, models: list[Params]) -> list[Scores]:
    """Return the logits of each model, by one program."""
    log, ids = data.dataset.log, {name: jnp.asarray(of) for name, of in fields_of(data).items()}
    tables = [jax.jit(embedded)(params, ids, np.arange(len(data.dataset.catalogue))) for params in models]

    @jax.jit
    def scored(params: Params, table: jax.Array, events: Events, last: np.ndarray, rows: np.ndarray) -> jax.Array:
        one = jnp.arange(len(rows))
        logits = jnp.einsum("bd,bcd->bc", encoded(params, ids, events)[one, last], table[rows]) + params["bias"][rows]
        if not data.repeats:
            return logits
        weights = repeated(params, events)[one, last][:, None]
        return logits + repeat_term(params, jnp.where(rows[..., None] == events.item[:, None], weights, 0).sum(-1))

    def scores(params: Params, table: jax.Array, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        made, end = np.empty(rows.shape, np.float32), log.history_end(positions)
        first = np.maximum(log.offsets[log.user[positions]], end - LENGTH)
        for start in range(0, len(rows), REQUESTS):
            some = np.resize(np.arange(start, min(start + REQUESTS, len(rows))), REQUESTS)  # one shape is compiled
            place = first[some, None] + np.arange(LENGTH)
            there = place < end[some, None]
            item, action = (np.where(there, of[np.where(there, place, 0)], 0) for of in (log.item, log.action))
            last = np.maximum(end - first - 1, 0)[some]
            found = scored(params, table, Events(item, action), last, rows[some])
            made[start : start + REQUESTS] = found[: len(rows) - start]
        return made

    return [partial(scores, *each) for each in zip(models, tables, strict=True)]
