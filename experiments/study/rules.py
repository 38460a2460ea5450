"""What rules without training get under the protocol of `question`: popularity, and "what you have met, the latest first".

Claim     A rule shows what of a model's figures is telling new items, and what is remembering the met ones.
Command   python -m experiments.study.rules --data DIR
Protocol  `question`'s. Rules read what models read: training events for popularity, the user's strictly earlier events for
          what is met. Items without a training event come last.
Measured  in experiments/results/question/, one record a rule
"""

from __future__ import annotations

import numpy as np

from experiments import common
from experiments.peers import judge
from experiments.peers.judge import Lists, Scorer
from experiments.study import datasets, question
from experiments.study.question import Trial

MET = "rule, met items, the latest first, then"
RULES = {"rule, most popular first": (False, 1), f"{MET} most popular": (True, 1), f"{MET} least popular": (True, -1)}
"""Name to whether what the user has met comes first, and the sign of popularity."""


def scorer(rule: str, lists: Lists) -> Scorer:
    """Return the scores of the catalogue by a rule."""
    met_first, sign = RULES[rule]

    def scores(places: np.ndarray) -> np.ndarray:
        found = np.repeat(sign * lists.count[None], len(places), 0)
        for row, place in enumerate(places if met_first else ()):
            met = lists.item[lists.start[place] : lists.end[place]]
            np.maximum.at(found[row], met, 1 + lists.count.max() + np.arange(len(met)))
        return found

    return scores


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Judge every rule on the test split of both data sets."""
    options = common.parser(__doc__, data=True, results=question.RESULTS).parse_args(arguments)
    figures: dict[str, dict[str, float]] = {}
    for name in ("smoke",) if options.smoke else question.PUBLIC:
        on = judge.slice_of(datasets.load(name, options.data), "test")
        lists = judge.lists_of(on)
        for rule in RULES:
            trial = Trial(dataset=name, model=rule, split="test", epochs=0)
            found = judge.judged(judge.scored(scorer(rule, lists), on), on, {})
            record = question.keep(options.results, trial, found, met_items=question.met_share(on))
            figures[trial.id] = {metric: record["figures"][metric] for metric in ("gauc", "gauc_trained", "hr100_trained")}
    common.report(figures, options.json)


if __name__ == "__main__":
    main()
