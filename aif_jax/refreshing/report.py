"""What a refresh changed, for people: Markdown, JSON, and one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aif_jax.checks import needs_extra

MARKDOWN, JSON, FIGURE = "report.md", "report.json", "report.png"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes `report.json`, `report.md` and, where matplotlib is installed, `report.png` into a folder that is there."""
    try:
        plot(report, folder / FIGURE)
        drawn = True
    except ImportError:  # the figure is all that the extra gives
        drawn = False
    (folder / JSON).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    (folder / MARKDOWN).write_text(markdown(report, figure=drawn), "utf-8")


def markdown(report: Mapping[str, Any], *, figure: bool = False) -> str:
    """The report as Markdown: the outcome, reasons, vocabularies, metrics, sizes, seconds."""
    data, status = report["data"], report["status"]
    lines = [f"# Refresh: {status}", ""]
    if report.get("name"):
        lines += [f"Published as `{report['name']}`.", ""]
    if reasons := report["gate"].get("reasons"):
        lines += ["The gate refused the model:", "", *(f"- {reason}" for reason in reasons), ""]
    lines += [
        f"Old version `{report['versions']['old']}`, new version `{report['versions'].get('new')}`.",
        "",
        f"Trained on {data['samples']:,} new samples from {data['since']} to {data['until']} and {data['replayed']:,} earlier "
        "ones; "
        f"judged on {data['requests']:,} requests after that: {data['new_item_requests']:,} for items and "
        f"{data['new_user_requests']:,} of users that the old model does not know.",
        "",
    ]
    if grown := report["vocabularies"]:
        lines += _table(("vocabulary", "ids before", "new", "after"), [
            (name, f"{each['before']:,}", f"{each['after'] - each['before']:,}", f"{each['after']:,}")
            for name, each in grown.items()
        ])  # fmt: skip
    for name, metrics in report["gate"].get("metrics", {}).items():
        lines += [f"## Requests: {name}", ""]
        lines += _table(("metric", "old", "new", "difference", "interval"), [
            (metric, f"{each['old']:.4f}", f"{each['new']:.4f}", f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}")
            for metric, each in metrics.items() for value, low, high in [each["difference"]]
        ])  # fmt: skip
    if (overlap := report["gate"].get("overlap")) is not None:
        lines += [f"The new top k holds {overlap:.1%} of the old one.", ""]
    lines += _table(("part", "bytes"), [(name, f"{count:,}") for name, count in report["bytes"].items()])
    lines += _table(("step", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in report["seconds"].items()])
    if figure:
        lines += [f"![what changed]({FIGURE})", ""]
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draws differences of the metrics with their intervals, and seconds by step, as a PNG; ImportError without matplotlib."""
    with needs_extra("plots need matplotlib", "plots"):
        from matplotlib.figure import Figure
    drawn = Figure(figsize=(9, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    rows = [
        (metric if name == "newest" else f"{name}: {metric}", *each["difference"])
        for name, metrics in report["gate"].get("metrics", {}).items()
        for metric, each in metrics.items()
        if metric.partition("@")[0] in ("auc", "gauc", "hr", "log_loss", "calibration_error")
    ]
    for place, (_, value, low, high) in enumerate(reversed(rows)):
        left.errorbar(
            value, place, xerr=[[max(0, value - low)], [max(0, high - value)]], marker="o", color="tab:blue", capsize=3
        )
    left.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    left.axvline(0, color="0.7", linestyle="--")
    left.set(title=f"new - old, {report['status']}", xlabel="difference with its interval over users")
    seconds = report["seconds"]
    right.barh(list(reversed(seconds)), list(reversed(seconds.values())))
    right.set(title="where the time went", xlabel="seconds")
    drawn.savefig(path, dpi=110)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)] + [""] if rows else []
