"""The main job: train AIF on real interactions, fill the item table, answer requests in the staged way.

Claim     AIF ranks better than a two-tower model, and its critical path is shorter than with the same model run sequentially.
Command   python -m experiments.quickstart            (or --smoke, --data DIR, --json FILE; --help lists all)
Data      MovieLens-100K, fetched; next item: which movie does the user rate next?
Protocol  split by time: training on the first 80 % of all events, held-out requests from the last 10 % (the 10 % between are
          left for choosing hyperparameters and are not looked at here). Both models get the same samples, epochs and optimizer.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np
from aif_jax.data.synthetic import synthetic_world
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax import checkpoint, loop, losses, train
from aif_jax.data import fetch, movielens
from aif_jax.data.batches import next_item_batches
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler, item_counts
from aif_jax.data.split import eligible, split_by_time
from aif_jax.types import Params
from experiments import common
from experiments.evaluation import Figures, evaluate, held_out
from experiments.staged import Server, draw

NEGATIVES = 15


def main(arguments: list[str] | None = None) -> None:
    """Runs the job and prints its figures."""
    options = parse(arguments)
    began = time.perf_counter()
    dataset = load(options)
    print(f"data: {dataset}")
    split = split_by_time(dataset.log)
    positions = eligible(dataset.log, split.train, min_history=1)
    sampler = NegativeSampler(item_counts(dataset, split.train))
    requests = held_out(dataset, split.test, sampler, requests=options.requests, seed=options.seed)
    print(f"split by time: {len(positions)} training samples, {len(requests.positions)} held-out requests")

    figures: dict[str, Figures] = {}
    trained: dict[str, tuple[aif.PreRanker, Params, Dataset]] = {}
    for name, config in configs(dataset, smoke=options.smoke).items():
        model, params, signed = fit(config, dataset, positions, sampler, options)
        trained[name] = model, params, signed
        figures[name] = evaluate(model, params, signed, requests, k=100, calibrated=NEGATIVES)
    header = ["model", "log-loss", "AUC", "GAUC", "HR@100"]
    print("\n" + common.table([[name, *row] for name, row in figures.items()], header) + "\n")

    model, params, signed = trained["aif"]
    if options.checkpoint is not None:
        checkpoint.save(options.checkpoint, params, model.config, metrics={"gauc": figures["aif"].gauc})
        print(f"checkpoint of the AIF model written to {options.checkpoint}")
    tower, tower_params, _ = trained["two_tower"]
    times, difference, middle, overlap = serve(model, params, (tower, tower_params), signed, requests.positions, options)
    staged, sequential = float(np.median(times["staged"])), float(np.median(times["sequential"]))
    print(f"{len(times['staged'])} requests each way, interleaved, {options.candidates} candidates at most:")
    print(f"  critical path, median: staged {staged:.2f} ms, sequential {sequential:.2f} ms, ratio {sequential / staged:.2f}")
    print(f"  critical path, p99:    staged {np.percentile(times['staged'], 99):.2f} ms, "
          f"sequential {np.percentile(times['sequential'], 99):.2f} ms")  # fmt: skip
    print(f"  largest difference between staged and joint scores: {difference:.2e}")
    print(f"  top items the same both ways: {overlap:.1%}")
    draw(middle, options.figure, title=f"One request on {signed.name}: the same model, staged and sequential")
    print(f"timelines drawn in {options.figure}")

    seconds = time.perf_counter() - began
    print(f"done in {seconds:.0f} s")
    common.write_json(
        options.json,
        {
            "auc": figures["aif"].auc,
            "gauc": figures["aif"].gauc,
            "hr100": figures["aif"].hr,
            "log_loss": figures["aif"].log_loss,
            "two_tower_auc": figures["two_tower"].auc,
            "two_tower_gauc": figures["two_tower"].gauc,
            "two_tower_hr100": figures["two_tower"].hr,
            "two_tower_log_loss": figures["two_tower"].log_loss,
            "max_abs_staged_minus_joint": difference,
            "critical_path_ms_staged": staged,
            "critical_path_ms_sequential": sequential,
            "dataset": dataset.name,
            "n_users": len(dataset.users) - 1,
            "n_items": len(dataset.items) - 1,
            "n_events": len(dataset.log),
            "seconds": seconds,
        },
    )


def parse(arguments: list[str] | None):
    """The command line; unset sizes depend on --smoke."""
    parser = common.parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="DIR", type=Path, help="a folder with MovieLens files of any release")
    source.add_argument("--dataset", default="ml-100k", choices=sorted(fetch.RELEASES), help="the release to fetch")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="where fetched data is kept (default: the user's cache)")
    parser.add_argument("--epochs", type=int, help="passes over the training samples (default 3; smoke 1)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples a step (default %(default)s)")
    parser.add_argument("--requests", type=int, help="held-out requests (default 2000; smoke 200)")
    parser.add_argument("--served", type=int, help="requests answered in each way (default 300; smoke 30)")
    parser.add_argument("--candidates", type=int, default=1000, help="that retrieval finds (default %(default)s)")
    parser.add_argument(
        "--checkpoint", metavar="DIR", type=Path, help="write the AIF model there, a folder that must not exist"
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters, order and negatives (default %(default)s)")
    parser.add_argument(
        "--figure", metavar="PNG", type=Path, default=Path("quickstart_timelines.png"), help="default %(default)s"
    )
    options = parser.parse_args(arguments)
    for name, usual, smoke in (("epochs", 3, 1), ("requests", 2000, 200), ("served", 300, 30)):
        if getattr(options, name) is None:
            setattr(options, name, smoke if options.smoke else usual)
    for name in ("epochs", "batch_size", "requests", "served", "candidates"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if options.checkpoint is not None and options.checkpoint.exists():
        parser.error(f"--checkpoint: expected a folder that does not exist, got {options.checkpoint}")
    return options


def load(options) -> Dataset:
    """The synthetic world, one's own MovieLens folder, or a fetched release; with content from titles, genres and tags."""
    if options.smoke:
        return synthetic_world(options.seed, users=100, items=400, topics=20, categories=20, events_per_user=120).dataset
    if options.data is not None:
        return movielens.read(options.data, content="text")
    fetched = fetch.fetch_movielens(options.dataset, cache_dir=options.cache)
    print(f"{options.dataset} from {'the cache, first from ' if fetched.cached else ''}{fetched.source}: {fetched.path}")
    if fetched.reason:
        print(f"  ({fetched.reason})")
    return movielens.read(fetched.path, content="text")


def configs(dataset: Dataset, *, smoke: bool) -> dict[str, aif.Config]:
    """AIF and the two-tower model; both see the same features and share every size."""
    sizes = dict(width=16, long_length=64, tower_hidden=(32,), head_hidden=(32, 16)) if smoke else {}
    return {name: aif.Config(schema=dataset.schema, architecture=name, **sizes) for name in ("two_tower", "aif")}


def fit(
    config: aif.Config, dataset: Dataset, positions: np.ndarray, sampler: NegativeSampler, options
) -> tuple[aif.PreRanker, Params, Dataset]:
    """A trained model, and the data set with the signatures that it needs."""
    model = aif.build(config)
    content = dataset.catalogue.content
    assert content is not None  # `load` asks for it
    frozen = aif.lsh.fit(content, config, seed=options.seed)
    if config.uses_signatures:
        dataset = dataset.with_signatures(np.asarray(aif.lsh.sign(frozen, jax.numpy.asarray(content))))
    steps = len(positions) // options.batch_size
    if not steps:
        sys.exit(f"--batch-size {options.batch_size}: expected at most the {len(positions)} training samples")
    optimizer = train.default_optimizer(steps * options.epochs)
    state = train.init_state(model.init(jax.random.key(options.seed), frozen=frozen), optimizer)
    step = train.make_step(model, optimizer, loss=losses.pointwise_bce)
    for epoch in range(options.epochs):
        batches = next_item_batches(
            dataset, positions, config=config, sampler=sampler, batch_size=options.batch_size, negatives=NEGATIVES,
            seed=options.seed, epoch=epoch,
        )  # fmt: skip
        state = loop.fit(state, step, batches, total=steps, label=f"{config.architecture} epoch {epoch + 1}/{options.epochs}")
    return model, jax.block_until_ready(state.params), dataset


def serve(model, params, retrieval, dataset: Dataset, positions: np.ndarray, options):
    """Answers requests both ways in turn.

    Returns:
      Critical-path milliseconds of each way, the largest |staged - joint|, the answers of a typical request, and the share of
      top items that both ways agree on.
    """
    server = Server(model, params, retrieval, dataset, candidates=options.candidates, k=100)
    ways = {"staged": server.staged, "sequential": server.sequential}
    asked = np.random.default_rng(options.seed).choice(positions, options.served)
    for way in ways.values():  # compiles
        way(int(asked[0]))
    answers: dict[str, list] = {name: [] for name in ways}
    bar = tqdm(total=options.served, desc="requests, staged and sequential", unit="request")

    def arm(name: str):
        def run(i: int) -> float:
            answers[name].append(ways[name](int(asked[i])))
            bar.update(0.5)
            return answers[name][-1].critical_ms

        return run

    times = common.interleaved({name: arm(name) for name in ways}, options.served)
    bar.close()
    checked = [(int(at), answer) for at, answer in zip(asked, answers["staged"], strict=True)][:50]
    difference = max(float(np.abs(server.joint(at, answer.items) - answer.scores).max()) for at, answer in checked)
    pairs = zip(answers["staged"], answers["sequential"], strict=True)
    overlap = float(np.mean([len(np.intersect1d(a.items, b.items)) / len(a.items) for a, b in pairs]))
    typical = {name: int(np.argsort(times[name])[options.served // 2]) for name in ways}
    server.close()
    return times, difference, {name: answers[name][at] for name, at in typical.items()}, overlap


if __name__ == "__main__":
    main()
