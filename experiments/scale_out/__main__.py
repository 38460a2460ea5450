"""Beyond one process: what it costs and whether it changes anything.

Claim     Two training processes follow the loss of one within 1e-6; 10^6 items through Ray Data and through Spark make the
          index of a local build, bit for bit, at 60 % of its rate or more; a router by user keeps the hits of the state cache
          within 2 points of the ideal.
Command   python -m experiments.scale_out --json scale_out.json      (--smoke: seconds; --parts: some of it; --help lists all)
Needs     the extras ray and spark, and Java; what is not installed is named in the output and under "missing"
Time      ten minutes on 2 CPU cores, two of them for the catalogue
Measured  experiments/README.md
Method    catalogue.py: 10^6 raw items in four Parquet files, `presets.aif`, weights as initialised. The local build reads
          the files, encodes and fills the table; compiled before. Ray: one actor on a machine of two cores; from the first
          rows that it gives to the last, so that its start is left out; once to the encoded rows, once with the merge into
          an index. Spark: two tasks at a time, a first run starts the workers; files that tasks read and write, and with the
          merge; the same from a `DataFrame` (spark_frame_*).
"""

from __future__ import annotations

import importlib
from typing import Any

from experiments import common

PARTS = {
    "training": ("measure",),
    "catalogue": ("measure",),
    "serving": ("measure_affinity",),
}
"""Modules of this package and the functions `f(smoke) -> figures` of each; each figure has one name."""


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs the parts and prints their figures."""
    parser = common.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which parts (default: all)")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    for name in options.parts:
        module = importlib.import_module(f"{__package__}.{name}")
        for function in PARTS[name]:
            figures |= getattr(module, function)(options.smoke)
    for need in figures.get("missing", ()):
        print(f"not installed: {need}; figures that need it are None")
    if left := [name for name in PARTS if name not in options.parts]:
        print(f"left out by --parts: {', '.join(left)}")
    common.report(figures, options.json)


if __name__ == "__main__":
    main()
