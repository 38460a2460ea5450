"""Sources of candidates from a cascade: lists for training, so many of each stage, and whole requests for evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aif_jax.checks import expect
from aif_jax.data.candidates import CandidateLists, CandidateSource, SampleKey
from aif_jax.data.cascade import LOGGED, STAGE, STAGES, Cascade
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler, SeenPairs
from aif_jax.store.version import digest

CHOICE = 4  # stream of random numbers: which candidates of a stage, which of other samples


def logged(dataset: Dataset, *, repeats: bool | None = None) -> CandidateSource:
    """All candidates of requests with stage and labels by name; positions are those of `dataset.cascade`.

    Args:
      dataset: the data, with a cascade.
      repeats: whether users come back to items; None takes `dataset.repeats`. If not, candidates that were not shown and that
        the user has met strictly before the request are left out: a filter does it in serving.

    Raises:
      ValueError: data without a cascade.
    """
    cascade, repeats = _cascade(dataset), dataset.repeats if repeats is None else repeats

    def lists(positions: np.ndarray, draw: SampleKey) -> CandidateLists:
        at = cascade.at(positions)
        rows = cascade.rows[at] if repeats else _unmet(dataset, cascade, at)[0]
        return CandidateLists(rows, cascade.taken(at, slice(None)))

    return CandidateSource(lists, {"kind": "logged", **_description(cascade), **({} if repeats else {"repeats": False})})


def staged(
    dataset: Dataset, counts: Mapping[str, int], *, sampler: NegativeSampler | None = None, repeats: bool | None = None
) -> CandidateSource:
    """Lists for training: so many candidates of each stage, drawn anew for every batch.

    Args:
      dataset: the data, with a cascade.
      counts: candidates by stage, such as {"exposed": 8, "ranked": 8, "retrieved": 16, "in_batch": 4, "sampled": 4}. A request
        with fewer of a stage gives all of them. In-batch and sampled candidates that are in the request are left out.
      sampler: of "sampled" ones, from training counts.
      repeats: as for `logged`; if users do not come back, in-batch and sampled candidates that they have met are left out too.

    Returns:
      A source whose positions are the cascade's. Labels of in-batch and sampled candidates are NaN: the log knows none.

    Raises:
      ValueError: data without a cascade, an unknown stage, no candidates, or sampled ones without a sampler.
    """
    cascade, repeats = _cascade(dataset), dataset.repeats if repeats is None else repeats
    unknown = sorted(set(counts) - set(STAGES))
    good = not unknown and all(isinstance(n, int) and n >= 0 for n in counts.values()) and sum(counts.values()) > 0
    expect(good, "counts", f"numbers of candidates by stage of {STAGES}", dict(counts))
    has_sampler = sampler is not None or not counts.get("sampled")
    expect(has_sampler, "sampler", "a NegativeSampler for the stage 'sampled'", None)
    wanted = [(code, counts[stage]) for code, stage in enumerate(LOGGED) if counts.get(stage)]
    exposed = STAGES.index("exposed")

    def lists(positions: np.ndarray, draw: SampleKey) -> CandidateLists:
        at = cascade.at(positions)
        rng = np.random.default_rng(np.random.SeedSequence(draw.seed, spawn_key=(CHOICE, draw.epoch, draw.step)))
        rows, stage = cascade.rows[at], cascade.stage[at]
        candidates, met = (rows, None) if repeats else _unmet(dataset, cascade, at)
        order = rng.random(rows.shape)
        parts, labels = [], []
        for code, count in wanted:
            rank = np.where((candidates > 0) & (stage == code), order, 2.0)
            places = np.argsort(rank, axis=1, kind="stable")[:, :count]
            there = np.take_along_axis(rank, places, 1) < 2
            parts.append(np.where(there, np.take_along_axis(rows, places, 1), 0))
            labels.append(cascade.taken(at[:, None], places))
        for kind in ("in_batch", "sampled"):
            if not (count := counts.get(kind, 0)):
                continue
            if kind == "sampled":
                assert sampler is not None
                drawn = sampler.sample(len(at), count, **draw._asdict())
            else:
                shown = rows[(rows > 0) & (stage == exposed)]
                drawn = rng.choice(shown, (len(at), count)) if len(shown) else np.zeros((len(at), count), np.int32)
            own = (drawn[:, :, None] == rows[:, None, :]).any(axis=2)
            drawn = np.where(own, 0, drawn).astype(np.int32)
            parts.append(drawn if met is None else met.dropped(drawn))
            nothing = np.full(drawn.shape, np.nan, np.float32)
            code = np.full(drawn.shape, STAGES.index(kind), np.float32)
            labels.append({STAGE: code} | dict.fromkeys(cascade.labels, nothing))
        joined = {key: np.concatenate([part[key] for part in labels], axis=1) for key in (STAGE, *cascade.labels)}
        return CandidateLists(np.concatenate(parts, axis=1), joined)

    chosen: dict[str, object] = {"counts": dict(counts), "sampler": None if sampler is None else sampler.digest}
    chosen |= {} if repeats else {"repeats": False}
    return CandidateSource(lists, {"kind": "staged", **_description(cascade), **chosen})


def _cascade(dataset: Dataset) -> Cascade:
    expect(dataset.cascade is not None, "Dataset.cascade", "a Cascade, as `with_cascade` gives", None)
    return dataset.cascade  # type: ignore[return-value]


def _unmet(dataset: Dataset, cascade: Cascade, at: np.ndarray) -> tuple[np.ndarray, SeenPairs]:
    """Rows [B, M] without the candidates that were not shown and that the user has met before; and what each user has met."""
    met = SeenPairs.before(dataset.log, cascade.positions[at])
    return met.dropped(cascade.rows[at], kept=cascade.stage[at] == STAGES.index("exposed")), met


def _description(cascade: Cascade) -> dict[str, object]:
    step = max(1, len(cascade) // 4096)
    parts = {name: getattr(cascade, name) for name in ("positions", "rows", "stage")}
    digests = ({name: digest(v[::step]).sha256 for name, v in sorted(group.items())} for group in (parts, cascade.labels))
    return {"requests": len(cascade), **dict(zip(("sha256", "labels"), digests, strict=True))}
