"""Settings chosen on the validation slice, then one score file on the test slice; the same rule for every baseline.

The best trial has the largest sum of GAUC and HR@100 of requests whose item has a training event.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.peers import baselines, judge, scores
from experiments.peers.judge import SLICES, Slice
from experiments.peers.lists import Lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where a data set's lists and score files are.

    Attributes:
      folder: with a folder for each slice: its lists, and `scores/`; that of the validation slice holds the last trial's.
      lists: slice to its lists.
      slices: slice to what peers are judged on.
    """

    folder: Path
    lists: dict[str, Lists]
    slices: dict[str, Slice]

    def scores(self, slice_: str) -> Path:
        """Return the folder of a slice's score files."""
        return self.folder / slice_ / "scores"

    def trials(self, name: str) -> Path:
        """Return the file with the trials of a peer."""
        return self.folder / "trials" / f"{name}.json"

    def read(self, name: str, slice_: str = "test") -> scores.Scores:
        """Return the score files of a model; errors as `scores.read`."""
        return scores.read(self.scores(slice_), name, self.lists[slice_])


Write = Callable[[str, dict[str, Any], str], None]
"""`write(slice, settings, name)` makes a score file of that name."""


def tuned(name: str, workplace: Workplace, trials: tuple[dict[str, Any], ...], write: Write) -> None:
    """Write the test slice's score file of a peer with the best settings tried; does nothing where that was done.

    Args:
      name: of the peer.
      workplace: where everything is.
      trials: settings that are tried.
      write: makes a score file.
    """
    validation, test = SLICES
    if name in scores.names(workplace.scores(test)) and "trials" in workplace.read(name).about:
        return
    path = workplace.trials(name)
    tried: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for settings in trials:
        if any(trial["settings"] == settings for trial in tried):
            continue
        write(validation, settings, name)
        powers, figures = judge.best_powers(workplace.read(name, validation), workplace.slices[validation])
        tried.append({"settings": settings, "powers": powers, "figures": figures})
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(tried, indent=1) + "\n", encoding="utf-8")
        shown = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
        print(f"{name}, {settings}: {shown}", flush=True)
    best = max(tried, key=lambda trial: sum(trial["figures"].values()))
    write(test, best["settings"], name)
    about = workplace.read(name).about | {"chosen": best["settings"], "powers": best["powers"], "trials": tried}
    (workplace.scores(test) / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def baseline(name: str, workplace: Workplace) -> None:
    """Tune a closed-form baseline."""
    function, trials = baselines.BASELINES[name]

    def write(slice_: str, settings: dict[str, Any], file: str) -> None:
        lists = workplace.lists[slice_]
        about = {"settings": settings, "versions": baselines.versions(name), "seed": 0}
        scores.write(workplace.scores(slice_), file, lists, function(lists, **settings), about)

    tuned(name, workplace, trials, write)
