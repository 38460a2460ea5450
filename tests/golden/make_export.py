"""Makes tests/golden/export, an artefact that every later JAX must still load.

Command   python -m tests.golden.make_export FOLDER, under the lowest JAX supported. Made under jax 0.10.2.

The copy of the loader is left out: the point is that the loader of today reads the functions of yesterday.
"""

import json
import shutil
import sys
from pathlib import Path

from aif_jax import Trained, export
from tests import demo

CHANGES = {"blocks": (demo.BLOCKS[0], demo.BLOCKS[2], demo.BLOCKS[3]), "sequence": False}


def main(folder: Path) -> None:
    """Writes the artefact: BEA, linear attention and SIM, for three platforms."""
    model, params = demo.build(**CHANGES)
    export.save(folder, Trained(model, params))
    shutil.rmtree(folder / "consume")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("consume/")}
    manifest["sha256"] = export.consume.seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
