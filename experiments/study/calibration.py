"""Predicted against observed probabilities of `presets.aif`, by tenths of the prediction, before and after a calibration.

Claim     Trained on sampled negatives, probabilities are near what is observed; a calibration fitted on earlier events helps
          the unlikely candidates, not the likeliest tenth.
Command   python -m experiments.study.calibration --data DIR [--work DIR]      (or --smoke)
Time      a few minutes for a model that `question` has trained (--work); half an hour with its training
Protocol  MovieLens, the model of `question` on the validation split, seed 0. The calibration is fitted on requests of the next
          10 % of events and judged on the last 10 %: an event's item among 15 drawn by popularity, so 1 in 16 is a positive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aif_jax import Evaluation, Trained, train
from aif_jax.data import sample_positions
from experiments import common
from experiments.study import datasets, question, records
from experiments.study.question import AIF, EPOCHS, Trial

RECORD = Path("experiments/results/calibration/record.json")
REQUESTS = 1500
"""Requests that fit a calibration, and as many that judge it, drawn at random."""


def measure(data: datasets.StudyData, work: Path, *, requests: int) -> dict[str, Any]:
    """Return the record: figures before and after a calibration."""
    trial = Trial(dataset=data.name, model=AIF, epochs=1 if data.name == "smoke" else EPOCHS)
    (part,) = question.parts_of(trial, data)
    made = question.trained(trial, part, data, work=work)
    rng, log = np.random.default_rng(0), data.dataset.log
    held = [drawn(log, slice_, rng, requests) for slice_ in (data.split.validation, data.split.test)]
    record: dict[str, Any] = {"dataset": data.name, "model": trial.id, "requests": len(held[1]), "ways": {}}
    record["users"] = len(np.unique(log.user[held[1]]))
    raw = Trained(made.model, made.params, data.dataset.encoder)
    fitted = train.edits.calibration(raw, data.dataset, positions=held[0])
    for way, one in (("before", raw), ("logistic", fitted)):
        record["ways"][way] = figures(train.evaluate(made.model, one.params, data.dataset, held[1], k=None))
    return record


def drawn(log: Any, held: np.ndarray, rng: np.random.Generator, requests: int) -> np.ndarray:
    """Return at most so many of the events of a slice, of users with an earlier one."""
    able = np.intersect1d(held, sample_positions(log, min_history=question.MIN_HISTORY))
    return np.sort(rng.permutation(able)[:requests])


def figures(report: Evaluation) -> dict[str, Any]:
    """Return what the record keeps of an evaluation."""
    predicted, observed, entries = report.deciles[2:]
    tenths = {"predicted": predicted, "observed": observed, "deviations": np.sqrt(observed * (1 - observed) / entries)}
    rates = {"ratio": report.calibration, "error": report.calibration_error, "log_loss": report.log_loss}
    return records.rounded(tenths) | records.rounded(rates, digits=4)


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the record."""
    parser = common.parser(__doc__, data=True, work=question.WORK)
    parser.set_defaults(json=RECORD)
    options = parser.parse_args(arguments)
    data = datasets.load("smoke" if options.smoke else "movielens", options.data)
    made = measure(data, options.work, requests=100 if options.smoke else REQUESTS)
    rows = [(way, *(one[name] for name in ("ratio", "error", "log_loss"))) for way, one in made["ways"].items()]
    print(common.table(rows, ("calibration", "predicted / observed", "error", "log-loss")))
    common.write_json(options.json, made)


if __name__ == "__main__":
    main()
