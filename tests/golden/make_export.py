"""Makes tests/golden/export, an artefact that every later JAX must still load.

Command   python -m tests.golden.make_export FOLDER, under the lowest JAX supported. Made under jax 0.10.2.

The copy of the loader is left out: the point is that the loader of today reads the functions of yesterday.
"""

import json
import sys
from pathlib import Path

from aif_jax import export
from tests import demo

CHANGES = {"memory": ("learned",), "simtier": "off", "sequence": False}


def main(folder: Path) -> None:
    """Writes the artefact: SIM, bridges and learned memory, for three platforms."""
    model, params = demo.build(**CHANGES)
    export.save(folder, model, params, stablehlo=False, buckets={"c": [64, 128], "n": [128], "b": [4]})
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["consume.py"]
    (folder / "consume.py").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
