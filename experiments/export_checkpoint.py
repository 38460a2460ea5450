"""A checkpoint leaves the building: one folder that scores without the model's code, measured beside the Python model.

Claim     The exported folder gives the model's scores to float rounding, at the model's speed, and is ready sooner.
Command   python -m experiments.export_checkpoint --checkpoint DIR --out DIR     (or --smoke, --json FILE; --help lists all)
Data      the checkpoint's params; random features in its schema. Without --checkpoint, a fresh model of the paper's sizes.
Protocol  load and first call in a process of its own each (import, read, compile, one request), the median of --starts; then
          warm interaction calls at --candidates, the arms interleaved; p50. onnxruntime runs at 1024 candidates where it
          and jax2onnx are installed and the interaction converts; its figure is null otherwise, and the reason is printed.
Expected  a minute or two on 2 cores; the same scores to 1e-5; warm calls within some 20 % of each other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax import checkpoint, export
from aif_jax.export import consume
from aif_jax.export.golden import random_items, random_users
from aif_jax.types import Params
from experiments import common

START = """
import json, sys, time
began = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import {imports}
imported = time.perf_counter()
{load}
loaded = time.perf_counter()
{call}
print(json.dumps([imported - began, loaded - imported, time.perf_counter() - loaded]))
"""
EXPORTED = START.format(
    imports="numpy as np, consume",
    load="model = consume.load(sys.argv[1])",
    call="""
user = model.functions["user"]
rows = {e["name"]: np.zeros([int(sys.argv[2]) if d == "n" else d for d in e["shape"]], e["dtype"])
        for e in model.manifest["functions"]["item"]["outputs"]}
model.interaction(model.user(user.zeros({"l": user.axes["l"].buckets[-1]})), rows)""",
)
PYTHON = START.format(
    imports="numpy as np, jax, aif_jax as aif\nfrom aif_jax import checkpoint\nfrom aif_jax.export import functions",
    load="stored = checkpoint.load(sys.argv[3]); model = aif.build(stored.config)",
    call="""
zeros = lambda tree: jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tree)
user = zeros(functions.user_specs(stored.config, stored.config.long_length))
shape = jax.eval_shape(jax.vmap(model.item, (None, 0)), stored.params, functions.item_specs(stored.config, int(sys.argv[2])))
state = jax.jit(model.user)(stored.params, user)
jax.block_until_ready(jax.jit(model.interaction)(stored.params, state, zeros(shape)))""",
)


def main(arguments: list[str] | None = None) -> None:
    """Exports, verifies, measures, prints."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        source = options.checkpoint or fresh(Path(scratch) / "checkpoint", smoke=options.smoke)
        stored = checkpoint.load(source)
        model, params = aif.build(stored.config), stored.params
        onnx = bool(find_spec("jax2onnx") and find_spec("onnxruntime"))
        folder = options.out or Path(scratch) / "exported"
        began = time.perf_counter()
        sizes = {"c": buckets(options.candidates, stored.config.width)}
        digest = export.save(folder, model, params, onnx=onnx, stablehlo=not options.smoke, buckets=sizes)
        print(f"exported {source} to {folder} in {time.perf_counter() - began:.1f} s, manifest sha256 {digest}")
        report = export.verify(folder, sha256=digest)
        figures = {"artifact_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file())}
        figures |= starts(folder, source, options)
        warm, difference = warm_calls(folder, model, params, options)
        figures |= warm | {"max_abs_diff": max(difference, report["max_abs_diff"])}
        reason = json.loads((folder / consume.MANIFEST).read_bytes())["functions"]["interaction"].get("onnx", {}).get("refused")
        if figures["onnx_interaction_ms"] is None:
            print(f"onnxruntime: not measured: {reason or 'jax2onnx or onnxruntime is not installed'}")
    print(common.table([[name, value] for name, value in figures.items()], ["figure", "value"]))
    common.write_json(options.json, figures)


def fresh(path: Path, *, smoke: bool) -> Path:
    """A checkpoint of untrained parameters: speed and size do not depend on training."""
    schema = aif.Schema(
        item_attributes=(aif.Attribute(name="item", size=100_000), aif.Attribute(name="category", size=500)),
        user_attributes=(aif.Attribute(name="user", size=1000),),
        actions=5,
        content=64,
        side=("bid",),
    )
    config = aif.tiny(simtier="off", memory=("learned",)) if smoke else aif.paper(schema, simtier="codes", memory=("learned",))
    checkpoint.save(path, aif.build(config).init(jax.random.key(0)), config)
    return path


def buckets(candidates: int, width: int) -> list[int]:
    """The candidate counts that the folder is compiled for: the one measured, and the usual ones below it."""
    return sorted({size for size in (64, 256, 1024, 4096) if width < size < candidates} | {candidates})


def starts(folder: Path, source: Path, options: Any) -> dict[str, Any]:
    """Import, load and first request, each in a process of its own, the two arms in turn."""
    seconds: dict[str, list[list[float]]] = {"exported": [], "python": []}
    for _ in tqdm(range(options.starts), desc="process starts"):
        for arm, code in (("exported", EXPORTED), ("python", PYTHON)):
            command = [sys.executable, "-c", code, str(folder.resolve()), str(options.candidates), str(Path(source).resolve())]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds[arm].append(json.loads(done.stdout.splitlines()[-1]))
    figures = {}
    for arm, suffix in (("exported", ""), ("python", "_python")):
        imported, loaded, first = np.median(np.array(seconds[arm]), axis=0)
        figures |= {f"import_s{suffix}": imported, f"load_s{suffix}": loaded, f"first_call_s{suffix}": first}
    return figures


def warm_calls(folder: Path, model: aif.PreRanker, params: Params, options: Any) -> tuple[dict[str, Any], float]:
    """Milliseconds of a warm interaction on each runtime, and the largest difference from the Python model."""
    rng, count = np.random.default_rng(1), options.candidates
    user = jax.tree.map(lambda x: x[0], random_users(model, rng))
    items = jax.tree.map(lambda x: np.resize(x, (count, *x.shape[1:])), random_items(model, rng))
    loaded = export.load(folder)
    state, rows = loaded.user(user), jax.device_put(loaded.item(items))
    own_state = jax.block_until_ready(jax.jit(model.user)(params, user))
    own_rows = jax.block_until_ready(jax.jit(jax.vmap(model.item, (None, 0)))(params, items))
    interaction = jax.jit(model.interaction)
    arms: dict[str, Callable[[], np.ndarray]] = {
        "exported": lambda: loaded.interaction(state, rows),
        "python": lambda: jax.device_get(interaction(params, own_state, own_rows)),
    }
    difference = float(np.abs(arms["exported"]() - arms["python"]()).max())
    onnx = onnx_arm(folder, loaded, state, loaded.item(items))
    if onnx is not None:
        arms["onnx"] = onnx
        onnx()

    def timed(call: Callable[[], np.ndarray]) -> Callable[[int], float]:
        def run(_: int) -> float:
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3

        return run

    times = common.interleaved({name: timed(call) for name, call in arms.items()}, options.rounds)
    middle = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "warm_interaction_ms_exported": middle["exported"],
        "warm_interaction_ms_python": middle["python"],
        "onnx_interaction_ms": middle.get("onnx"),
    }, difference


def onnx_arm(folder: Path, loaded: export.ExportedModel, state: Any, rows: Any) -> Callable[[], np.ndarray] | None:
    """The interaction in onnxruntime at the sizes that it was converted for, or None."""
    spec = loaded.manifest["functions"]["interaction"].get("onnx", {})
    if "file" not in spec:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / spec["file"], providers=["CPUExecutionProvider"])
    given = {f"state.{k}": np.asarray(v) for k, v in state.items()} | {f"rows.{k}": np.asarray(v) for k, v in rows.items()}
    fed = {key: np.resize(given[name], spec["shapes"][name]) for key, name in spec["inputs"].items()}
    return lambda: session.run(None, fed)[0]


def parse(arguments: list[str] | None) -> Any:
    """The command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder; a fresh model without it")
    parser.add_argument("--out", type=Path, help="exported folder to make; a temporary one without it")
    parser.add_argument("--candidates", type=int, default=1024, help="candidates of a measured request, at least 64")
    parser.add_argument("--rounds", type=int, default=200, help="warm calls of each arm")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of each arm")
    options = parser.parse_args(arguments)
    if options.candidates < 64:
        parser.error(f"--candidates: expected at least 64, got {options.candidates}")
    if options.smoke:
        options.candidates, options.rounds, options.starts = 64, 5, 1
    return options


if __name__ == "__main__":
    main()
