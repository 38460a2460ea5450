"""Training speed against table size and history, and beside PyTorch.

Claim     a step costs the same whether the item table has 10^4 or 10^7 rows, and the AIF model trains at three times the
          examples a second of a straightforward PyTorch version with sparse embeddings, on the same cores.
Command   python -m experiments.train_throughput --json FILE      (add --plot FILE.png, or --smoke)
Expected  5 minutes and 8 GiB on two cores with --rounds 14
Measured  experiments/README.md, with the machine
Sizes     B=1024 pointwise samples, S=32, L=256, D=32, K=64; Adam in both arms, no clipping. The ids of a batch are drawn from
          8,192 rows of its own, spread over the table, so that a batch touches as many rows at every table size;
          `power_law` draws from the whole table instead, where a larger table means more distinct rows.
Checked   the arms start from the same parameters; their logits must agree to 1e-4 before anything is timed.
Figures   medians of arms interleaved in one run, batches ready on the device; compile time apart. `input_share` is the share of
          a run of `loop.fit` that was spent waiting for a batch made by `data.pipeline.Pipeline`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from aif_jax.data.synthetic import synthetic_world
from aif_jax.sparse import MIN_ROWS, SparseConfig
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax import loop, losses, train
from aif_jax.data import candidates
from aif_jax.data.batches import Batch
from aif_jax.data.pipeline import Pipeline, to_device
from aif_jax.data.sampling import NegativeSampler, item_counts
from aif_jax.data.split import eligible, split_by_time
from aif_jax.types import Behaviours, ItemFeatures, UserFeatures
from experiments import common

CATEGORIES, CONTENT, ACTIONS, HOT = 1000, 64, 6, 8192
RATE = 1e-3
DEFAULT = SparseConfig()


class Arm:
    """One model with its state and its batches."""

    def __init__(self, config: aif.Config, batches: list[Batch], *, sparse: SparseConfig | None, keep: bool = False):
        model, optimizer = aif.build(config), optax.adam(RATE)
        params = jax.jit(model.init)(jax.random.key(0))
        self.params = params if keep else None
        self.model, self.batches = model, [jax.tree.map(jax.numpy.asarray, batch) for batch in batches]
        self.state = train.init_state(params, optimizer)
        self.step = train.make_step(model, optimizer, loss=losses.pointwise_bce, sparse=sparse)

    def __call__(self, i: int) -> float:
        begin = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batches[i % len(self.batches)])
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - begin) * 1e3


def config_of(rows: int, long: int = 256) -> aif.Config:
    """The model of all arms: every block of the paper, an item table of so many rows."""
    attributes = (aif.Attribute(name="item", size=rows), aif.Attribute(name="category", size=CATEGORIES))
    return aif.Config(schema=aif.Schema(item_attributes=attributes, actions=ACTIONS, content=CONTENT), long_length=long)


def batch_of(config: aif.Config, size: int, *, seed: int, power_law: bool = False) -> Batch:
    """Random features; histories between half and the whole of their length are filled."""
    rng = np.random.default_rng(seed)
    rows, length = config.schema.item_attribute("item").size, config.long_length
    hot = rng.integers(1, rows, HOT).astype(np.int32)

    def items(shape: tuple[int, ...]) -> np.ndarray:
        if power_law:  # density ~ 1 / rank
            return np.minimum(np.exp(rng.random(shape) * np.log(rows)), rows - 1).astype(np.int32)
        return hot[rng.integers(0, HOT, shape)]

    def category(item: np.ndarray) -> np.ndarray:
        return np.where(item > 0, item % (CATEGORIES - 1) + 1, 0).astype(np.int32)

    mask = np.arange(length) < rng.integers(length // 2, length + 1, size)[:, None]
    item, words = items((size, length)) * mask, config.signature_words
    long = Behaviours(
        ids={"item": item, "category": category(item)},
        action=(rng.integers(1, ACTIONS, (size, length)) * mask).astype(np.int32),
        age=(np.sort(rng.exponential(1e6, (size, length)), 1) * mask).astype(np.float32),
        mask=mask,
        signature=rng.integers(0, 2**32, (size, length, words), dtype=np.uint32),
    )
    candidate = items((size, 1))
    return Batch(
        users=UserFeatures(
            ids={},
            floats=np.zeros((size, 0), np.float32),
            short=jax.tree.map(lambda x: np.ascontiguousarray(x[:, : config.short_length]), long),
            long=long,
        ),
        items=ItemFeatures(
            ids={"item": candidate, "category": category(candidate)},
            floats=np.zeros((size, 1, 0), np.float32),
            content=rng.normal(size=(size, 1, CONTENT)).astype(np.float32),
            signature=rng.integers(0, 2**32, (size, 1, words), dtype=np.uint32),
        ),
        labels=rng.integers(0, 2, (size, 1)).astype(np.float32),
        where=np.ones((size, 1), bool),
    )


def torch_arm(arm: Arm, batches: list[Batch], *, sparse: bool, adagrad: bool = False) -> Callable[[int], float]:
    """The same network and the same batches in PyTorch, after a look at its logits."""
    import torch

    from experiments.torch_aif import TorchAIF, to_torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, which PyTorch warns of where it is not said
    assert arm.params is not None
    network = TorchAIF(arm.params, arm.model.config, sparse=("item",) if sparse else ())
    tensors, optimizers = [to_torch(batch) for batch in batches], network.optimizers(RATE, adagrad=adagrad)
    with torch.no_grad():
        theirs = network(tensors[0]).numpy()
    difference = float(np.abs(np.asarray(train.score(arm.model, arm.params, batches[0]))[:, 0] - theirs).max())
    if not difference < 1e-4:
        raise SystemExit(f"the arms are not the same network (logits differ by {difference:.1e}): nothing is timed")

    def run(i: int) -> float:
        begin = time.perf_counter()
        batch = tensors[i % len(tensors)]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(batch), batch["labels"])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return (time.perf_counter() - begin) * 1e3

    return run


def timed(arms: dict[str, Callable[[int], float]], rounds: int, label: str) -> dict[str, float]:
    """Median milliseconds of each arm, after a first and a second step that do not count."""
    for name, arm in tqdm(arms.items(), desc=f"{label}: compile"):
        print(f"  {name}: first step {arm(0) / 1e3:.1f} s")
        arm(1)
    times = common.interleaved(arms, rounds)
    print(
        common.table(
            [[n, float(np.median(t)), *np.percentile(t, [10, 90])] for n, t in times.items()], ["arm", "ms", "p10", "p90"]
        )
    )
    return {name: float(np.median(values)) for name, values in times.items()}


def input_share(batch_size: int, steps: int, config: aif.Config) -> float:
    """Share of the time that the loop waits for the pipeline's batches; looked at after the step has been compiled."""
    world = synthetic_world(0, users=max(200, 4 * batch_size), items=2000, topics=32, categories=50, events_per_user=60)
    dataset = world.dataset
    config = config.replace(schema=dataset.schema)
    assert dataset.catalogue.content is not None
    frozen = aif.lsh.fit(dataset.catalogue.content, config)
    dataset = dataset.with_signatures(np.asarray(aif.lsh.sign(frozen, jax.numpy.asarray(dataset.catalogue.content))))
    split = split_by_time(dataset.log)
    positions = eligible(dataset.log, split.train, min_history=1)
    sampler = NegativeSampler(item_counts(dataset, split.train))
    source = candidates.sampled(dataset, sampler=sampler, negatives=1)
    pipeline = Pipeline(
        dataset=dataset, positions=positions, candidates=source, config=config, batch_size=batch_size, epochs=100
    )
    model, optimizer = aif.build(config), optax.adam(RATE)
    state = train.init_state(model.init(jax.random.key(0), frozen=frozen), optimizer)
    step = train.make_step(model, optimizer, loss=losses.pointwise_bce)
    seen: list[float] = []

    def batches():
        for i, fed in enumerate(to_device(pipeline.batches())):
            if i == 2 * steps:
                return
            yield fed

    loop.fit(
        state, step, batches(), total=2 * steps, label="input", log_every=steps,
        on_log=lambda at, values: seen.append(values["input_share"]),
    )  # fmt: skip
    return seen[-1]


def main(arguments: list[str] | None = None) -> None:
    """Runs every comparison and prints the ratios first."""
    parser = common.parser(__doc__)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the step times as a PNG")
    parser.add_argument("--rounds", type=int, help="steps of each arm (default 20; smoke 2)")
    parser.add_argument("--threshold", action="store_true", help="only: dense against touched rows by table size, for MIN_ROWS")
    options = parser.parse_args(arguments)
    smoke = options.smoke
    rounds = options.rounds or (2 if smoke else 20)
    size = 16 if smoke else 1024
    fewer = dict(sequence=False, bridges=0, sim_fields=(), simtier="off")  # of the model's blocks: compiles fast
    small: dict[str, Any] = dict(short_length=8, width=8, tower_hidden=(8,), head_hidden=(8,), **fewer) if smoke else {}

    def arm(rows: int, *, long: int = 16 if smoke else 256, sparse: Any = DEFAULT, power_law: bool = False, **kept) -> Arm:
        config = config_of(rows, long).replace(**small)
        made = [batch_of(config, size, seed=seed, power_law=power_law) for seed in range(2 if smoke else 4)]
        return Arm(config, made, sparse=sparse, **kept)

    if options.threshold:
        touched = SparseConfig(min_rows=HOT)
        for rows in (500, 1000) if smoke else (10_000, 20_000, 50_000, 100_000):
            timed(
                {f"{n}, {rows} rows": arm(rows, sparse=s) for n, s in (("dense", None), ("touched", touched))},
                rounds,
                "threshold",
            )
        return

    figures: dict[str, Any] = {"batch_size": size, "min_rows": MIN_ROWS}
    table_rows = (1000, MIN_ROWS) if smoke else (10**4, 10**5, 10**6, 10**7)
    by_rows = timed({str(rows): arm(rows) for rows in table_rows}, rounds, "table rows")
    figures["step_ms_by_table_rows"] = by_rows
    figures["step_ratio_1e7_over_1e4"] = by_rows[str(table_rows[-1])] / by_rows[str(table_rows[0])]
    law = timed({str(rows): arm(rows, power_law=True) for rows in (table_rows[0], table_rows[-1])}, rounds, "power law")
    figures["step_ms_by_table_rows_power_law"] = law

    million = MIN_ROWS if smoke else 10**6
    pair = timed({"dense": arm(million, sparse=None), "sparse": arm(million)}, rounds, "dense and touched rows")
    figures |= {"dense_step_ms_1e6": pair["dense"], "sparse_step_ms_1e6": pair["sparse"]}

    lengths = (16, 32) if smoke else (64, 256, 1024)
    figures["step_ms_by_history"] = timed({str(long): arm(table_rows[0], long=long) for long in lengths}, rounds, "history")

    try:
        import torch  # noqa: F401
    except ImportError:
        parser.exit(1, 'PyTorch is missing: pip install "aif_jax[benchmarks]"\n')
    ours = arm(100_000 if not smoke else MIN_ROWS, keep=True)
    plain = [jax.tree.map(np.array, batch) for batch in ours.batches]  # PyTorch wants arrays that it may write to
    arms = {
        "aif_jax": ours,
        "torch SparseAdam": torch_arm(ours, plain, sparse=True),
        "torch Adagrad, sparse": torch_arm(ours, plain, sparse=True, adagrad=True),
        "torch Adam, dense": torch_arm(ours, plain, sparse=False),
    }
    both = timed(arms, rounds, "PyTorch")
    fastest = min(ms for name, ms in both.items() if name != "aif_jax")
    figures |= {
        "examples_per_s": size / both["aif_jax"] * 1e3,
        "torch_examples_per_s": size / fastest * 1e3,
        "ratio_over_torch": fastest / both["aif_jax"],
        "torch_step_ms": {name: ms for name, ms in both.items() if name != "aif_jax"},
    }
    figures["input_share"] = input_share(size, 5 if smoke else 40, config_of(1000, 16 if smoke else 256).replace(**small))

    print(f"step at {table_rows[-1]} rows over {table_rows[0]}: {figures['step_ratio_1e7_over_1e4']:.2f}")
    print(f"examples/s over the fastest PyTorch arm: {figures['ratio_over_torch']:.2f}")
    print(f"dense over touched rows at {million} rows: {pair['dense'] / pair['sparse']:.1f}")
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
