"""SimTier by R bridge codes: what it keeps of the histogram that it stands for, and what it costs the user side.

Claim     Codes that cover the catalogue lose nothing; with fewer, codes by cosine follow the float cosine better than codes by
          signature. In real time both are a look-up, whatever L is.
Command   python -m experiments.codes --data DIR --json codes.json     (--smoke: seconds, on content made here)
Data      DIR holds the merged MovieLens: ratings.csv and content.npz (movieId, embedding). Any such pair does.
Time      two to three minutes on two idle cores.
Protocol  The package's own functions from fit to table; K=64, T=8. Users with at least 200 events, candidates drawn uniformly
          from the catalogue. For every user, over candidates: "float" is the rank correlation of the mean tier with that of
          the histogram of the float similarity (1 + cosine) / 2, "own" with that of the exact histogram that the codes stand
          for (by signatures, by cosine), "top" that of the mean tier of the 16 most similar behaviours with their mean float
          similarity; "error" is the mean absolute difference to the own histogram in log1p counts, which the head reads.
          "moments" are mean and deviation of the similarity of signatures in place of a histogram, exact by s^T m and s^T M s;
          its "top" is the mean of the 16 highest of a normal distribution. Means over users and seeds (projection, codes,
          candidates). "table ms" is the median time of the user side after `--length` behaviours, arms interleaved; "state"
          and "frozen" are the KiB that it adds to a user's state and to the parameters. Nothing is trained, so there is no
          test set.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from aif_jax import lsh, simtier
from aif_jax.types import TierHistory
from experiments import common
from experiments.kernels import compiled, timed
from experiments.signatures import HIGHEST, TIERS, highest, movielens, planted, rank_correlation

BITS = 64


class Codes(NamedTuple):
    """One number of codes of one kind, fitted."""

    index: np.ndarray  # int32 [N, J] nearest codes of every item
    weight: np.ndarray  # float32 [N, J]
    table: Any  # (rows int [L], mask [L]) -> float32 [R, T]
    frozen_bytes: int


def main(arguments: list[str] | None = None) -> None:
    """Measures every kind and number of codes."""
    made = common.parser(__doc__)
    made.add_argument("--data", metavar="DIR", type=Path, help="folder of ratings.csv and content.npz")
    made.add_argument("--users", type=int, default=40, help="users with long histories")
    made.add_argument("--candidates", type=int, default=500, help="candidates of each user")
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--codes", type=int, nargs="+", default=[64, 256, 1024, 4096, 16_384], help="R")
    made.add_argument("--per-item", type=int, nargs="+", default=[1, 4], help="J, codes of an item's row")
    made.add_argument("--length", type=int, default=4096, help="behaviours of the timed table")
    options = made.parse_args(arguments)
    if options.smoke:
        content, histories = planted()
        options.users, options.candidates, options.codes, options.length = 3, 60, [16, 1024], 64
    elif options.data is None:
        made.error("--data DIR is needed, or --smoke")
    else:
        content, histories = movielens(options.data)
    histories = histories[: options.users]

    padded = [np.pad(rows, (0, max(map(len, histories)) - len(rows))) for rows in histories]
    users = [(rows, at, np.arange(len(at)) < len(rows)) for rows, at in zip(histories, padded, strict=True)]
    past, everything = np.random.default_rng(0).integers(0, len(content), options.length), np.ones(options.length, bool)

    found: dict[str, list[dict[str, float]]] = {}
    sizes: dict[str, dict[str, float]] = {}
    fits = {"signature": by_signature, "cosine": by_cosine}
    bar = tqdm(total=options.seeds * 2 * len(options.codes), desc="fits", unit="fit")
    for seed in range(options.seeds):
        signature = np.asarray(lsh.sign(lsh.fit_projection(content, bits=BITS, seed=seed), jnp.asarray(content)))
        rng = np.random.default_rng(seed)
        asked = [rng.choice(len(content), options.candidates, replace=False) for _ in users]
        floats = [content[items] @ content[rows].T for items, (rows, *_) in zip(asked, users, strict=True)]
        bits = [
            signs(signature[items]) @ signs(signature[rows]).T / BITS for items, (rows, *_) in zip(asked, users, strict=True)
        ]
        tops = [highest(cosine) for cosine in floats]
        exact = {"signature": [counts(x) for x in bits], "cosine": [counts(x) for x in floats]}
        for kind, own in exact.items():
            record = agreement([np.log1p(x) for x in own], own, exact["cosine"], tops)
            found.setdefault(f"exact by {kind}", []).append(record)
        found.setdefault("moments", []).append(moments_agreement(signature, users, asked, exact, tops))
        signed = jnp.asarray(signature)
        tables: dict[str, Any] = {"moments": compiled(lambda past, mask, s=signed: moments(s[past], mask), past, everything)}
        sizes["moments"] = {"state": 4 * (BITS + BITS**2) / 1024, "frozen": 0.0}
        for r in options.codes:
            for kind, fit in fits.items():
                codes = fit(content, signature, r, max(options.per_item), seed)
                table = compiled(codes.table, past, everything)
                tables[f"{kind} R={r}"] = table
                made = [np.asarray(jax.jit(codes.table)(at, mask)) for _, at, mask in users]
                for j in options.per_item:
                    weight = codes.weight[:, :j] / codes.weight[:, :j].sum(1, keepdims=True)
                    read = [(t[codes.index[i, :j]] * weight[i, :, None]).sum(1) for t, i in zip(made, asked, strict=True)]
                    record = agreement(read, exact[kind], exact["cosine"], tops)
                    found.setdefault(f"{kind} R={r} J={j}", []).append(record)
                sizes[f"{kind} R={r}"] = {"state": r * TIERS * 4 / 1024, "frozen": codes.frozen_bytes / 1024}
                bar.update()
        if seed == 0:
            spent = {name: (lambda _, arm=arm: timed(*arm)) for name, arm in tables.items()}
            for name, times in common.interleaved(spent, 2 if options.smoke else 15).items():
                sizes[name]["table ms"] = float(np.median(times))
    bar.close()
    figures = {
        name: {key: float(np.mean([one[key] for one in seeds])) for key in seeds[0]} | sizes.get(name.rsplit(" J=", 1)[0], {})
        for name, seeds in found.items()
    }
    header = ["float", "own", "top", "error", "table ms", "state", "frozen"]
    print(common.table([[name, *(row.get(key, "") for key in header)] for name, row in figures.items()], ["arm", *header]))
    common.write_json(options.json, {"codes": figures, "users": len(histories), "candidates": options.candidates})


def by_signature(content: np.ndarray, signature: np.ndarray, r: int, per_item: int, seed: int) -> Codes:
    """Codes by k-majority in Hamming space."""
    codes = lsh.fit_codes(signature, codes=r, seed=seed)
    index, weight = every(partial(simtier.nearest_codes, codes, count=per_item, tiers=TIERS), signature)
    signed = jnp.asarray(signature)

    def table(past: jax.Array, mask: jax.Array) -> jax.Array:
        group = jnp.zeros(past.shape[0], jnp.int32)
        return simtier.code_table(codes, TierHistory(signature=signed[past], group=group, mask=mask), tiers=TIERS)

    return Codes(index, weight, table, codes.nbytes)


def by_cosine(content: np.ndarray, signature: np.ndarray, r: int, per_item: int, seed: int) -> Codes:
    """Codes by k-means on the sphere; a behaviour stands for its code."""
    centres = lsh.fit_centres(content, codes=r, seed=seed)
    between, own = (jnp.asarray(x) for x in (lsh.centre_tiers(centres, tiers=TIERS), lsh.nearest_centre(content, centres)))
    index, weight = every(partial(simtier.nearest_centres, jnp.asarray(centres), count=per_item, tiers=TIERS), content)

    def table(past: jax.Array, mask: jax.Array) -> jax.Array:
        return simtier.centre_table(between, own[past], jnp.zeros(past.shape[0], jnp.int32), mask, tiers=TIERS)

    return Codes(index, weight, table, centres.nbytes + between.nbytes + own.nbytes)


def moments(signature: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean m [K] of a history's signs and mean M [K, K] of their outer products: what mean and variance of sim need."""
    kept = jnp.where(mask[:, None], lsh.signs(signature), 0.0)
    count = jnp.maximum(mask.sum(), 1)
    return kept.sum(0) / count, kept.T @ kept / count


def spread(query: jax.Array, mean: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the similarity of signs [C, K] to a history, [C] each: exact, whatever L is."""
    bits = query.shape[-1]
    first, square = query @ mean / bits, ((query @ second) * query).sum(-1) / bits**2
    return 0.5 + first / 2, jnp.sqrt(jnp.maximum(square - first**2, 0.0)) / 2


def moments_agreement(
    signature: np.ndarray,
    users: list[tuple[np.ndarray, ...]],
    asked: list[np.ndarray],
    exact: dict[str, list[np.ndarray]],
    tops: list[np.ndarray],
) -> dict[str, float]:
    """The protocol's figures of `moments`: no histogram, so no "error"."""
    found: dict[str, list[float]] = {"float": [], "own": [], "top": []}
    for i, (rows, _, _) in enumerate(users):
        past = jnp.asarray(signature[rows])
        mean, deviation = spread(jnp.asarray(signs(signature[asked[i]])), *moments(past, jnp.ones(len(rows), bool)))
        quantile = statistics.NormalDist().inv_cdf(1 - HIGHEST / 2 / len(rows))  # the middle of the highest sixteen
        found["float"].append(rank_correlation(np.asarray(mean), mean_tier(exact["cosine"][i])))
        found["own"].append(rank_correlation(np.asarray(mean), mean_tier(exact["signature"][i])))
        found["top"].append(rank_correlation(np.asarray(mean + quantile * deviation), tops[i]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def every(nearest: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes of all rows [N, J] and their weights."""
    index, weight = jax.jit(lambda x: jax.lax.map(nearest, x, batch_size=64))(jnp.asarray(rows))
    return np.asarray(index), np.asarray(weight)


def signs(words: np.ndarray) -> np.ndarray:
    """uint32 [N, W] -> float32 [N, K] of -1 and +1."""
    return np.asarray(lsh.signs(jnp.asarray(words)))


def counts(cosine: np.ndarray) -> np.ndarray:
    """Histogram of (1 + cosine) / 2, int [C, T]; the cosine of signs gives the share of equal bits."""
    at = np.clip(((1 + cosine) / 2 * TIERS).astype(int), 0, TIERS - 1)
    return np.stack([(at == t).sum(1) for t in range(TIERS)], 1)


def agreement(
    read: list[np.ndarray], own: list[np.ndarray], floats: list[np.ndarray], tops: list[np.ndarray]
) -> dict[str, float]:
    """The figures of the protocol, means over users; `read` in log1p counts, `own` and `floats` in counts, all [C, T]."""
    found: dict[str, list[float]] = {"float": [], "own": [], "top": [], "error": []}
    for block, exact, floating, top in zip(read, own, floats, tops, strict=True):
        count = np.expm1(block)
        found["float"].append(rank_correlation(mean_tier(count), mean_tier(floating)))
        found["own"].append(rank_correlation(mean_tier(count), mean_tier(exact)))
        found["top"].append(rank_correlation(mean_tier(most_similar(count)), top))
        found["error"].append(float(np.abs(block - np.log1p(exact)).mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def mean_tier(count: np.ndarray) -> np.ndarray:
    """Mean tier of a histogram [C, T] -> [C]."""
    return np.round(count @ np.arange(TIERS) / np.maximum(count.sum(1), 1e-9), 6)  # equal histograms tie


def most_similar(count: np.ndarray) -> np.ndarray:
    """The histogram of the HIGHEST most similar behaviours alone [C, T]."""
    reached = np.minimum(np.cumsum(count[:, ::-1], 1), HIGHEST)
    return np.diff(reached, axis=1, prepend=0)[:, ::-1]


if __name__ == "__main__":
    main(sys.argv[1:])
