"""The minutes after a publish: a version that does worse in service than the one before it is taken back."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from aif_jax.checks import expect
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.data.cascade import RECORD, open_samples
from aif_jax.export.contents import open as open_model
from aif_jax.refreshing.gate import ShownItems, judge_outcomes, judge_service, requests_to, without_terms
from aif_jax.scores import GROUP, calibrated, objective_names
from aif_jax.store.folders import local


def watch(
    metrics: Callable[[], str],
    store: SnapshotStore,
    *,
    minutes: float = 15.0,
    every: float = 10.0,
    degraded: float = 0.05,
    failed: float = 0.01,
    slowdown: float = 2.0,
    requests: int = 100,
    samples: Path | None = None,
    calibration: float = 0.2,
    log_loss: float = 0.05,
    users: int = 100,
    say: Callable[[str], None] = print,
) -> tuple[str, ...]:
    """Watches the current version of a store in a service that follows it, and rolls it back for the first reason there is.

    Start it after `refresh`. A version that the service has not taken over when the time is up is rolled back too: a service
    refuses one whose golden outputs it does not reproduce. One that another publish replaced meanwhile is left alone.

    Args:
      metrics: answers with the text of the service's `GET /metrics`; an `OSError` of it is one missed look.
      store: snapshot store of exports, which the service follows by `Mirror` or `aif-jax serve URL`: its names are the folders
        in the metrics. Both versions must be in memory (`--keep`): without the one before nothing is compared.
      minutes: how long to watch.
      every: seconds between two looks.
      degraded, failed: how much larger the share of such answers may be than the old version's, see `judge_service`.
      slowdown: largest mean time of a request, as a multiple of the old version's.
      requests: requests to the new version that a verdict needs.
      samples: folder that `jobs.join_outcomes` wrote, or parent to which each of its runs adds one, read again at every look:
        what users did with the items that each version showed; None: judge by the metrics alone. Scores with an SVD term or
        a popularity correction are no probabilities without a calibration, so outcomes of such models are not judged.
      calibration: how much the factor between predicted and observed may grow, see `judge_outcomes`.
      log_loss: how much larger the normalized entropy may be.
      users: users of each version that a verdict by samples needs.
      say: prints a line where something changed.

    Returns:
      Why the version was taken back; empty where it stays.

    Raises:
      FileNotFoundError: a store without a version before the current one.
      OSError: the service never answered.
      ValueError: times that are not above 0; samples that do not say which version served them.
    """
    expect(minutes > 0 and every > 0, "watch", "minutes and every above 0", f"minutes={minutes}, every={every}")
    before, current = store.before_current(), store.current() or ""
    old, new = (json.loads(store.read(name, "manifest.json"))["version"][:12] for name in (before, current))
    outcomes = None if samples is None else Outcomes(samples, store, (current, before))
    versions, followed = {current: {new}, before: {old}}, ""  # that served: behind deltas there are several of an export
    if outcomes is not None and outcomes.without_probabilities:
        reason = "an SVD term or a popularity correction and no calibration (aif-jax add calibration)"
        say(f"watch: outcomes are not judged of models with {reason}: {', '.join(outcomes.without_probabilities)}")
        outcomes = None
    end, text, taken, missed = time.monotonic() + 60 * minutes, "", False, OSError("the service was not asked")
    say(f"watch: {current}, version {new}, against {before}, version {old}, for {minutes:g} minutes")
    while True:
        try:
            text = metrics()
        except OSError as error:
            missed = error
        over = time.monotonic() + every > end
        if over and not text:
            raise missed
        held = [_version_of(text, name) for name in (current, before)]
        for name, version in zip(versions, held, strict=True):
            versions[name] |= set() if version is None else {version}
        taken = taken or held[0] is not None
        bounds = dict(degraded=degraded, failed=failed, slowdown=slowdown, requests=requests)
        reasons = judge_service(text, *held, **bounds) if None not in held else ()  # type: ignore[arg-type]
        if outcomes is not None:
            shown = [outcomes.shown(name, versions[name]) for name in (current, before)]
            reasons += judge_outcomes(*shown, calibration=calibration, log_loss=log_loss, users=users)
            counts = " and ".join(f"{len(np.unique(each.users)):,}" for each in shown)
            followed = f"; outcomes of {counts} users of the two versions"
        if over and not taken:
            reasons = (f"the service did not take it over within {minutes:g} minutes; its log says why",)
        if store.current() != current:
            say(f"watch: {store.current()} was published meanwhile; {current} is no longer watched")
            return ()
        if reasons:
            store.rollback()
            say(f"watch: {current} is taken back, {before} is current: " + "; ".join(reasons))
            return reasons
        if over:
            without = "" if None not in held else "; the version before was not in memory to compare with"
            if (asked := requests_to(text, held[0] or new)) < requests:
                without += f"; it had {asked:.0f} requests, {requests} are needed to judge it by them"
            say(f"watch: {current} stays{without}{followed}")
            return ()
        time.sleep(every)


class Outcomes:
    """What versions showed and what followed, from the folders of `jobs.join_outcomes`.

    The outcome is that of the model's first objective, or the first one of the samples where none has its name; logits go
    through the calibration of the export, which deltas leave as it is.

    Args:
      samples: folder of samples, or of such folders.
      store: store of the exports; they are read once, for their calibration.
      names: names of the exports.
    """

    def __init__(self, samples: Path, store: SnapshotStore, names: Collection[str]):
        self._folder = local(samples, "samples")
        with tempfile.TemporaryDirectory() as folder:
            models = {name: open_model(store.fetch(folder, name)) for name in names}
        self.without_probabilities = [name for name, each in models.items() if without_terms(each) is not each.params]
        made = {name: trained.params.get("fitted", {}).get(GROUP) for name, trained in models.items()}
        self._calibration = {name: {"fitted": {} if each is None else {GROUP: each}} for name, each in made.items()}
        self._objectives = {name: trained.config.objectives for name, trained in models.items()}

    def shown(self, name: str, versions: Collection[str]) -> ShownItems:
        """Items that versions of an export showed, by their first 12 digits. Raises as `watch`."""
        objectives, parts = self._objectives[name], [(np.zeros(0, np.int64), *np.zeros((2, 0), np.float32))]
        for file in sorted((*self._folder.glob(RECORD), *self._folder.glob(f"[!.]*/{RECORD}"))):
            record, arrays = open_samples(file.parent)
            expected = f"the version that served each request in {file.parent}"
            expect("versions" in record, "samples", expected, "none; join them again with this release")
            codes = [code for code, version in enumerate(record["versions"]) if version[:12] in versions]
            rows = np.flatnonzero(np.isin(arrays["version"], codes))
            own = [name for name in objective_names(objectives)[:1] if name in record["outcomes"]]
            outcome = (own or record["outcomes"])[0]
            logits, labels = (np.asarray(arrays[f"labels.{each}"][rows]) for each in ("served", outcome))
            known = np.isfinite(logits) & np.isfinite(labels)
            users = np.asarray(arrays["users"])[arrays["user"][arrays["positions"][rows]] - 1]
            first = (slice(None), 0) if len(objectives) > 1 else ()
            every = np.repeat(logits[known][:, None], len(objectives), 1) if first else logits[known]
            made = calibrated(self._calibration[name], every, np)[first]
            parts.append((np.broadcast_to(users[:, None], known.shape)[known], made, labels[known]))
        return ShownItems(*map(np.concatenate, zip(*parts, strict=True)))


def _version_of(text: str, folder: str) -> str | None:
    """The latest version that a service holds of an export, the first in its metrics; behind deltas not that of the export."""
    found = re.search(rf'^aif_model_items{{[^}}]*folder="{re.escape(folder)}"[^}}]*}}', text, re.MULTILINE)
    version = re.search(r'version="(\w+)"', found[0]) if found else None
    return None if version is None else version[1]
