"""Memory by part at 10^5, 10^6 and 10^7 items: tables, optimizer, rows, ids, states; and the peak of whole processes.

Claim     an item costs less than 600 bytes in training and 200 in serving.
Command   python -m experiments.memory --json memory.json   (or --smoke; --peaks also runs a training and a worker of each size)
Time      seconds; with --peaks 4 minutes at 10^5 and 10^6 items
Model     `presets.aif`, width 32, two behaviour fields, no content.
Parts     computed from shapes, not measured: the bytes of every array that there is one of for each item or user.
          parameters  the item table; gradients exist for the rows of a batch alone
          optimizer   Adam's two moments; row-wise Adagrad has 4 bytes a row in their place
          fields      the behaviour fields by item, which training and serving read
          rows        the item index of a worker, by storage; a table of free rows, an eighth, comes on top
          ids         keys of the index's look-up, 20 bytes an item (`index_refresh` measures it)
          state       of one user in a worker's cache
Peaks     measured, in MiB: the largest resident memory of a process that trains some steps, or builds an index and ranks, less
          that of one that does the same with 1,000 items. The raw ids and features that a data set has on the host come on top.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import numpy as np
import optax

import aif_jax as aif
from aif_jax import ItemIndex, train
from aif_jax.features import user_specs
from aif_jax.store import codec
from aif_jax.train import losses
from experiments import common, drawn

SIZES, FEW = (10**5, 10**6, 10**7), 1000
ID_BYTES = 20
JOBS = ("train", "worker")


def config_of(items: int, *, smoke: bool = False) -> aif.Config:
    """`presets.aif` with so many items."""
    attributes = (aif.Attribute(name="item", size=items), aif.Attribute(name="category", size=500))
    sizes = dict(width=8, short_length=8, long_length=16, towers=(8,), head=(8,)) if smoke else {}
    return aif.presets.aif(aif.Schema(item_attributes=attributes, actions=4), **sizes)


def parts(items: int, *, smoke: bool = False) -> dict[str, int]:
    """Bytes by part, from shapes."""
    config = config_of(items, smoke=smoke)
    model, schema = aif.build(config), config.schema
    trained = jax.eval_shape(lambda: model.init(jax.random.key(0), None, fitted={}))
    adam = jax.eval_shape(optax.adam(1e-3).init, trained)
    params = trained | {"fitted": {"fields": {"category": jax.ShapeDtypeStruct((items,), np.int32)}}}
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), drawn.items(schema, (1,)))
    made = {
        "parameters": common.size_of(trained),
        "optimizer": common.size_of(adam),
        "fields": common.size_of(params["fitted"]),
        "ids": ID_BYTES * items,
        "state": common.size_of(jax.eval_shape(model.user, params, user_specs(schema, length=config.history_length))),
    }
    for storage in codec.STORAGES:
        row = jax.eval_shape(lambda p, x, storage=storage: codec.pack(codec.encode(model.item(p, x), storage)), params, one)
        made[f"rows, {storage}"] = items * common.size_of(row)
    return made


def run(job: str, items: int, *, smoke: bool) -> None:
    """Trains some steps, or builds an index and ranks; what it prints last is its peak in MiB."""
    import resource

    config = config_of(items, smoke=smoke)
    model, schema = aif.build(config), config.schema
    fitted = {"fields": {"category": (np.arange(items) % 499 + 1).astype(np.int32)}}
    params = jax.jit(lambda key: model.init(key, None, fitted=fitted))(jax.random.key(0))
    if job == "train":
        from experiments.one_step import batch_of

        batch = batch_of(schema, samples=64, candidates=16, items=items, length=config.history_length, content=0)
        step = train.make_step(model, optax.adam(1e-3), loss=losses.listwise_softmax)
        state = train.init_state(params, optax.adam(1e-3))
        del params
        for _ in range(3):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
    else:
        ids = np.arange(1, items)
        features = aif.ItemFeatures(
            ids={"item": ids.astype(np.int32), "category": fitted["fields"]["category"][1:]},
            floats=np.zeros((items - 1, 0), np.float32),
        )
        index = ItemIndex.build(aif.Trained(model, params), features, ids=ids, progress=False)
        state = jax.jit(model.user)(params, drawn.users(schema, config.history_length))
        rank = jax.jit(lambda p, s, table, rows: jax.lax.top_k(model.interaction(p, s, index.decode(table, rows)), 10))
        with index.reading() as table:
            jax.block_until_ready(rank(params, state, table, np.arange(100, dtype=np.int32)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(job: str, items: int, *, smoke: bool) -> float:
    """MiB of a process at its largest."""
    command = [sys.executable, "-m", "experiments.memory", "--run", job, str(items), *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job} with {items} items: ended with {done.returncode}\n{done.stderr}")
    return float(done.stdout.split()[-1])


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--peaks", action="store_true", help="measure processes too")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6], help="items of those (default %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("JOB", "ITEMS"), help="one such process")
    options = parser.parse_args(arguments)
    if options.run:
        run(options.run[0], int(options.run[1]), smoke=options.smoke)
        return
    computed = {str(items): parts(items, smoke=options.smoke) for items in SIZES}
    figures: dict[str, Any] = {"bytes_by_part": computed}
    if options.peaks:
        sizes = [2 * FEW] if options.smoke else options.sizes
        over = {job: peak(job, FEW, smoke=options.smoke) for job in JOBS}
        figures["peak_mib"] = {job: {str(n): peak(job, n, smoke=options.smoke) - over[job] for n in sizes} for job in JOBS}
        figures["process_mib"] = over
    common.report(figures, options.json)


if __name__ == "__main__":
    main()
