"""The headline of the study: tables and figures from the records in `experiments/results/question`.

Claim     Over a two-tower model, and over one with matching statistics, `presets.aif` ranks better on MovieLens and on Taobao.
Command   python -m experiments.ablation --report-only --json ablation.json
Time      seconds; `experiments.study.question` trains the models and writes the records
Protocol  `experiments.study.question`
"""

from __future__ import annotations

from experiments import common
from experiments.study import question


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Print the tables and write the JSON file."""
    settings = {"report_only": (False, None, "tables from the records, which is all that there is")}
    options = common.options(__doc__, arguments, settings)
    print(question.report(question.RESULTS))
    common.write_json(options.json, {"preset": question.keys(question.RESULTS)})


if __name__ == "__main__":
    main()
