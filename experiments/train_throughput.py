"""Training speed by table size and history, and compared with PyTorch.

Claim     a step costs the same whether the item table has 10^4 or 10^7 rows, and the AIF model trains at three times the
          examples a second of a straightforward PyTorch version with sparse embeddings, on the same cores.
Command   python -m experiments.train_throughput --json FILE      (add --plot FILE.png, or --smoke)
          git worktree add BEFORE 673c47a; python -m experiments.train_throughput --before BEFORE --only-before --json FILE
Expected  8 minutes and 10 GiB on two cores with --rounds 14
Measured  experiments/README.md, with the machine
Model     `presets.aif` with an item table of so many rows, B=1024 pointwise samples; Adam in both, no clipping. The ids of a
          batch are drawn from 8,192 rows spread over the table, so that a batch has as many unique ids at every table size;
          `power_law` draws from the whole table instead, where a larger table means more unique ids.
Checked   both start from the same parameters; their logits must agree to 1e-4 before anything is timed.
Figures   medians of runs interleaved in one process, batches ready on the device; compile time apart. `input_share` is the
          share of a run of the training loop that was spent waiting for a batch made by `data.pipeline.Pipeline`.
          `ratio_over_torch` is the time of PyTorch's fastest step over ours, compiled too if there is a C++ compiler. With
          `--before DIR`, the checkout of an older commit, `step_ratio_before` is its step over ours at the quickstart's sizes,
          each with its own `presets.aif`: two processes of `experiments/one_step.py` that make a step each in turn.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import aif_jax as aif
from aif_jax import train
from aif_jax.data import candidates
from aif_jax.data.candidates import NegativeSampler, item_counts
from aif_jax.data.pipeline import Batch, Pipeline, to_device
from aif_jax.data.split import eligible, split_by_time
from aif_jax.features import behaviours
from aif_jax.output import say, track
from aif_jax.train import losses
from aif_jax.train.optimizers import MIN_ROWS, SparseConfig
from aif_jax.train.step import StepFn
from aif_jax.types import Params
from experiments import common
from experiments.datasets.synthetic import synthetic_world

CATEGORIES, CONTENT, ACTIONS, HOT = 1000, 64, 6, 8192
RATE = 1e-3
DEFAULT = SparseConfig()


class Trainer:
    """One model with its state and its batches; a call makes a step and returns its milliseconds."""

    def __init__(self, config: aif.Config, batches: list[Batch], *, sparse: SparseConfig | None, keep: bool = False):
        self.model, optimizer, init, self.step = compiled(config, sparse)
        params = init(jax.random.key(0), fitted_of(config))
        self.params = params if keep else None
        self.batches = [jax.tree.map(jax.numpy.asarray, batch) for batch in batches]
        self.state = train.init_state(params, optimizer)

    def __call__(self, i: int) -> float:
        begin = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batches[i % len(self.batches)])
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - begin) * 1e3


@functools.cache
def compiled(config: aif.Config, sparse: SparseConfig | None) -> tuple[aif.PreRanker, Any, Any, StepFn]:
    """Model, optimizer, `init(key, fitted)` and step: one compilation for all trainers of a config."""
    model, optimizer = aif.build(config), optax.adam(RATE)
    step = train.make_step(model, optimizer, loss=losses.pointwise_bce, sparse=sparse)
    return model, optimizer, jax.jit(lambda key, fitted: model.init(key, None, fitted=fitted)), step


def config_of(rows: int, **changes: Any) -> aif.Config:
    """`presets.aif` with an item table of so many rows."""
    attributes = (aif.Attribute(name="item", size=rows), aif.Attribute(name="category", size=CATEGORIES))
    return aif.presets.aif(aif.Schema(item_attributes=attributes, actions=ACTIONS, content=CONTENT), **changes)


def category_of(item: np.ndarray) -> np.ndarray:
    """The category of each item."""
    return np.where(item > 0, item % (CATEGORIES - 1) + 1, 0).astype(np.int32)


def fitted_of(config: aif.Config) -> Params:
    """A fitted group with signatures drawn at random, without the content of 10^7 items that a fit would need."""
    rng, rows = np.random.default_rng(0), config.schema.item_attribute("item").size
    fitted: Params = {"fields": {"category": category_of(np.arange(rows))}}
    for table in config.tables:
        words = rng.integers(0, 2**32, (rows, table.bits // 32), dtype=np.uint32)
        projection = rng.normal(size=(CONTENT, table.bits)).astype(np.float32)
        fitted[table.name] = {"table": words, "projection": projection, "offset": np.zeros(table.bits, np.float32)}
    return fitted


def batch_of(config: aif.Config, size: int, *, seed: int, power_law: bool = False) -> Batch:
    """Random features; histories between half and the whole of their length are filled."""
    rng = np.random.default_rng(seed)
    rows, length = config.schema.item_attribute("item").size, config.history_length
    hot = rng.integers(1, rows, HOT).astype(np.int32)

    def items(shape: tuple[int, ...]) -> np.ndarray:
        if power_law:  # density ~ 1 / rank
            return np.minimum(np.exp(rng.random(shape) * np.log(rows)), rows - 1).astype(np.int32)
        return hot[rng.integers(0, HOT, shape)]

    mask = np.arange(length) < rng.integers(length // 2, length + 1, size)[:, None]
    action, age = rng.integers(1, ACTIONS, mask.shape), np.sort(rng.exponential(1e6, mask.shape), 1)
    candidate = items((size, 1))
    return Batch(
        users=aif.UserFeatures(
            ids={}, floats=np.zeros((size, 0), np.float32), history=behaviours(items(mask.shape), action, age, mask)
        ),
        items=aif.ItemFeatures(
            ids={"item": candidate, "category": category_of(candidate)},
            floats=np.zeros((size, 1, 0), np.float32),
            content=rng.normal(size=(size, 1, CONTENT)).astype(np.float32),
        ),
        labels=rng.integers(0, 2, (size, 1)).astype(np.float32),
        where=np.ones((size, 1), bool),
    )


def torch_step(
    ours: Trainer, batches: list[Batch], *, sparse: bool, adagrad: bool = False, compiled: bool = False
) -> Callable[[int], float]:
    """The same network and the same batches in PyTorch, after a check of its logits; `compiled`, by `torch.compile`."""
    import torch

    from experiments.torch_aif import TorchAIF, expect_same, to_torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # the default; PyTorch warns where it is not stated
    params, config = ours.params, ours.model.config
    assert params is not None  # kept
    network = TorchAIF(params, config, sparse=("item",) if sparse else ())
    tensors = [to_torch(batch, params, config) for batch in batches]
    optimizers = network.optimizers(RATE, adagrad=adagrad)
    expect_same(network, tensors[0], ours.model, params, batches[0])
    logits = torch.compile(network, dynamic=False) if compiled else network

    def run(i: int) -> float:
        begin = time.perf_counter()
        batch = tensors[i % len(tensors)]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(batch), batch["labels"])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return (time.perf_counter() - begin) * 1e3

    return run


class Child:
    """A process that makes training steps with the package of one checkout; a call makes one and returns its milliseconds."""

    def __init__(self, checkout: Path, *, smoke: bool):
        command = [sys.executable, str(Path(__file__).with_name("one_step.py")), *(["--smoke"] if smoke else [])]
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            command, env=environment, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        found = self._read()
        if Path(found) != checkout.resolve():
            raise SystemExit(f"--before: expected the package of {checkout.resolve()}, got that of {found}")

    def __call__(self, i: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"--before: a process of one_step.py ended with {self._process.wait()}; its error is above")
        return line


def against_before(before: Path, rounds: int, *, smoke: bool) -> dict[str, float]:
    """The step of this checkout and that of another one, in turn."""
    children = {"now": Child(Path(__file__).resolve().parents[1], smoke=smoke)}
    children["before"] = Child(before, smoke=smoke)
    ms = timed(dict(children), rounds, "before and now")
    for child in children.values():
        child.close()
    return {"step_ms_before": ms["before"], "step_ms_now": ms["now"], "step_ratio_before": ms["before"] / ms["now"]}


def timed(work: dict[str, Callable[[int], float]], rounds: int, label: str) -> dict[str, float]:
    """Median milliseconds of each, after a first and a second step that do not count."""
    for name, step in track(work.items(), label=f"{label}: compile", unit="programs"):
        say(f"  {name}: first step {step(0) / 1e3:.1f} s", file=sys.stdout)
        step(1)
    times = common.interleaved(work, rounds)
    rows = [[name, float(np.median(ms)), *np.percentile(ms, [10, 90])] for name, ms in times.items()]
    print(common.table(rows, [label, "ms", "p10", "p90"]))
    return {name: float(np.median(values)) for name, values in times.items()}


def input_share(batch_size: int, steps: int, changes: dict[str, Any]) -> float:
    """Share of the time that the loop waits for the pipeline's batches, after the step has been compiled."""
    world = synthetic_world(0, users=max(200, 4 * batch_size), items=2000, topics=32, categories=50, events_per_user=60)
    data = world.dataset
    config = aif.presets.aif(data.schema, **changes)
    split = split_by_time(data.log)
    feed = Pipeline(
        dataset=data,
        positions=eligible(data.log, split.train, min_history=1),
        candidates=candidates.sampled_negatives(data, sampler=NegativeSampler(item_counts(data, split.train)), negatives=1),
        config=config,
        batch_size=batch_size,
        epochs=100,
    )
    model, optimizer = aif.build(config), optax.adam(RATE)
    state = train.init_state(model.init(jax.random.key(0), data.catalogue), optimizer)
    step = train.make_step(model, optimizer, loss=losses.pointwise_bce)
    seen: list[float] = []
    with to_device(feed.batches()) as fed:
        train.loop(
            state, step, itertools.islice(fed, 2 * steps), total=2 * steps, label="input", log_every=steps,
            on_log=lambda at, values: seen.append(values["input_share"]),
        )  # fmt: skip
    return seen[-1]


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs every comparison and prints the ratios first."""
    parser = common.parser(__doc__)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the step times as a PNG")
    parser.add_argument("--rounds", type=int, help="steps of each (default 20; smoke 2)")
    parser.add_argument("--threshold", action="store_true", help="only: dense and sparse updates by table size, for MIN_ROWS")
    parser.add_argument("--before", metavar="DIR", type=Path, help="checkout of an older commit, for step_ratio_before")
    parser.add_argument("--only-before", action="store_true", help="nothing but that comparison")
    options = parser.parse_args(arguments)
    if options.before and not (options.before / "aif_jax" / "__init__.py").exists():
        parser.error(f"--before: expected a checkout with aif_jax in it, got {options.before}")
    if options.only_before and not options.before:
        parser.error("--only-before: expected --before DIR too")
    smoke = options.smoke
    rounds, size = options.rounds or (2 if smoke else 20), 16 if smoke else 1024
    few = tuple(b for b in config_of(10).blocks if isinstance(b, aif.blocks.LinearMemory | aif.blocks.DotProduct))
    small: dict[str, Any] = dict(width=8, short_length=8, long_length=16, towers=(8,), head=(8,), sequence=False, blocks=few)
    changes = small if smoke else {}

    def trainer(rows: int, *, sparse: Any = DEFAULT, power_law: bool = False, keep: bool = False, **sizes: int) -> Trainer:
        config = config_of(rows, **changes | sizes)
        made = [batch_of(config, size, seed=seed, power_law=power_law) for seed in range(2 if smoke else 4)]
        return Trainer(config, made, sparse=sparse, keep=keep)

    if options.threshold:
        updates = {"dense": None, "sparse": SparseConfig(min_rows=HOT)}
        for rows in (500, 1000) if smoke else (10_000, 20_000, 50_000, 100_000):
            timed({f"{name}, {rows} rows": trainer(rows, sparse=s) for name, s in updates.items()}, rounds, "threshold")
        return

    figures: dict[str, Any] = {"batch_size": size, "min_rows": MIN_ROWS}
    if options.before:
        figures |= against_before(options.before, rounds, smoke=smoke)
        print(f"step before over now: {figures['step_ratio_before']:.2f}")
        if options.only_before:
            common.write_json(options.json, figures)
            return
    table_rows = (1000, MIN_ROWS) if smoke else (10**4, 10**5, 10**6, 10**7)
    by_rows = timed({str(rows): trainer(rows) for rows in table_rows}, rounds, "table rows")
    figures["step_ms_by_table_rows"] = by_rows
    figures["step_ratio_1e7_over_1e4"] = by_rows[str(table_rows[-1])] / by_rows[str(table_rows[0])]
    law = timed({str(rows): trainer(rows, power_law=True) for rows in (table_rows[0], table_rows[-1])}, rounds, "power law")
    figures["step_ms_by_table_rows_power_law"] = law

    million = MIN_ROWS if smoke else 10**6
    pair = timed({"dense": trainer(million, sparse=None), "sparse": trainer(million)}, rounds, "update")
    figures |= {"dense_step_ms_1e6": pair["dense"], "sparse_step_ms_1e6": pair["sparse"]}

    lengths = (16, 32) if smoke else (64, 256, 1024)
    by_length = {str(length): trainer(table_rows[0], long_length=length) for length in lengths}
    figures["step_ms_by_history"] = timed(by_length, rounds, "history")

    try:
        import torch  # noqa: F401
    except ImportError:
        parser.exit(1, 'PyTorch is missing: pip install "aif_jax[benchmarks]"\n')
    ours = trainer(100_000 if not smoke else MIN_ROWS, keep=True)
    plain = [jax.tree.map(np.array, batch) for batch in ours.batches]
    theirs = {
        "torch SparseAdam": torch_step(ours, plain, sparse=True),
        "torch Adagrad, sparse": torch_step(ours, plain, sparse=True, adagrad=True),
        "torch Adam, dense": torch_step(ours, plain, sparse=False),
    }
    if not smoke and shutil.which(os.environ.get("CXX", "g++")):
        theirs["torch Adam, dense, compiled"] = torch_step(ours, plain, sparse=False, compiled=True)
    both = timed({"aif_jax": ours, **theirs}, rounds, "PyTorch")
    fastest = min(both[name] for name in theirs)
    figures |= {
        "examples_per_s": size / both["aif_jax"] * 1e3,
        "torch_examples_per_s": size / fastest * 1e3,
        "ratio_over_torch": fastest / both["aif_jax"],
        "torch_step_ms": {name: both[name] for name in theirs},
    }
    figures["input_share"] = input_share(size, 5 if smoke else 40, changes)

    print(f"step at {table_rows[-1]} rows over {table_rows[0]}: {figures['step_ratio_1e7_over_1e4']:.2f}")
    print(f"examples/s over the fastest PyTorch optimizer: {figures['ratio_over_torch']:.2f}")
    print(f"dense over sparse updates at {million} rows: {pair['dense'] / pair['sparse']:.1f}")
    print(f"waiting for input: {figures['input_share']:.1%} of the time")
    if options.plot:
        plot(options.plot, figures)
    common.write_json(options.json, figures)


def plot(path: Path, figures: dict[str, Any]) -> None:
    """Step time against table rows and history."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key, label in zip(
        axes, ("step_ms_by_table_rows", "step_ms_by_history"), ("item table rows", "long history"), strict=True
    ):
        axis.plot([int(x) for x in figures[key]], list(figures[key].values()), marker="o")
        axis.set(xscale="log", ylim=(0, None), xlabel=label, ylabel="ms a step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"plot written to {path}")


if __name__ == "__main__":
    main()
