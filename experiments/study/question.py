"""Does it rank better, asked rightly: met items, equal budgets, errors over users.

Claim     Over a two-tower model, and over one with matching statistics, `presets.aif` ranks better on MovieLens and on Taobao.
Command   python -m experiments.study.question --data DIR --plan validation
          (--plan test: the models of the headline; --list: the runs that are missing; --report: tables from the records)
Protocol  Met items. MovieLens users never come back to a film (`repeats` is False there): films that the user has rated are no
          negatives, neither in training nor in evaluation, and are left out of the catalogue. Taobao users do come back: met
          items stay. Every record also holds the figures of the other kind of candidates.
          Budget. Every model gets the same recipe, optimizer, number of steps and sizes; hyperparameters are chosen on the
          validation split. Additions after training (popularity correction, SVD term) are on all models or on none.
          Errors. 95 % intervals resample users; two models are compared on the same draws. Spreads over seeds stand apart.
Measured  in experiments/results/question/, one record a run and one file with its figures by user.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import blocks, checkpoint, metrics, train
from aif_jax.blocks import MatchingStatistics
from aif_jax.blocks.item_offset import popularity_offset
from aif_jax.data import candidates
from aif_jax.data.pipeline import Pipeline
from aif_jax.data.sampling import NegativeSampler, Seen, item_counts
from aif_jax.data.split import eligible
from aif_jax.metrics import ByUser
from aif_jax.train.edits import fit_pure_svd
from aif_jax.train.evaluate import catalogue_scores, rank_of
from aif_jax.train.loop import loop
from aif_jax.types import Params
from experiments import common
from experiments.study import datasets, models, recipes, records
from experiments.study.evaluation import Requests, held_out, sampled_scores

RESULTS = records.RESULTS / "question"
EACH = "every behaviour field"
MATCHING = MatchingStatistics((EACH,))
WIDE = dict(long_length=512)
SIM, TIERS = models.SIM, models.WINDOWED
MODELS: dict[str, dict[str, Any]] = {
    "two-tower": dict(head=(), blocks=(models.DOT,)),
    "two-tower with a head": dict(blocks=(models.DOT,)),
    "two-tower with matching statistics": dict(blocks=(MATCHING, models.DOT), **WIDE),
    "aif": dict(blocks=(MATCHING, models.BEA, models.LEARNED, models.DOT), **WIDE),
    "aif before": dict(blocks=(models.BEA, SIM, models.LEARNED, TIERS, models.DOT), **WIDE),
    "aif without matching statistics": dict(blocks=(models.BEA, models.LEARNED, models.DOT), **WIDE),
    "aif without BEA": dict(blocks=(MATCHING, models.LEARNED, models.DOT), **WIDE),
    "aif without linear memory": dict(blocks=(MATCHING, models.BEA, models.DOT), **WIDE),
    "aif with SIM": dict(blocks=(MATCHING, models.BEA, SIM, models.LEARNED, models.DOT), **WIDE),
    "aif with SimTier": dict(blocks=(MATCHING, models.BEA, models.LEARNED, TIERS, models.DOT), **WIDE),
    "full attention": dict(
        blocks=(MATCHING, blocks.CrossAttention(dot_product=True), blocks.TargetAttention(dot_product=True), models.DOT), **WIDE
    ),
}
BASE, WITH_MATCHING, AIF = "two-tower", "two-tower with matching statistics", "aif"
SEEDS = (0, 1, 2)
CATALOGUE_REQUESTS = {"movielens": 3000}
"""How many requests rank the whole catalogue on the test split; elsewhere 1,000, drawn at random."""
FIXED: dict[str, Any] = dict(learning_rate=1e-2, weight_decay=0.1)
NEGATIVES = 15
UNTRAINED = (-100.0, 0.0, 1.0, 2.0, 3.0)
"""Offsets of items without a training event under the popularity correction; each model takes its best one of the validation
split, and keeps it on the test split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What names a run; hyperparameters are those of FIXED unless said."""

    dataset: str
    model: str
    seed: int = 0
    split: str = "validation"
    epochs: int = 1
    learning_rate: float = FIXED["learning_rate"]
    weight_decay: float = FIXED["weight_decay"]
    met: str = "by the data"  # or "kept": met items are negatives in training, whatever the data say

    @property
    def id(self) -> str:
        """The name of the record."""
        parts = [self.dataset, self.split, self.model, f"epochs={self.epochs}"]
        parts += [f"{name}={getattr(self, name):g}" for name, usual in FIXED.items() if getattr(self, name) != usual]
        parts += ["met items kept"] if self.met == "kept" else []
        return "/".join([*parts, f"seed {self.seed}"])

    @property
    def file(self) -> str:
        """The id as a file's name."""
        return self.id.replace("/", "--").replace(" ", "_").replace("=", "")


def plan(name: str) -> list[Trial]:
    """The runs of a plan, the most telling first."""
    both = ("movielens", "taobao")
    if name == "validation":
        first = [Trial(dataset=on, model=model) for model in (BASE, WITH_MATCHING, AIF, "aif before") for on in both]
        others = [Trial(dataset=on, model=model) for model in MODELS for on in both]
        kept = [Trial(dataset="movielens", model=model, met="kept") for model in (BASE, "aif before", AIF)]
        return list(dict.fromkeys([*first, *others, *kept]))
    if name == "tuning":
        tried = (BASE, WITH_MATCHING, AIF)
        settings: tuple[dict[str, Any], ...] = (dict(epochs=2), dict(epochs=3), dict(epochs=2, learning_rate=5e-3))
        return [Trial(dataset=on, model=model, **options) for options in settings for model in tried for on in both]
    if name == "test":
        tried = (BASE, WITH_MATCHING, AIF)
        return [
            Trial(dataset=on, model=model, seed=seed, split="test", epochs=2)
            for seed in SEEDS
            for model in tried
            for on in both
        ]
    if name == "smoke":
        return [Trial(dataset="smoke", model=model) for model in (BASE, WITH_MATCHING, AIF)]
    raise ValueError(f"plan: expected 'validation', 'tuning', 'test' or 'smoke', got {name!r}")


def config_of(trial: Trial, data: datasets.StudyData) -> aif.Config:
    """The config of a run's model on its data set."""
    fields = dict(MODELS[trial.model])
    schema, smoke = data.dataset.schema, trial.dataset == "smoke"
    made: list[Any] = []
    for block in fields.pop("blocks"):
        if block == MATCHING:
            block = MatchingStatistics(schema.behaviour_fields)
        each = [dataclasses.replace(block, field=field) for field in data.sim_fields] if block == SIM else [block]
        made += each
    if smoke and "long_length" in fields:
        fields["long_length"] = models.SMOKE["long_length"]
    return aif.Config(schema=schema, blocks=tuple(made), **(models.SIZES | (models.SMOKE if smoke else {}) | fields))


def train_model(trial: Trial, data: datasets.StudyData, *, progress: bool) -> tuple[aif.PreRanker, Params, dict[str, Any]]:
    """The trained model and what is said of the training."""
    dataset, seen = data.dataset, trained_on(trial, data)
    model = aif.build(config_of(trial, data))
    repeats = data.repeats or trial.met == "kept"
    feed = Pipeline(
        dataset=dataset, positions=eligible(dataset.log, seen, min_history=1), config=model.config, seed=trial.seed,
        candidates=candidates.sampled(
            dataset, sampler=NegativeSampler(item_counts(dataset, seen)), negatives=NEGATIVES, repeats=repeats
        ),
        batch_size=64 if trial.dataset == "smoke" else 256, epochs=trial.epochs,
        buckets=recipes.shorter(model.config.history_length),
    )  # fmt: skip
    optimizer = train.default_optimizer(len(feed), learning_rate=trial.learning_rate, weight_decay=trial.weight_decay)
    fitted = aif.fit_tables(model.config, dataset.catalogue, seed=0)
    state = train.init_state(model.init(jax.random.key(trial.seed), None, fitted=fitted), optimizer)
    step, began = train.make_step(model, optimizer, loss=recipes.loss(recipes.DEFAULT)), time.perf_counter()
    state = loop(state, step, feed.batches(), total=len(feed), label=trial.id, progress=progress)
    params = jax.block_until_ready(state.params)
    return model, params, {"steps": int(state.step), "train_seconds": time.perf_counter() - began}


def trained_on(trial: Trial, data: datasets.StudyData) -> np.ndarray:
    """Positions of the training events: for the test split those of the validation split too."""
    parts = data.split
    return parts.train if trial.split == "validation" else np.sort(np.concatenate([parts.train, parts.validation]))


def requests_of(trial: Trial, data: datasets.StudyData) -> Requests:
    """The held-out requests, the same for every model and seed, with 99 sampled negatives, met items among them."""
    held = data.split.validation if trial.split == "validation" else data.split.test
    sampler = NegativeSampler(item_counts(data.dataset, trained_on(trial, data)))
    return held_out(data.dataset, held, sampler, requests=64 if trial.dataset == "smoke" else 3000)


def evaluate(
    trial: Trial, model: aif.PreRanker, params: Params, data: datasets.StudyData, *, progress: bool
) -> dict[str, ByUser]:
    """Metrics by user: `gauc` of the data's kind of candidates, and of both kinds; `met` against met items; hit rates."""
    dataset, requests = data.dataset, requests_of(trial, data)
    scores = sampled_scores(model, params, dataset, requests, progress=progress)
    users = dataset.log.user[requests.positions][:, None]
    sample = np.arange(len(requests.rows))[:, None]
    met = Seen.before(dataset.log, requests.positions).contains(sample, requests.rows)
    known = (scores, requests.labels, users)
    against_met = met | (requests.labels == 1)
    found = {
        "gauc_all": metrics.gauc_by_user(*known),
        "gauc_unmet": metrics.gauc_by_user(*known, where=~met),
        "gauc_met": metrics.gauc_by_user(*known, where=against_met),
    }
    found["gauc"] = found["gauc_all" if data.repeats else "gauc_unmet"]
    counts = item_counts(dataset, trained_on(trial, data))
    few = CATALOGUE_REQUESTS.get(trial.dataset, 1000) if trial.split == "test" else 1000
    at = np.sort(np.random.default_rng(2).permutation(requests.positions)[:few])
    ranks = np.zeros((len(UNTRAINED), len(at)), np.int64)
    given: dict[str, Any] = dict(repeats=data.repeats, batch_size=4, progress=progress)
    for rows, every in catalogue_scores(model, params, dataset, at, **given):
        for place, untrained in enumerate(UNTRAINED):
            offset = popularity_offset(counts, untrained=untrained)
            ranks[place, rows] = rank_of(every + offset, dataset.log.item[at[rows]])
    owners = dataset.log.user[at]
    for place, untrained in enumerate(UNTRAINED):
        for k in (10, 100):
            found[f"hr{k}@{untrained:g}"] = metrics.mean_by_user((ranks[place] < k).astype(float), owners)
    return found


def run(trial: Trial, data: datasets.StudyData, *, results: Path, work: Path, progress: bool) -> dict[str, Any]:
    """Trains, evaluates, keeps the model in `work` and the figures in `results`."""
    began, folder = time.perf_counter(), work / trial.file
    if folder.exists():  # trained before, evaluated otherwise
        config, said = config_of(trial, data), json.loads((work / f"{trial.file}.json").read_text(encoding="utf-8"))
        model, params = aif.build(config), checkpoint.load(folder).params
    else:
        model, params, said = train_model(trial, data, progress=progress)
        checkpoint.save(folder, aif.Trained(model, params))
        (work / f"{trial.file}.json").write_text(json.dumps(said), encoding="utf-8")
    found = evaluate(trial, model, params, data, progress=progress)
    if not data.repeats:
        seen, log = trained_on(trial, data), data.dataset.log
        with_svd, config = fit_pure_svd(params, log.user[seen], log.item[seen], config=model.config)
        added = evaluate(trial, aif.build(config), with_svd, data, progress=progress)
        found |= {f"{name}_svd": value for name, value in added.items()}
    by_user = results / "by_user"
    by_user.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}.{part}": value for name, one in found.items() for part, value in pack(one).items()}
    np.savez_compressed(by_user / f"{trial.file}.npz", **arrays)  # type: ignore[arg-type]
    record = {
        "id": trial.id, **dataclasses.asdict(trial), "figures": {name: one.mean for name, one in found.items()},
        "users": len(found["gauc"].users), "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), **said,
        "seconds": time.perf_counter() - began, "commit": common.machine()["commit"],
    }  # fmt: skip
    records.append(results, record)
    return record


def pack(metric: ByUser) -> dict[str, np.ndarray]:
    """The arrays of a metric, small."""
    return {
        "users": metric.users.astype(np.int32),
        "values": metric.values.astype(np.float32),
        "weights": metric.weights.astype(np.int32),
    }


def by_user(results: Path, record: dict[str, Any], name: str) -> ByUser:
    """A metric of a run by user, from its file."""
    fields = {field.name for field in dataclasses.fields(Trial)}
    file = results / "by_user" / f"{Trial(**{key: value for key, value in record.items() if key in fields}).file}.npz"
    with np.load(file) as arrays:
        users, values, weights = (arrays[f"{name}.{part}"] for part in ("users", "values", "weights"))
    return ByUser(users.astype(np.int64), values.astype(np.float64), weights.astype(np.float64))


def over_seeds(parts: list[ByUser]) -> ByUser:
    """The mean over trainings of each user's metric: users are the same in all."""
    return ByUser(parts[0].users, np.mean([part.values for part in parts], 0), parts[0].weights)


def main(arguments: list[str] | None = None) -> None:
    """Does the missing runs of a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", type=Path, help="the folder that holds the data sets' folders")
    parser.add_argument(
        "--plan", nargs="+", default=["validation"], help="validation, tuning, test, smoke (default validation)"
    )
    parser.add_argument("--dataset", nargs="+", help="only these data sets")
    parser.add_argument("--model", nargs="+", help="only these models")
    parser.add_argument("--results", metavar="DIR", type=Path, default=RESULTS, help="records (default %(default)s)")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path("out/question"), help="models (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the runs that are missing and stop")
    parser.add_argument("--report", action="store_true", help="print tables from the records and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    if options.report:
        print(report(options.results))
        return
    loaded: dict[str, datasets.StudyData] = {}
    for trial in (trial for name in options.plan for trial in plan(name)):
        if trial.id in records.read(options.results):
            continue
        if (options.dataset and trial.dataset not in options.dataset) or (options.model and trial.model not in options.model):
            continue
        if options.list:
            print(trial.id)
            continue
        if trial.dataset not in loaded:
            loaded[trial.dataset] = datasets.load(trial.dataset, options.data)
        made = run(trial, loaded[trial.dataset], results=options.results, work=options.work, progress=not options.quiet)
        figures = made["figures"]
        best = max(figures[f"hr100@{untrained:g}"] for untrained in UNTRAINED)
        kinds = f"all {figures['gauc_all']:.4f}, unmet {figures['gauc_unmet']:.4f}"
        print(
            f"{trial.id}: GAUC {figures['gauc']:.4f} ({kinds}), HR@100 {best:.3f}, {made['train_seconds']:.0f} s of training",
            flush=True,
        )
        jax.clear_caches()


def chosen(found: dict[str, dict[str, Any]], record: dict[str, Any]) -> float:
    """The offset of untrained items with the best HR@100 on the validation split, one training of this model and data set."""
    same = [
        r
        for r in found.values()
        if (r["dataset"], r["model"], r["split"]) == (record["dataset"], record["model"], "validation")
    ]
    figures = (same or [record])[-1]["figures"]
    return max(UNTRAINED, key=lambda untrained: figures[f"hr100@{untrained:g}"])


def report(results: Path) -> str:
    """Each model with its interval over users and its paired difference to the two baselines, by data set and split."""
    lines, found = [], records.read(results)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in found.values():
        key = (record["dataset"], record["split"], f"epochs={record['epochs']}", record["met"], f"{record['learning_rate']:g}")
        groups.setdefault((*key, record["model"]), []).append(record)
    for key, runs in sorted(groups.items()):
        cells = [f"{', '.join(key[:-1])}: {key[-1]} ({len(runs)} seeds)"]
        for name in ("gauc", f"hr100@{chosen(found, runs[0]):g}"):
            ours = over_seeds([by_user(results, record, name) for record in runs])
            spread = np.std([record["figures"][name] for record in runs], ddof=1) if len(runs) > 1 else float("nan")
            inside = metrics.user_interval(ours)
            cells.append(f"{name} {inside.value:.4f} [{inside.low:.4f}, {inside.high:.4f}] seeds ±{spread:.4f}")
            for other in (BASE, WITH_MATCHING):
                if (*key[:-1], other) in groups and key[-1] != other:
                    theirs = groups[(*key[:-1], other)]
                    named = name if name == "gauc" else f"hr100@{chosen(found, theirs[0]):g}"
                    base = over_seeds([by_user(results, record, named) for record in theirs])
                    gap = metrics.paired_interval(ours, base, ratio=name != "gauc")
                    cells.append(f"   against {other}: {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]")
        lines.append("\n  ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("out/question/compiled").absolute()))
    main()
