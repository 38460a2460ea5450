"""Trains one peer on the files of one slice and writes its score file; `experiments.peers` starts this in the peers' Python.

Command   python -m experiments.peers.feeds NAME LISTS SCORES --learning-rate 0.003 --core-seconds 120
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
import time
from pathlib import Path

import numpy as np

from experiments.peers import lists as files
from experiments.peers import scores
from experiments.peers.feeds.batches import Budget

FEEDS = {
    "rechub-dssm": ("rechub", "torch-rechub"),
    "rechub-youtubednn": ("rechub", "torch-rechub"),
    "recbole-sasrec": ("recbole_sasrec", "recbole"),
    "fuxictr-dssm": ("fuxictr_zoo", "fuxictr"),
    "fuxictr-din": ("fuxictr_zoo", "fuxictr"),
}
"""Model to the module of its feed and the distribution that has the model."""


def main(arguments: list[str] | None = None) -> None:
    """Trains, scores, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", choices=FEEDS)
    parser.add_argument("lists", type=Path, help="folder of the slice")
    parser.add_argument("scores", type=Path, help="folder for the score file")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--core-seconds", type=float, required=True, help="processor time of training")
    parser.add_argument("--temperature", type=float, help="of a model that has one (default: that of its package's example)")
    parser.add_argument("--file", help="name of the score file (default: NAME)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    module, distribution = FEEDS[options.name]
    feed = importlib.import_module(f"experiments.peers.feeds.{module}")
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    budget = Budget(seconds=options.core_seconds)
    given = dict(learning_rate=options.learning_rate, budget=budget, seed=options.seed)
    if options.temperature is not None:
        given["temperature"] = options.temperature
    began = time.process_time()
    lists = files.read(options.lists)
    found, about = feed.scores(options.name, lists, **given)
    about |= {
        "learning_rate": options.learning_rate,
        "core_seconds": options.core_seconds,
        "steps": budget.steps,
        "samples_per_core_second": round(budget.samples / options.core_seconds, 1),
        "train_peak_mb": round(budget.peak_mb),
        "seed": options.seed,
        "process_seconds": round(time.process_time() - began, 1),
        "versions": {name: importlib.metadata.version(name) for name in (distribution, "torch", "numpy")}
        | {"python": platform.python_version()},
    }
    file = options.file or options.name
    if isinstance(found, np.ndarray):
        scores.write_candidates(options.scores, file, found, about)
    else:
        scores.write(options.scores, file, lists, found, about)
    print(f"{options.name}: {budget.steps} steps", file=sys.stderr)


if __name__ == "__main__":
    main()
