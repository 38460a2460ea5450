"""Training speed by table size and history, and compared with PyTorch.

Claim     a step costs the same whether the item table has 10^4 or 10^7 rows, and the AIF model trains at three times the
          examples a second of a straightforward PyTorch version with sparse embeddings, on the same cores.
Command   python -m experiments.train_throughput --json FILE      (or --smoke)
          git worktree add BEFORE 673c47a; python -m experiments.train_throughput --before BEFORE --only-before --json FILE
Expected  6 minutes and 10 GiB on two cores with --rounds 14
Measured  experiments/README.md, with the machine
Model     `presets.aif` with an item table of so many rows, B=1024 pointwise samples; Adam in both, no clipping. The ids of a
          batch are drawn from 8,192 rows spread over the table, so that a batch has as many unique ids at every table size.
Checked   both start from the same parameters; their logits must agree to 1e-4 before anything is timed.
Figures   medians of runs interleaved in one process, batches ready on the device; compile time apart.
          `ratio_over_torch` is the time of PyTorch's fastest step over ours, compiled too if there is a C++ compiler. With
          `--before DIR`, the checkout of an older commit, `step_ratio_before` is its step over ours at the quickstart's sizes,
          each with its own `presets.aif`: two processes of `experiments/one_step.py` that make a step each in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
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
from aif_jax.data.pipeline import Batch
from aif_jax.features import behaviours
from aif_jax.output import say, track
from aif_jax.train import losses
from aif_jax.train.optimizers import MIN_ROWS, SparseConfig
from aif_jax.train.step import StepFn
from aif_jax.types import Params
from experiments import common, drawn

CATEGORIES, CONTENT, ACTIONS, HOT = 1000, 64, 6, 8192
RATE = 1e-3
ADAM = optax.adam(RATE)
DEFAULT = SparseConfig()


class Trainer:
    """One model with its state and its batches; a call makes a step and returns its milliseconds."""

    def __init__(
        self, config: aif.Config, batches: list[Batch], *, sparse: SparseConfig | None, fitted: Params, keep: bool = False
    ):
        self.model, init, self.step = compiled(config, sparse)
        params = init(jax.random.key(0), fitted)
        self.params = params if keep else None
        self.batches = [jax.tree.map(jax.numpy.asarray, batch) for batch in batches]
        self.state = train.init_state(params, ADAM)

    def __call__(self, i: int) -> float:
        begin = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batches[i % len(self.batches)])
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - begin) * 1e3


@functools.cache
def compiled(config: aif.Config, sparse: SparseConfig | None) -> tuple[aif.PreRanker, Any, StepFn]:
    """Model, `init(key, fitted)` and step: one compilation for all trainers of a config."""
    model = aif.build(config)
    step = train.make_step(model, ADAM, loss=losses.pointwise_bce, sparse=sparse)
    return model, jax.jit(lambda key, fitted: model.init(key, None, fitted=fitted)), step


class TorchTrainer:
    """The same network and the same batches in PyTorch, after a check of its logits.

    Args:
      ours: a trainer that keeps its first parameters.
      optimizers: those of a `TorchAIF`.
      sparse: whether the item table has sparse gradients.
      compiled: by `torch.compile`.
    """

    def __init__(self, ours: Trainer, optimizers: Callable[[Any], list[Any]], *, sparse: bool = False, compiled: bool = False):
        import torch

        from experiments.torch_aif import TorchAIF, expect_same, to_torch

        torch.sparse.check_sparse_tensor_invariants.disable()  # the default; PyTorch warns where it is not stated
        assert ours.params is not None  # kept
        network = TorchAIF(ours.params, ours.model.config, sparse=("item",) if sparse else ())
        self._torch, self._tensors = torch, [to_torch(batch) for batch in ours.batches]
        self._optimizers = optimizers(network)
        expect_same(network, self._tensors[0], ours.model, ours.params, ours.batches[0])
        self._logits = torch.compile(network, dynamic=False) if compiled else network

    def __call__(self, i: int) -> float:
        begin = time.perf_counter()
        batch = self._tensors[i % len(self._tensors)]
        loss = self._torch.nn.functional.binary_cross_entropy_with_logits(self._logits(batch), batch["labels"])
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return (time.perf_counter() - begin) * 1e3


def config_of(rows: int, **changes: Any) -> aif.Config:
    """`presets.aif` with an item table of so many rows."""
    attributes = (aif.Attribute(name="item", size=rows), aif.Attribute(name="category", size=CATEGORIES))
    return aif.presets.aif(aif.Schema(item_attributes=attributes, actions=ACTIONS, content=CONTENT), **changes)


def category_of(item: np.ndarray) -> np.ndarray:
    """The category of each item."""
    return np.where(item > 0, item % (CATEGORIES - 1) + 1, 0).astype(np.int32)


def batch_of(config: aif.Config, size: int, *, seed: int) -> Batch:
    """Random features; histories between half and the whole of their length are filled."""
    rng, schema, length = np.random.default_rng(seed), config.schema, config.history_length
    rows = schema.item_attribute("item").size
    hot = rng.integers(1, rows, HOT).astype(np.int32)

    def items(shape: tuple[int, ...]) -> np.ndarray:
        return hot[rng.integers(0, HOT, shape)]

    users = drawn.users(schema, length, (size,), events=rng.integers(length // 2, length + 1, size), seed=seed)
    history = behaviours(items((size, length)), users.history.action, users.history.age, users.history.mask)
    candidate = items((size, 1))
    ids = {"item": candidate, "category": category_of(candidate)}
    return Batch(
        users=dataclasses.replace(users, history=history),
        items=dataclasses.replace(drawn.items(schema, (size, 1), seed=seed), ids=ids),
        labels=rng.integers(0, 2, (size, 1)).astype(np.float32),
        where=np.ones((size, 1), bool),
    )


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
        print(file=self._process.stdin, flush=True)
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


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs every comparison and prints its figures."""
    settings = {
        "rounds": (20, 2, "steps of each"),
        "batch_size": (1024, 16, "samples of a step"),
        "only_before": (False, None, "only: the step of --before"),
    }
    options = common.options(__doc__, arguments, settings, before="checkout of an older commit, for step_ratio_before")
    if options.before and not (options.before / "aif_jax" / "__init__.py").exists():
        options.error(f"--before: expected a checkout with aif_jax in it, got {options.before}")
    if options.only_before and not options.before:
        options.error("--only-before: expected --before DIR too")
    if not options.only_before and importlib.util.find_spec("torch") is None:
        options.error('PyTorch is missing: pip install "aif_jax[benchmarks]"')
    smoke, rounds, size = options.smoke, options.rounds, options.batch_size
    few = tuple(b for b in config_of(10).blocks if isinstance(b, aif.blocks.LinearMemory | aif.blocks.DotProduct))
    small: dict[str, Any] = dict(width=8, short_length=8, long_length=16, towers=(8,), head=(8,), sequence=False, blocks=few)
    changes = small if smoke else {}

    def trainer(rows: int, *, sparse: Any = DEFAULT, keep: bool = False, **sizes: int) -> Trainer:
        config = config_of(rows, **changes | sizes)
        made = [batch_of(config, size, seed=seed) for seed in range(2 if smoke else 4)]
        fitted = {"fields": {"category": category_of(np.arange(rows))}}
        return Trainer(config, made, sparse=sparse, fitted=fitted, keep=keep)

    figures: dict[str, Any] = {"batch_size": size, "min_rows": MIN_ROWS}
    if options.before:
        figures |= against_before(options.before, rounds, smoke=smoke)
        if options.only_before:
            return common.report(figures, options.json)
    table_rows = (1000, MIN_ROWS) if smoke else (10**4, 10**5, 10**6, 10**7)
    by_rows = timed({str(rows): trainer(rows) for rows in table_rows}, rounds, "table rows")
    figures["step_ms_by_table_rows"] = by_rows
    figures["step_ratio_1e7_over_1e4"] = by_rows[str(table_rows[-1])] / by_rows[str(table_rows[0])]
    million = MIN_ROWS if smoke else 10**6
    pair = timed({"dense": trainer(million, sparse=None), "sparse": trainer(million)}, rounds, "update")
    figures |= {"dense_step_ms_1e6": pair["dense"], "sparse_step_ms_1e6": pair["sparse"]}

    lengths = (16, 32) if smoke else (64, 256, 1024)
    by_length = {str(length): trainer(table_rows[0], long_length=length) for length in lengths}
    figures["step_ms_by_history"] = timed(by_length, rounds, "history")

    ours = trainer(100_000 if not smoke else MIN_ROWS, keep=True)
    theirs = {
        "torch SparseAdam": TorchTrainer(ours, lambda network: network.optimizers(RATE), sparse=True),
        "torch Adam, dense": TorchTrainer(ours, lambda network: network.optimizers(RATE)),
    }
    if not smoke and shutil.which(os.environ.get("CXX", "g++")):
        theirs["torch Adam, dense, compiled"] = TorchTrainer(ours, lambda network: network.optimizers(RATE), compiled=True)
    both = timed({"aif_jax": ours, **theirs}, rounds, "PyTorch")
    fastest = min(both[name] for name in theirs)
    figures |= {
        "examples_per_s": size / both["aif_jax"] * 1e3,
        "torch_examples_per_s": size / fastest * 1e3,
        "ratio_over_torch": fastest / both["aif_jax"],
        "torch_step_ms": {name: both[name] for name in theirs},
    }
    common.report(figures, options.json)


if __name__ == "__main__":
    main()
