"""One training step of the same network in JAX and in PyTorch.

Claim     a step of aif_jax is at least as fast as a straightforward PyTorch version of the same network on CPU.
Command   python -m experiments.train_step --data DIR      (merged MovieLens with content.npz; or --smoke)
Model     `presets.aif`, B=1024 pointwise samples; AdamW and clipping in both, dense embedding gradients.
Checked   both start from the same parameters; their logits must agree to 1e-4 before anything is timed.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np

import aif_jax as aif
from aif_jax import train
from aif_jax.data import candidates
from aif_jax.data.candidates import NegativeSampler, SampleKey, item_counts
from aif_jax.data.dataset import Dataset
from aif_jax.data.pipeline import Batch, make_batch
from aif_jax.data.split import eligible, split_by_time
from aif_jax.train import losses
from experiments import common
from experiments.datasets import movielens
from experiments.datasets.synthetic import synthetic_world


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs both in turn and prints the ratio."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="a folder with MovieLens files, and content.npz where there is one"
    )
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, help="steps of each (default 40; smoke 3)")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        parser.exit(1, 'PyTorch is missing: pip install "aif_jax[benchmarks]"\n')
    from experiments.torch_aif import TorchAIF, expect_same, to_torch

    if options.smoke:
        dataset = synthetic_world(0, users=60, items=300, topics=20, categories=20, events_per_user=120).dataset
    elif options.data is None:
        parser.error("--data: expected a folder with MovieLens files (or --smoke)")
    else:
        vectors = options.data / "content.npz"
        dataset = movielens.read(options.data, content=vectors if vectors.exists() else "text")
    batch_size, rounds = (64, 3) if options.smoke else (options.batch_size, 40)
    rounds = options.rounds or rounds
    config = aif.presets.aif(dataset.schema, long_length=64 if options.smoke else aif.presets.LONG_LENGTH)
    model = aif.build(config)
    params = model.init(jax.random.key(0), dataset.catalogue)
    batches = pointwise(dataset, config, batch_size)
    optimizer = train.default_optimizer(10_000)
    state = train.init_state(params, optimizer)
    step = train.make_step(model, optimizer, loss=losses.pointwise_bce, sparse=None)

    network = TorchAIF(params, config)
    adamw = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-5)
    tensors = [to_torch(batch, params, config) for batch in batches]
    difference = expect_same(network, tensors[0], model, params, batches[0])
    print(f"largest difference of the logits: {difference:.2e}")

    def in_jax(i: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        state, _ = step(state, batches[i % len(batches)])
        jax.block_until_ready(state.step)
        return (time.perf_counter() - begin) * 1e3

    def in_torch(i: int) -> float:
        begin = time.perf_counter()
        batch = tensors[i % len(tensors)]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(batch), batch["labels"])
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        return (time.perf_counter() - begin) * 1e3

    for number in (0, 1):
        in_jax(number)
        in_torch(number)
    times = common.interleaved({"jax": in_jax, "torch": in_torch}, rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratio = medians["torch"] / medians["jax"]
    rows = [[name, medians[name], *np.percentile(values, [10, 90])] for name, values in times.items()]
    print(common.table(rows, ["step", "ms", "p10", "p90"]))
    print(f"PyTorch / JAX: {ratio:.2f}  (B={batch_size}, {torch.get_num_threads()} PyTorch threads)")
    common.write_json(
        options.json,
        {
            "jax_step_ms": medians["jax"],
            "torch_step_ms": medians["torch"],
            "ratio_torch_over_jax": ratio,
            "max_abs_logit_difference": difference,
            "batch_size": batch_size,
            "torch_threads": torch.get_num_threads(),
        },
    )


def pointwise(dataset: Dataset, config: aif.Config, batch_size: int, count: int = 4) -> list[Batch]:
    """Batches of one candidate a sample: the event's item or, as often, a sampled one."""
    split = split_by_time(dataset.log)
    positions = eligible(dataset.log, split.train, min_history=1)
    source = candidates.sampled_negatives(dataset, sampler=NegativeSampler(item_counts(dataset, split.train)), negatives=1)
    rng = np.random.default_rng(0)
    made = []
    for step in range(count):
        at = rng.choice(positions, batch_size)
        rows, labels, _ = source(at, SampleKey(0, 0, step))
        pick = np.arange(batch_size), rng.integers(0, 2, batch_size)
        made.append(make_batch(dataset, at, rows[pick][:, None], labels[pick][:, None], config=config))
    return made


if __name__ == "__main__":
    main()
