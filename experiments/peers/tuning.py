"""Settings chosen on the validation slice, then one score file on the test slice; the same rule for every peer.

The best trial has the largest sum of GAUC and HR@100, both corrected: what a pre-ranker orders and what a catalogue asks for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.peers import baselines, outcomes, scores
from experiments.peers.export import SLICES
from experiments.peers.feeds.__main__ import FEEDS
from experiments.peers.figures import figures, level
from experiments.peers.lists import Lists

ROOT = Path(__file__).resolve().parents[2]
RATES = (0.001, 0.003, 0.01)  # learning rates that are tried, of every trained peer
TEMPERATURES = {"rechub-youtubednn": (0.05, 0.1)}  # the same of peers that have one, next to their package's example
JUDGED = ("gauc corrected", "hr@100 corrected")  # figures whose sum a trial is judged by
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Processor seconds of training: of each trial of a trained peer, and of one more trial of the best, which may win."""

    trial: float = 120.0
    longer: float = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where a data set's lists and score files are.

    Attributes:
      folder: with a folder for each slice: its lists, and `scores/`; that of the validation slice holds the last trial's.
      lists: slice to its lists.
    """

    folder: Path
    lists: dict[str, Lists]

    def scores(self, slice_: str) -> Path:
        """The folder of a slice's score files."""
        return self.folder / slice_ / "scores"

    def trials(self, name: str) -> Path:
        """The file with the trials of a peer."""
        return self.folder / "trials" / f"{name}.json"

    def read(self, name: str, slice_: str = "test") -> scores.Scores:
        """The score files of a model; errors as `scores.read`."""
        found = self.lists[slice_]
        return scores.read(self.scores(slice_), name, requests=len(found.target), items=len(found.count))


Stages = tuple[tuple[dict[str, Any], ...], ...]
Write = Callable[[str, dict[str, Any], str], None]
"""`write(slice, settings, name)` makes a score file of that name."""


def tuned(name: str, workplace: Workplace, stages: Stages, write: Write) -> None:
    """Writes the test slice's score file of a peer with the best settings tried; does nothing where that was done.

    Args:
      name: of the peer.
      workplace: where everything is.
      stages: of settings; each is tried over the best settings before it. A single one in all is not tried.
      write: makes a score file.
    """
    validation, test = SLICES
    if name in scores.names(workplace.scores(test)) and "chosen" in workplace.read(name).about:
        return
    alone = sum(map(len, stages)) == 1
    tried, best = ([], stages[0][0]) if alone else (_read(workplace.trials(name)), {})
    for changes in () if alone else stages:
        for settings in [best | change for change in changes]:
            if any(trial["settings"] == settings for trial in tried):
                continue
            write(validation, settings, name)
            tried.append({"settings": settings, **judged(workplace.read(name, validation), workplace.lists[validation])})
            workplace.trials(name).parent.mkdir(exist_ok=True)
            workplace.trials(name).write_text(json.dumps(tried, indent=1) + "\n", encoding="utf-8")
            shown = ", ".join(f"{key} {value:.4f}" for key, value in tried[-1].items() if key != "settings")
            print(f"{name}, {settings}: {shown}", flush=True)
        best = max(tried, key=lambda trial: sum(trial[figure] for figure in JUDGED))["settings"]
    write(test, best, name)
    path = workplace.scores(test) / f"{name}.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(about | {"chosen": best, "trials": tried}, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> list[dict[str, Any]]:
    """Trials that were done before, [] where there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def judged(found: scores.Scores, lists: Lists) -> dict[str, float]:
    """GAUC and HR@100, as asked and corrected."""
    made = figures(lists, outcomes.outcomes(lists, found))
    return {name: level(made[name]) for name in ("gauc asked", "hr@100 asked", *JUDGED)}


def baseline(name: str, workplace: Workplace) -> None:
    """A closed-form baseline, tuned."""
    function, trials = baselines.BASELINES[name]

    def write(slice_: str, settings: dict[str, Any], file: str) -> None:
        made = function(workplace.lists[slice_], **settings)
        about = {"settings": settings, "versions": baselines.versions(name), "seed": 0}
        scores.write_catalogue(workplace.scores(slice_), file, made, about)

    tuned(name, workplace, (trials,), write)


def trained(name: str, workplace: Workplace, python: str, budget: Budget, *, seed: int = 0) -> None:
    """A peer's model, tuned, in the Python that has its package, with one thread.

    Raises:
      RuntimeError: its feed failed; the message ends with what it printed.
    """
    if name not in FEEDS:
        raise ValueError(f"peer: expected one of {tuple(FEEDS)}, got {name!r}")

    def write(slice_: str, settings: dict[str, Any], file: str) -> None:
        command = [python, "-m", "experiments.peers.feeds", name, str(workplace.folder / slice_), str(workplace.scores(slice_))]
        command += ["--file", file, "--seed", str(seed)]
        for key, value in settings.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: its feed failed in {python}:\n{(done.stdout + done.stderr)[-2000:]}")

    rates = tuple({"learning_rate": rate, "core_seconds": budget.trial} for rate in RATES)
    temperatures = tuple({"temperature": temperature} for temperature in TEMPERATURES.get(name, ()))
    tuned(name, workplace, (rates, temperatures, ({"core_seconds": budget.longer},)), write)
