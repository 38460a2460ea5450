"""What rules without training get under the protocol of `question`: popularity, and "what you have met, the latest first".

Claim     A rule shows what of a model's figures is telling new items, and what is remembering the met ones.
Command   python -m experiments.study.rules --data DIR
Protocol  `question`'s. Rules read what models read: training events for popularity, the user's strictly earlier events for
          what is met. Items without a training event come last.
Measured  in experiments/results/question/, one record a rule
"""

from __future__ import annotations

import numpy as np

from aif_jax import EventLog, metrics
from aif_jax.data.negatives import item_counts
from experiments import common
from experiments.study import datasets, question
from experiments.study.question import Part, Trial

POPULARITY, UNPOPULARITY = "rule, most popular first", "rule, least popular first"
MET_FIRST, MET_UNPOPULAR = (f"rule, met items, the latest first, then {then} popular" for then in ("most", "least"))
RULES = (POPULARITY, UNPOPULARITY, MET_FIRST, MET_UNPOPULAR)
AHEAD = 1e9
"""What sets a met item ahead of every count of popularity."""


def scores(rule: str, log: EventLog, positions: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Return scores of the catalogue for the user of each event, float64 [R, N]; `popularity` [N] counts training events."""
    sign = -1.0 if rule in (UNPOPULARITY, MET_UNPOPULAR) else 1.0
    made = np.repeat(sign * popularity[None].astype(np.float64), len(positions), 0)
    if rule in (MET_FIRST, MET_UNPOPULAR):
        for row, at in enumerate(positions):
            start = log.offsets[log.user[at]]
            met = slice(start, start + np.searchsorted(log.time[start:at], log.time[at]))
            np.maximum.at(made[row], log.item[met], AHEAD + np.arange(met.stop - met.start))
    return made


def evaluate(rule: str, trial: Trial, part: Part, data: datasets.StudyData) -> dict[str, metrics.ByUser]:
    """Return the metrics of `question.evaluate`, by user."""
    log, requests = data.dataset.log, question.requests_of(trial, part, data)
    popularity = item_counts(data.dataset, part.seen)
    step = 100  # requests whose whole catalogue is in memory
    sampled = np.concatenate([
        np.take_along_axis(scores(rule, log, requests.positions[i : i + step], popularity), requests.rows[i : i + step], 1)
        for i in range(0, len(requests.rows), step)
    ])  # fmt: skip
    found = question.sampled_metrics(sampled, requests, data, popularity)
    at = question.catalogue_requests(requests)
    blocks = (np.arange(i, min(i + step, len(at))) for i in range(0, len(at), step))
    scored = ((rows, question.hide_met(scores(rule, log, at[rows], popularity), at[rows], data)) for rows in blocks)
    offsets = [np.zeros(len(popularity))] * len(question.UNTRAINED)  # a rule has none to choose
    return found | question.catalogue_metrics(scored, at, data, popularity, offsets)


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Judge every rule on the test split of both data sets."""
    parser = common.parser(__doc__, data=True, results=question.RESULTS)
    parser.add_argument("--dataset", nargs="+", default=["movielens", "taobao"], help="data sets (default %(default)s)")
    options = parser.parse_args(arguments)
    figures: dict[str, dict[str, float]] = {}
    for name in ["smoke"] if options.smoke else options.dataset:
        data = datasets.load(name, options.data)
        for rule in RULES:
            trial = Trial(dataset=name, model=rule, split="test", epochs=0)
            (part,) = question.parts_of(trial, data)
            found = evaluate(rule, trial, part, data)
            record = question.keep(options.results, trial, found, met_items=question.met_share(trial, part, data))
            figures[trial.id] = {metric: record["figures"][metric] for metric in ("gauc", "gauc_trained", "hr100_trained")}
    common.report(figures, options.json)


if __name__ == "__main__":
    main()
