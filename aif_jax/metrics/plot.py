"""The picture of a calibration: predicted against observed by decile."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from aif_jax.checks import expect, needs_extra
from aif_jax.metrics.entries import Deciles


def plot_deciles(series: Mapping[str, Deciles], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws predicted against observed rates by decile as a PNG, and their ratio, for errors too small for the first.

    A line for each series, with the standard error of each observed rate. The axes of rates are logarithmic; ratios from 2 on
    are outside the second panel.

    Args:
      series: what `deciles` returned, by name; points without a positive are left out.
      path: of the picture.
      title: above it.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: no series.

    Example:
      >>> import tempfile
      >>> plot_deciles({"model": Deciles((0.1, 0.4), (0.12, 0.4), (50.0, 50.0))}, tempfile.mkdtemp() + "/deciles.png")
    """
    with needs_extra("plots need matplotlib", "plots"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter
    expect(len(series) > 0, "plot_deciles series", "at least one", "none")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    figure.suptitle(title)
    rate, ratio = figure.subplots(1, 2)
    rates = [rate for made in series.values() for rate in (*made.predicted, *made.observed) if rate > 0]
    ends = [min(rates, default=0.1), max(rates, default=1.0)]
    rate.plot(ends, ends, color="0.7", linestyle="--", label="predicted = observed")
    ratio.axhline(1, color="0.7", linestyle="--")
    widest = 0.05
    for name, made in series.items():
        bins = enumerate(zip(made.predicted, made.observed, made.deviations, strict=True), 1)
        points = [(place, p, o, deviation) for place, (p, o, deviation) in bins if p > 0 and o > 0]
        place, p, o, deviation = map(np.array, zip(*points, strict=True)) if points else np.zeros((4, 0))
        rate.errorbar(p, o, yerr=deviation, marker="o", label=name)
        ratio.errorbar(place, p / o, yerr=deviation * p / o**2, marker="o")
        widest = max(widest, *np.abs(p / o - 1), 0)
    widest = min(widest * 1.1, 1)
    rate.set(xlabel="predicted", ylabel="observed", xscale="log", yscale="log")
    for side in (rate.xaxis, rate.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5) if ends[1] < 100 * ends[0] else (1,)))
        side.set_major_formatter(FormatStrFormatter("%g"))
        side.set_minor_formatter(NullFormatter())
    ratio.set(xlabel="decile of the prediction", ylabel="predicted / observed", ylim=(1 - widest, 1 + widest))
    ratio.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.legend()
    figure.savefig(path, dpi=130)
