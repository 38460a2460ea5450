"""Does it rank better? The figures of the first study, under its own protocol, and those that replace them.

Claim     On next-item MovieLens the full AIF model ranks better than a tuned two-tower model and than COLD, and keeps the gain
          of the sequential ceiling; each block gains where its signal is planted in a synthetic world.
Command   python -m experiments.ablation --json ablation.json
Protocol  experiments/notes/study.md, the old one: met items are negatives. `experiments.study.question` replaces it; its
          figures are under the key "preset" of --json.
Records   experiments/results/old_protocol/: one line a run, `figures.json` with their means over seeds, and the tables in
          experiments/notes/study_tables.md. Commit 0289d29 has the scripts that trained the models and wrote all three.
"""

from __future__ import annotations

import json

from experiments import common
from experiments.study import question, records

FIGURES = records.RESULTS / "figures.json"
TABLES = records.RESULTS.parents[1] / "notes" / "study_tables.md"


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Prints the tables and writes the JSON file."""
    settings = {"report_only": (False, None, "tables from the records, which is all that there is")}
    options = common.options(__doc__, arguments, settings)
    print(TABLES.read_text(encoding="utf-8"))
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    common.write_json(options.json, figures | {"preset": question.keys(question.RESULTS)})


if __name__ == "__main__":
    main()
