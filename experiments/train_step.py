"""One training step of the same network in JAX and in PyTorch, side by side.

Claim     a step of aif_jax is at least as fast as a straightforward PyTorch version of the same network on CPU.
Command   python -m experiments.train_step --data DIR      (merged MovieLens with content.npz; or --smoke)
Sizes     B=1024 pointwise samples, S=32, L=256, D=32, K=64; AdamW and clipping in both arms, dense embedding gradients.
Checked   both arms start from the same parameters; their logits must agree to 1e-4 before anything is timed.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np
from aif_jax.data.synthetic import synthetic_world

import aif_jax as aif
from aif_jax import losses, train
from aif_jax.data import movielens
from aif_jax.data.batches import make_batch
from aif_jax.data.sampling import NegativeSampler, item_counts, lists
from aif_jax.data.split import eligible, split_by_time
from experiments import common


def main(arguments: list[str] | None = None) -> None:
    """Runs both arms in turn and prints the ratio."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="a folder with MovieLens files, and content.npz where there is one"
    )
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, help="steps of each arm (default 40; smoke 3)")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        parser.exit(1, 'PyTorch is missing: pip install "aif-jax[benchmarks]"\n')
    from experiments.torch_aif import TorchAIF, to_torch

    if options.smoke:
        dataset = synthetic_world(0, users=60, items=300, topics=20, categories=20, events_per_user=120).dataset
    elif options.data is None:
        parser.error("--data: expected a folder with MovieLens files (or --smoke)")
    else:
        vectors = options.data / "content.npz"
        dataset = movielens.read(options.data, content=vectors if vectors.exists() else "text")
    batch_size, rounds = (64, 3) if options.smoke else (options.batch_size, 40)
    rounds = options.rounds or rounds
    config = aif.Config(schema=dataset.schema, long_length=64 if options.smoke else 256)
    model = aif.build(config)
    assert dataset.catalogue.content is not None
    frozen = aif.lsh.fit(dataset.catalogue.content, config)
    dataset = dataset.with_signatures(np.asarray(aif.lsh.sign(frozen, jax.numpy.asarray(dataset.catalogue.content))))
    params = model.init(jax.random.key(0), frozen=frozen)
    batches = _pointwise(dataset, config, batch_size)

    optimizer = train.default_optimizer(10_000)
    state = train.init_state(params, optimizer)
    step = train.make_step(model, optimizer, loss=losses.pointwise_bce)

    network = TorchAIF(params, config)
    adamw = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-5)
    tensors = [to_torch(batch) for batch in batches]
    with torch.no_grad():
        ours, theirs = np.asarray(train.score(model, params, batches[0]))[:, 0], network(tensors[0]).numpy()
    difference = float(np.abs(ours - theirs).max())
    print(f"largest difference of the two arms' logits: {difference:.2e}")
    if not difference < 1e-4:
        raise SystemExit("the arms are not the same network: nothing is timed")

    def jax_arm(i: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        state, _ = step(state, batches[i % len(batches)])
        jax.block_until_ready(state.step)
        return (time.perf_counter() - begin) * 1e3

    def torch_arm(i: int) -> float:
        begin = time.perf_counter()
        batch = tensors[i % len(tensors)]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(batch), batch["labels"])
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        return (time.perf_counter() - begin) * 1e3

    for arm in (jax_arm, torch_arm):
        arm(0), arm(1)
    times = common.interleaved({"jax": jax_arm, "torch": torch_arm}, rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    spread = {name: [float(np.percentile(values, q)) for q in (10, 90)] for name, values in times.items()}
    ratio = medians["torch"] / medians["jax"]
    print(common.table([[name, medians[name], *spread[name]] for name in times], ["arm", "ms", "p10", "p90"]))
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


def _pointwise(dataset, config: aif.Config, batch_size: int, count: int = 4):
    """Batches of one candidate a sample: the event's item or, as often, a sampled one."""
    split = split_by_time(dataset.log)
    positions = eligible(dataset.log, split.train, min_history=1)
    sampler = NegativeSampler(item_counts(dataset, split.train))
    rng = np.random.default_rng(0)
    made = []
    for step in range(count):
        at = rng.choice(positions, batch_size)
        rows, labels = lists(dataset, at, sampler=sampler, negatives=1, seed=0, epoch=0, step=step)
        column = rng.integers(0, 2, batch_size)
        pick = np.arange(batch_size), column
        made.append(make_batch(dataset, at, rows[pick][:, None], labels[pick][:, None], config=config))
    return made


if __name__ == "__main__":
    main()
