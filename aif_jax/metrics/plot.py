"""The picture of a calibration: predicted against observed by decile."""

from __future__ import annotations

import os
from collections.abc import Mapping

from aif_jax.checks import expect
from aif_jax.metrics.entries import Deciles


def plot_deciles(series: Mapping[str, Deciles], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws predicted against observed rates by decile as a PNG, both axes logarithmic.

    A line for each series, with the standard error of each observed rate.

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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "aif_jax[plots]"') from error
    expect(len(series) > 0, "plot_deciles series", "at least one", "none")
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axis = figure.subplots()
    rates = [rate for made in series.values() for rate in (*made.predicted, *made.observed) if rate > 0]
    ends = [min(rates, default=0.1), max(rates, default=1.0)]
    axis.plot(ends, ends, color="0.7", linestyle="--", label="predicted = observed")
    for name, made in series.items():
        bins = zip(made.predicted, made.observed, made.deviations, strict=True)
        points = [(p, o, deviation) for p, o, deviation in bins if p > 0 and o > 0]
        p, o, deviation = zip(*points, strict=True) if points else ((), (), ())
        axis.errorbar(p, o, yerr=deviation, marker="o", label=name)
    axis.set(xlabel="predicted", ylabel="observed", xscale="log", yscale="log", title=title)
    axis.legend()
    figure.savefig(path, dpi=130)
