"""The minutes after a publish: a version that does worse in service than the one before it is taken back."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

from aif_jax.checks import expect
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.refreshing.gate import judge_service


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
      degraded, failed, slowdown, requests: bounds, as for `judge_service`.
      say: prints a line where something changed.

    Returns:
      Why the version was taken back; empty where it stays.

    Raises:
      FileNotFoundError: a store without a version before the current one.
      OSError: the service never answered.
      ValueError: times that are not above 0.
    """
    expect(minutes > 0 and every > 0, "watch", "minutes and every above 0", f"minutes={minutes}, every={every}")
    before, current = store.before_current(), store.current() or ""
    old, new = (json.loads(store.read(name, "manifest.json"))["version"][:12] for name in (before, current))
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
        taken = taken or held[0] is not None
        bounds = dict(degraded=degraded, failed=failed, slowdown=slowdown, requests=requests)
        reasons = judge_service(text, *held, **bounds) if None not in held else ()  # type: ignore[arg-type]
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
            say(
                f"watch: {current} stays"
                + ("" if None not in held else "; the version before was not in memory to compare with")
            )
            return ()
        time.sleep(every)


def _version_of(text: str, folder: str) -> str | None:
    """The latest version that a service holds of an export, the first in its metrics; behind deltas not that of the export."""
    found = re.search(rf'^aif_model_items{{[^}}]*folder="{re.escape(folder)}"[^}}]*}}', text, re.MULTILINE)
    version = re.search(r'version="(\w+)"', found[0]) if found else None
    return None if version is None else version[1]
