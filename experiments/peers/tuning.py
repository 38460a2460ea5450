"""Settings chosen on the validation slice, then one score file on the test slice; the same rule for every peer.

The best trial has the largest sum of GAUC and HR@100 of requests whose item has a training event.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.peers import baselines, judge, scores
from experiments.peers.feeds.__main__ import FEEDS
from experiments.peers.judge import SLICES, Slice
from experiments.peers.lists import Lists

ROOT = Path(__file__).resolve().parents[2]
RATES = (0.001, 0.003, 0.01)  # learning rates that are tried, of every trained peer
TEMPERATURES = {"rechub-youtubednn": (0.05, 0.1)}  # the same of peers that have one, next to their package's example
SECONDS = {"movielens": 160.0, "taobao": 55.0}
"""Processor seconds that `presets.aif` trains for on the test split: three epochs on one core, mean of three seeds."""
SHARE = 1 / 6  # of these seconds: each trial that chooses a learning rate or a temperature
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


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
        """The folder of a slice's score files."""
        return self.folder / slice_ / "scores"

    def trials(self, name: str) -> Path:
        """The file with the trials of a peer."""
        return self.folder / "trials" / f"{name}.json"

    def read(self, name: str, slice_: str = "test") -> scores.Scores:
        """The score files of a model; errors as `scores.read`."""
        return scores.read(self.scores(slice_), name, self.lists[slice_])


Stages = tuple[tuple[dict[str, Any], ...], ...]
Write = Callable[[str, dict[str, Any], str], None]
"""`write(slice, settings, name)` makes a score file of that name."""


def tuned(name: str, workplace: Workplace, stages: Stages, write: Write, **last: Any) -> None:
    """Writes the test slice's score file of a peer with the best settings tried; does nothing where that was done.

    Args:
      name: of the peer.
      workplace: where everything is.
      stages: of settings; each is tried over the best settings before it.
      write: makes a score file.
      last: settings of the test slice alone, in place of those tried.
    """
    validation, test = SLICES
    if name in scores.names(workplace.scores(test)) and "trials" in workplace.read(name).about:
        return
    path = workplace.trials(name)
    tried: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    best: dict[str, Any] = {"settings": {}}
    for changes in stages:
        for settings in [best["settings"] | change for change in changes]:
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
    chosen = best["settings"] | last
    write(test, chosen, name)
    about = workplace.read(name).about | {"chosen": chosen, "powers": best["powers"], "trials": tried}
    (workplace.scores(test) / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def baseline(name: str, workplace: Workplace) -> None:
    """A closed-form baseline, tuned."""
    function, trials = baselines.BASELINES[name]

    def write(slice_: str, settings: dict[str, Any], file: str) -> None:
        lists = workplace.lists[slice_]
        about = {"settings": settings, "versions": baselines.versions(name), "seed": 0}
        scores.write(workplace.scores(slice_), file, lists, function(lists, **settings), about)

    tuned(name, workplace, (trials,), write)


def trained(name: str, workplace: Workplace, python: str, seconds: float, *, seed: int = 0) -> None:
    """A peer's model, tuned, in the Python that has its package, with one thread and `seconds` of processor time.

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

    rates = tuple({"learning_rate": rate, "core_seconds": SHARE * seconds} for rate in RATES)
    temperatures = tuple({"temperature": temperature} for temperature in TEMPERATURES.get(name, ()))
    tuned(name, workplace, (rates, temperatures), write, core_seconds=seconds)
