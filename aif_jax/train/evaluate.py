"""Evaluation by request: figures on lists of candidates, in the whole catalogue, and against a ranker.

Ranking figures read raw logits; log-loss and calibration read calibrated probabilities, see `train.edits.calibration`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import metrics
from aif_jax.catalogue import Catalogue
from aif_jax.checks import check_encoding, expect, expect_integers
from aif_jax.config import Config
from aif_jax.data.candidates import CandidateLists, Labels, SourceFn, logged, population_weights
from aif_jax.data.cascade import RANKER, STAGE, STAGES
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import COLUMNS
from aif_jax.data.order import BatchKey
from aif_jax.data.pipeline import Batch, make_batch
from aif_jax.model import PreRanker
from aif_jax.output import hidden, track
from aif_jax.scores import calibrated as with_probabilities
from aif_jax.scores import objective_names, over_all
from aif_jax.store.trained import digest
from aif_jax.train.baselines import catalogue_ranks
from aif_jax.train.step import score
from aif_jax.train.tasks import NextItem
from aif_jax.trees import differences, listed
from aif_jax.types import ItemFeatures, ItemRow, Params, UserFeatures, UserState

BASELINE = "baseline."
"""What the names of a baseline's figures begin with."""
RANKER_TOP = 10
"""How many of the ranker's best count for ranker recall."""
ITEMS = 1024  # items in one run of the item function
REQUESTS = 128  # requests that are scored at a time, at most
SCORES = 1 << 22  # scores of requests x items that are held on the host at a time
CHUNK = 1 << 15  # pairs of a request and a candidate that one program scores

_scores = jax.jit(score, static_argnames="model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of held-out requests; NaN where one is not defined, such as the AUC of one class.

    Attributes:
      requests, users: how many the figures are of.
      auc: over all candidates of all requests.
      gauc: mean over users of the AUC of their candidates, weighted by requests.
      gauc_mean: the plain mean over users.
      log_loss: mean over candidates, in nats.
      calibration: sum of predicted probabilities over positives; above 1 predicts too much.
      calibration_error: expected calibration error over 10 bins of probability.
      deciles: predicted against observed by deciles of the prediction, see `metrics.calibration`.
      hit_rate: HR@k of the event's item in the catalogue; None where the catalogue was not ranked.
      ranker_recall: share of the logged ranker's top 10 among the `kept` best of the logged candidates; None without a cascade
        that has the label "ranker". In training, a teacher is that ranker.
      kept: how many candidates the log's own pre-ranking passed on, the mean over requests; a quarter of a teacher's.
      objectives: figures of each of several objectives by name; the figures above are of the first.
      by_user: figures by name before they are averaged, for `intervals`; and baselines' figures on the same requests and
        candidates, such as "baseline.popularity.gauc".
      inputs: digests and settings that decide requests and candidates, for `against`.
    """

    requests: int
    users: int
    auc: float
    gauc: float
    gauc_mean: float
    log_loss: float
    calibration: float
    calibration_error: float
    deciles: metrics.Calibration = dataclasses.field(repr=False, compare=False)
    hit_rate: float | None = None
    ranker_recall: float | None = None
    kept: int | None = None
    objectives: Mapping[str, "Evaluation"] = dataclasses.field(default_factory=dict)
    by_user: Mapping[str, metrics.ByUser] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def figures(self) -> dict[str, float]:
        """Return the figures by name, for logs and checkpoints: HR@100 is "hr@100"."""
        return {name: part.mean for name, part in self._parts().items()}

    def intervals(self) -> dict[str, metrics.Interval]:
        """Return the figures by name with the bounds of their 95 % interval over users, see `metrics.user_interval`.

        AUC, `calibration` and `calibration_error` are linearised, see `metrics.auc_by_user`.
        """
        return metrics.user_intervals(self._parts())

    def against(self, other: "Evaluation") -> dict[str, metrics.Interval]:
        """Return these figures less those of another model on the same requests, resampled by the same users.

        A difference whose interval includes 0 may be chance, see `metrics.paired_interval`.

        Raises:
          ValueError: an evaluation of other requests, candidates or settings; names what differs.
        """
        lines = differences(dict(other.inputs), dict(self.inputs), path="evaluation", source="other")
        got = "another:\n" + listed(lines) + "\nEvaluate both with the same data, positions, candidates and k"
        expect(not lines, "Evaluation.against", "an evaluation of the same requests and candidates", got)
        ours = {name: part for name, part in self._parts().items() if BASELINE not in name}
        return metrics.paired_intervals(ours, other._parts())

    def _parts(self) -> dict[str, metrics.ByUser]:
        """Return figures by user, with the names of objectives before theirs, in the order of `figures`."""
        named = {f"{name}.{figure}": part for name, one in self.objectives.items() for figure, part in one.by_user.items()}
        return {**self.by_user, **named}

    def __str__(self) -> str:
        sure, values = self.intervals(), self.figures()
        bounds = {name: f" [{sure[name].low:.3f}, {sure[name].high:.3f}]" if name in sure else "" for name in values}
        shown = ", ".join(f"{name} {value:.4f}{bounds[name]}" for name, value in values.items() if BASELINE not in name)
        of = "" if self.kept is None else f"; ranker_recall: the ranker's top {RANKER_TOP} among {self.kept:,} kept"
        lines = [f"{shown} ({self.requests:,} requests of {self.users:,} users{of})"]
        for baseline in dict.fromkeys(name.split(".")[1] for name in values if name.startswith(BASELINE)):
            prefix = f"{BASELINE}{baseline}."
            theirs = {name.removeprefix(prefix): part for name, part in self.by_user.items() if name.startswith(prefix)}
            listed = ", ".join(f"{name} {part.mean:.4f}" for name, part in theirs.items())
            gap = metrics.paired_intervals(self.by_user, theirs)["gauc"]
            lines.append(f"baseline {baseline}: {listed}; the model's gauc {gap.value:+.4f} [{gap.low:+.3f}, {gap.high:+.3f}]")
        return "\n".join(lines)


def evaluate(
    model: PreRanker, params: Params, data: Dataset, positions: Any, *, k: int | None = 100, candidates: SourceFn | None = None,
    calibration_negatives: int | None = 15, baselines: Mapping[str, np.ndarray] | None = None,
    progress: bool = True,
) -> Evaluation:  # fmt: skip
    """Evaluate a model on held-out events: a list of candidates for each, and its rank in the catalogue.

    Every figure has a 95 % interval over users, see `Evaluation.intervals`. A cascade with the label "ranker" gives
    `Evaluation.ranker_recall`, by the first objective. Unless users come back to items (`Dataset.repeats`), items that the user
    has met are left out of the catalogue, and of lists.

    Args:
      positions: [R] integer positions of events in the log, such as `split_by_time(data.log, min_history=5).test`.
      k: k of HR@k and NDCG@k in the catalogue; None does not rank the catalogue.
      candidates: lists of candidates with labels 0 and 1, by name for several objectives; NaN for unknown. A conditional
        objective is evaluated over all candidates, by its product. With `log_q`, calibration counts a negative for as many
        items as it was drawn from. None draws 99 negatives for each event's item, by popularity ** 0.75 before the first event.
      calibration_negatives: candidates after the first that log-loss and calibration count: as many negatives as in training;
        None takes all, as do lists with `log_q`.
      baselines: scores [N] of every catalogue row by name, such as from `baseline_scores`, whose figures are returned too.

    Raises:
      EncodingMismatch: data of another encoder than the model's, see `Schema.encoding`.
      ValueError: no position, a k below 1, or what the source refuses, such as an event of an unknown item.
    """
    check_encoding("data", expected=model.config.schema.encoding, got=data.encoding)
    positions = expect_integers(positions, "positions", size=len(data.log)).astype(np.int64)
    expect(k is None or k >= 1, "k", "None or at least 1", k)
    expect(len(positions) > 0, "positions", "at least one held-out event", "none; move the split, or lower min_history")
    with hidden(not progress):
        lists = (sampled_before(data, positions) if candidates is None else candidates)(positions, BatchKey(0, 0, 0))
        scores = list_scores(model, params, data, positions, lists.rows)
        users, where = data.log.user[positions], lists.rows > 0
        probable, texts, parts = np.asarray(with_probabilities(params, scores)), model.config.objectives, {}
        named = labels_of(model.config, lists.labels)
        if not named:
            raise ValueError(f"Config.objectives: expected names among {sorted(lists.labels)}, the labels, got none; name them")
        for name, labels in named.items():
            raw, logits = (over_all(each, texts, name, np) if len(texts) > 1 else each for each in (scores, probable))
            known, weights = where & ~np.isnan(labels), population_weights(labels, lists.log_q)
            part = _figures(raw, logits, labels, users, known, weights, calibration_negatives)
            by_user = dict(part.by_user)
            for baseline, of_items in (baselines or {}).items():
                by_baseline = order_figures(of_items[lists.rows], labels, users, known)
                if k is not None and not parts:
                    by_baseline |= _hits(catalogue_ranks(of_items, data, positions), users, k)
                by_user |= {f"{BASELINE}{baseline}.{figure}": value for figure, value in by_baseline.items()}
            parts[name] = dataclasses.replace(part, by_user=by_user)
        first = next(iter(parts.values()))
        by_user, inputs = dict(first.by_user), _inputs_of(data, positions, lists)
        inputs |= {"calibration_negatives": calibration_negatives, "k": k}
        more: dict[str, Any] = {"by_user": by_user, "inputs": inputs, "objectives": parts if len(parts) > 1 else {}}
        if k is not None:
            by_user |= _hits(rank_catalogue(model, params, data, positions), users, k)
            inputs["repeats"] = bool(data.repeats)
            more["hit_rate"] = by_user[f"hr@{k}"].mean
        if (ranked := _ranked(model, params, data, positions, lists, scores)) is not None:
            requests, found, logits = ranked
            passed = (found.rows > 0) & (found.labels[STAGE] < STAGES.index("retrieved"))
            kept = max(1, round(float(passed.sum(1).mean())))
            orders = {"": logits} | {f"{BASELINE}{name}.": of_items[found.rows] for name, of_items in (baselines or {}).items()}
            for name, order in orders.items():
                by_user[f"{name}ranker_recall"] = _ranker_recall(order, found, data.log.user[requests], kept)
            more |= {"kept": kept, "ranker_recall": by_user["ranker_recall"].mean}
        return dataclasses.replace(first, **more)


def _ranked(
    model: PreRanker, params: Params, data: Dataset, positions: np.ndarray, lists: CandidateLists, scores: np.ndarray
) -> tuple[np.ndarray, CandidateLists, np.ndarray] | None:  # fmt: skip
    """Return requests of the cascade, their lists and logits by the first objective; None where there is no ranker's score."""
    if data.cascade is None or RANKER not in data.cascade.labels:
        return None
    if not isinstance(lists.labels, dict) or not {RANKER, STAGE} <= lists.labels.keys():
        positions = np.intersect1d(data.log.history_end(positions), data.cascade.positions)
        if not len(positions):
            return None
        lists = logged(data)(positions, BatchKey(0, 0, 0))
        scores = list_scores(model, params, data, positions, lists.rows)
    return positions, lists, scores if model.config.outputs == 1 else scores[..., 0]


def _ranker_recall(scores: np.ndarray, lists: CandidateLists, users: np.ndarray, kept: int) -> metrics.ByUser:
    """Return ranker recall of the best `kept` of lists [R, C]; requests without a ranker's score are left out."""
    ranker, where = lists.labels[RANKER], lists.rows > 0
    given, top = zip(scores[:, None], ranker[:, None], where[:, None], strict=True), min(kept, RANKER_TOP)
    each = np.array([metrics.ranker_recall_at_k(own, of, k=kept, top=top, where=there).value for own, of, there in given])
    return metrics.mean_by_user(each[~np.isnan(each)], users[~np.isnan(each)])


def order_figures(scores: np.ndarray, labels: np.ndarray, users: np.ndarray, where: np.ndarray) -> dict[str, metrics.ByUser]:
    """Return AUC and GAUC of lists [R, C]."""
    given: dict[str, Any] = {"users": users[:, None], "where": where}
    return {"auc": metrics.auc_by_user(scores, labels, **given), "gauc": metrics.gauc_by_user(scores, labels, **given)}


def _hits(ranks: np.ndarray, users: np.ndarray, k: int) -> dict[str, metrics.ByUser]:
    """Return HR@k and NDCG@k of ranks [R] in the catalogue, where one item counts."""
    gains = np.where(ranks < k, 1 / np.log2(ranks + 2), 0)
    return {f"hr@{k}": metrics.mean_by_user(ranks < k, users), f"ndcg@{k}": metrics.mean_by_user(gains, users)}


def _inputs_of(data: Dataset, positions: np.ndarray, lists: CandidateLists) -> dict[str, Any]:
    """Return `Evaluation.inputs` of lists."""
    log, labels = data.log, lists.labels if isinstance(lists.labels, dict) else {"label": lists.labels}
    labels = labels if lists.log_q is None else labels | {"log_q": lists.log_q}
    return {
        "data": {"users": len(data.users), "items": len(data.items)},
        "requests": {"count": len(positions), "sha256": digest(np.stack([getattr(log, c)[positions] for c in COLUMNS])).sha256},
        "candidates": {"rows": digest(lists.rows).sha256, **{name: digest(value).sha256 for name, value in labels.items()}},
    }


def labels_of(config: Config, labels: Labels) -> dict[str, np.ndarray]:
    """Return the labels [R, C] of each objective by name, "" for the only one without; ValueError where one has none."""
    names = objective_names(config.objectives)
    expected = f"one for each objective of the model {list(names)}, by name"
    if not isinstance(labels, dict):
        expect(len(names) <= 1, "labels", expected, "one array; take a task or source that has them, such as Impressions")
        return {next(iter(names), ""): labels}
    expect(set(names) <= labels.keys(), "labels", expected, sorted(labels))
    return {name: labels[name] for name in names}


def _figures(
    raw: np.ndarray, logits: np.ndarray, labels: np.ndarray, users: np.ndarray, where: np.ndarray, weights: np.ndarray | None,
    negatives: int | None,
) -> Evaluation:  # fmt: skip
    """Return figures of one objective on lists [R, C]; log-loss and calibration are of the first candidate and `negatives`."""
    count = None if negatives is None or weights is not None else 1 + negatives
    given = logits[:, :count], labels[:, :count]
    few: dict[str, Any] = {"where": where[:, :count], "weights": None if weights is None else weights[:, :count]}
    by_user = order_figures(raw, labels, users, where)
    by_user["gauc_mean"] = by_user["gauc"]._replace(weights=np.ones(len(by_user["gauc"].users)))
    by_user |= metrics.probabilities_by_user(*given, users[:, None], **few)
    means: dict[str, Any] = {name: part.mean for name, part in by_user.items()}
    deciles = metrics.calibration(*given, **few, by="size")
    return Evaluation(requests=len(users), users=len(np.unique(users)), deciles=deciles, by_user=by_user, **means)


def sampled_before(data: Dataset, positions: np.ndarray) -> SourceFn:
    """Return the event's item and 99 negatives by popularity among the events before the first one in `positions`."""
    return NextItem().source(data, before=int(data.log.time[positions].min()), held_out=True)


def predict(model: PreRanker, params: Params, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Yield joint scores of each batch, float32 [B, C] or [B, C, T], masked ones too; compiles once for a model and shape."""
    for batch in batches:
        yield np.asarray(_scores(model, params, batch))


def list_scores(model: PreRanker, params: Params, data: Dataset, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return joint scores of the candidates of R requests, float32 [R, C] or [R, C, T]; EncodingMismatch as `evaluate`.

    At most `REQUESTS` requests are scored at a time, fewer where lists are long.
    """
    check_encoding("data", expected=model.config.schema.encoding, got=data.encoding)
    size = max(1, min(REQUESTS, CHUNK // max(1, rows.shape[1])))
    unknown = np.zeros((size, rows.shape[1]), np.float32)  # labels, which no score depends on
    places = _filled(len(positions), size, label="score")
    batches = (make_batch(data, positions[at], rows[at], unknown, config=model.config) for at in places)
    return np.concatenate(list(predict(model, params, batches)))[: len(positions)]


def item_rows(model: PreRanker, params: Params, catalogue: Catalogue) -> ItemRow:
    """Return the item function over the whole catalogue: rows [N] on the device; EncodingMismatch as `evaluate`."""
    check_encoding("catalogue", expected=model.config.schema.encoding, got=catalogue.schema.encoding)
    total = len(catalogue)
    batches = _filled(total, min(ITEMS, total), label="item rows")
    parts = [_each(model.item, params, catalogue.features(at, content=model.config.reads_content)) for at in batches]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:total], *parts)


def rank_catalogue(model: PreRanker, params: Params, data: Dataset, positions: np.ndarray) -> np.ndarray:
    """Return int64 [R], the rank of each event's item for its user in the whole catalogue, by the first objective, 0 the best.

    Ties count against it.
    """
    ranks = np.zeros(len(positions), np.int64)
    for at, scores in catalogue_scores(model, params, data, positions):
        ranks[at] = rank_of(scores, data.log.item[positions[at]])
    return ranks


def catalogue_scores(
    model: PreRanker, params: Params, data: Dataset, positions: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield int64 [b] indices into `positions` and float32 [b, N] scores of the whole catalogue by the first objective.

    -inf for row 0, and unless users come back to items (`Dataset.repeats`) for items that the user has met, but for the
    event's own. With item statistics the events come by time, and statistics are as of the first event of a batch,
    as in an index that was refreshed just before it. At most `SCORES` scores are held, and `CHUNK` pairs scored at a time.
    """
    log, total, length = data.log, len(data.catalogue), model.config.history_length
    rows = None if data.statistics else item_rows(model, params, data.catalogue)
    size = max(1, min(REQUESTS, SCORES // total))
    count = max(1, min(total, CHUNK // size))
    order = np.argsort(log.time[positions], kind="stable") if data.statistics else np.arange(len(positions))
    for number, places in enumerate(_filled(len(positions), size, label="rank")):
        at = order[places]
        here = positions[at]
        if data.statistics:
            then = data.statistics.at(np.arange(total), log.time[here[0]])
            with hidden():
                rows = item_rows(model, params, data.catalogue.with_statistics(then))
        states = _each(model.user, params, data.user_features(here, length=length))
        scores = np.empty((size, total), np.float32)
        for start in range(0, total, count):
            start = min(start, total - count)  # the last ones again, so that one shape is compiled
            scores[:, start : start + count] = _rank(params, states, rows, np.int32(start), model=model, count=count)
        target, each = log.item[here], np.arange(size)
        of_target = scores[each, target]
        scores[:, 0] = -np.inf
        if not data.repeats:
            met = data.history_log
            for row, start, end in zip(each, met.offsets[log.user[here]], data.history_log_end(here), strict=True):
                scores[row, met.item[start:end]] = -np.inf
        scores[each, target] = of_target
        left = len(positions) - number * size  # what is after them fills the last batch
        yield at[:left], scores[:left]


def rank_of(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return int64 [b], how many other scores [b, N] are at least that of the row [b]: ties count against it."""
    return (scores >= scores[np.arange(len(rows)), rows][:, None]).sum(1) - 1


def _filled(count: int, size: int, *, label: str) -> Iterable[np.ndarray]:
    """Return indices of `count` entries in batches of one size, for one compiled shape; the first ones fill the last batch."""
    return track((np.arange(-(-count // size) * size) % count).reshape(-1, size), label=label, unit="batches", leave=False)


@partial(jax.jit, static_argnums=0)
def _each(component: Callable[[Params, Any], Any], params: Params, features: UserFeatures | ItemFeatures) -> Any:
    """Return what the user or item function of a model makes of each of a batch."""
    return jax.vmap(component, (None, 0))(params, features)


@partial(jax.jit, static_argnames=("model", "count"))
def _rank(params: Params, states: UserState, rows: ItemRow, start: Any, *, model: PreRanker, count: int) -> jax.Array:
    """Return logits [B, count] of B users and the items from `start` on."""
    some = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, count), rows)
    logits = jax.vmap(model.interaction, (None, 0, None))(params, states, some)
    return logits if model.config.outputs == 1 else logits[..., 0]
