"""SimTier by R bridge codes: how close it is to the exact histogram, and what it costs the user side.

Claim     Codes that cover the catalogue lose nothing; fewer lose some of it. In real time it is a look-up, whatever L is.
Command   python -m experiments.codes --data DIR --json codes.json     (--smoke: seconds, on content made here)
Data      DIR holds the merged MovieLens: ratings.csv and content.npz (movieId, embedding). Any such pair does.
Time      two minutes on two idle cores.
Protocol  The package's functions from fit to table; T=8, signatures of K=64. Users with at least 200 events, candidates drawn
          uniformly from the catalogue. For every user, over candidates: "float" is the rank correlation of the mean tier with
          that of the histogram of the float similarity (1 + cosine) / 2, "top" that of the mean tier of the 16 most similar
          behaviours with their mean float similarity; "error" is the mean absolute difference to the float histogram in log1p
          counts, which the head reads. "signatures" is the exact histogram of signatures. "moments" are mean and deviation of
          the similarity of signatures in place of a histogram, exact by s^T m and s^T M s; its "top" is the mean of the 16
          highest of a normal distribution. Means over users and seeds (fit, candidates). "table ms" is the median time of the
          user side after `--length` behaviours, taken in turn; "state" and "fitted" are the KiB that it adds to a user's state
          and to the parameters. Nothing is trained, so there is no test set.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.blocks.signatures import fit_projection, sign, signs
from aif_jax.blocks.simtier_codes import centre_tiers, code_table, fit_centres, nearest_centre, nearest_centres
from aif_jax.output import Bar
from experiments import common
from experiments.kernels import compiled, run
from experiments.signatures import DATA, HIGHEST, TIERS, highest, movielens, planted, rank_correlation

BITS = 64


class Codes(NamedTuple):
    """One number of codes, fitted."""

    nearest: np.ndarray  # int32 [N, J] nearest codes of every item
    weight: np.ndarray  # float32 [N, J]
    table: Callable[[jax.Array, jax.Array], jax.Array]  # (rows int [L], mask [L]) -> float32 [R, T]
    fitted_bytes: int


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measures every number of codes."""
    settings = {
        "users": (40, 3, "users with long histories"),
        "candidates": (500, 60, "candidates of each user"),
        "seeds": (1, None, "fits"),
        "codes": ([64, 256, 1024, 4096, 16_384], [16, 1024], "R"),
        "per_item": ([1, 4], None, "J, codes of an item's row"),
        "length": (4096, 64, "behaviours of the timed table"),
    }
    options = common.options(__doc__, arguments, settings, need="data", data=DATA)
    content, histories = planted() if options.smoke else movielens(options.data)
    histories = histories[: options.users]

    longest = max(map(len, histories))
    padded = [(np.pad(rows, (0, longest - len(rows))), np.arange(longest) < len(rows)) for rows in histories]
    past, everything = np.random.default_rng(0).integers(0, len(content), options.length), np.ones(options.length, bool)
    found: dict[str, list[dict[str, float]]] = {}
    sizes: dict[str, dict[str, float]] = {"moments": {"state": 4 * (BITS + BITS**2) / 1024, "fitted": 0.0}}
    bar = Bar(options.seeds * len(options.codes), label="codebooks", unit="fits")
    for seed in range(options.seeds):
        signature = np.asarray(sign(fit_projection(content, bits=BITS, seed=seed), jnp.asarray(content)))
        rng = np.random.default_rng(seed)
        candidates = [rng.choice(len(content), options.candidates, replace=False) for _ in histories]
        pairs = list(zip(candidates, histories, strict=True))
        cosines = [content[items] @ content[rows].T for items, rows in pairs]
        exact, tops = [counts(cosine) for cosine in cosines], [highest(cosine) for cosine in cosines]
        by_bits = [counts(as_signs(signature[items]) @ as_signs(signature[rows]).T / BITS) for items, rows in pairs]
        found.setdefault("signatures", []).append(agreement([np.log1p(x) for x in by_bits], exact, tops))
        found.setdefault("moments", []).append(moments_agreement(signature, pairs, exact, tops))
        signed = jnp.asarray(signature)
        tables: dict[str, Any] = {"moments": compiled(lambda past, mask, s=signed: moments(s[past], mask), past, everything)}
        for r in options.codes:
            codes = fit(content, r, max(options.per_item), seed)
            tables[f"R={r}"] = compiled(codes.table, past, everything)
            sizes[f"R={r}"] = {"state": r * TIERS * 4 / 1024, "fitted": codes.fitted_bytes / 1024}
            states = [np.asarray(jax.jit(codes.table)(rows, mask)) for rows, mask in padded]
            for j in options.per_item:
                weight = codes.weight[:, :j] / codes.weight[:, :j].sum(1, keepdims=True)
                read = [(t[codes.nearest[i, :j]] * weight[i, :, None]).sum(1) for t, i in zip(states, candidates, strict=True)]
                found.setdefault(f"R={r} J={j}", []).append(agreement(read, exact, tops))
            bar.update()
        if seed == 0:
            calls = {name: (lambda form=form: run(form)) for name, form in tables.items()}
            for name, median in common.medians(calls, 2 if options.smoke else 15).items():
                sizes[name]["table ms"] = median
    bar.close()
    figures = {
        name: {key: float(np.mean([one[key] for one in seeds])) for key in seeds[0]} | sizes.get(name.rsplit(" J=", 1)[0], {})
        for name, seeds in found.items()
    }
    common.report({"codes": figures, "users": len(histories), "candidates": options.candidates}, options.json)


def fit(content: np.ndarray, r: int, per_item: int, seed: int) -> Codes:
    """Codes by k-means on the sphere, as `SimTierCodes` fits them."""
    centres = fit_centres(content, codes=r, seed=seed)
    between, code = jnp.asarray(centre_tiers(centres, tiers=TIERS)), jnp.asarray(nearest_centre(content, centres))
    nearest = partial(nearest_centres, jnp.asarray(centres), count=per_item, tiers=TIERS)
    index, weight = jax.jit(lambda rows: jax.lax.map(nearest, rows, batch_size=64))(jnp.asarray(content))

    def table(past: jax.Array, mask: jax.Array) -> jax.Array:
        return code_table(between, code[past], jnp.zeros(past.shape[0], jnp.int32), mask, tiers=TIERS)

    return Codes(np.asarray(index), np.asarray(weight), table, centres.nbytes + between.nbytes + code.nbytes)


def moments(signature: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean m [K] of a history's signs and mean M [K, K] of their outer products: what mean and variance of sim need."""
    kept = jnp.where(mask[:, None], signs(signature), 0.0)
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    return kept.sum(0) / count, kept.T @ kept / count


def spread(query: jax.Array, mean: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the similarity of signs [C, K] to a history, [C] each: exact, whatever L is."""
    bits = query.shape[-1]
    first, square = query @ mean / bits, ((query @ second) * query).sum(-1) / bits**2
    return 0.5 + first / 2, jnp.sqrt(jnp.maximum(square - first**2, 0.0)) / 2


def moments_agreement(
    signature: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]], exact: list[np.ndarray], tops: list[np.ndarray]
) -> dict[str, float]:
    """The protocol's figures of `moments`: no histogram, so no "error"."""
    found: dict[str, list[float]] = {"float": [], "top": []}
    for (items, rows), counted, top in zip(pairs, exact, tops, strict=True):
        state = moments(jnp.asarray(signature[rows]), jnp.ones(len(rows), bool))
        mean, deviation = spread(jnp.asarray(as_signs(signature[items])), *state)
        quantile = statistics.NormalDist().inv_cdf(1 - HIGHEST / 2 / len(rows))  # the middle of the highest sixteen
        found["float"].append(rank_correlation(np.asarray(mean), mean_tier(counted)))
        found["top"].append(rank_correlation(np.asarray(mean + quantile * deviation), top))
    return {name: float(np.mean(values)) for name, values in found.items()}


def as_signs(words: np.ndarray) -> np.ndarray:
    """uint32 [N, W] -> float32 [N, K] of -1 and +1."""
    return np.asarray(signs(jnp.asarray(words)))


def counts(cosine: np.ndarray) -> np.ndarray:
    """Histogram of (1 + cosine) / 2, int [C, T]; the cosine of signs gives the share of equal bits."""
    at = np.clip(((1 + cosine) / 2 * TIERS).astype(int), 0, TIERS - 1)
    return np.stack([(at == t).sum(1) for t in range(TIERS)], 1)


def agreement(read: list[np.ndarray], exact: list[np.ndarray], tops: list[np.ndarray]) -> dict[str, float]:
    """The figures of the protocol, means over users; `read` in log1p counts, `exact` in counts, both [C, T]."""
    found: dict[str, list[float]] = {"float": [], "top": [], "error": []}
    for histogram, counted, top in zip(read, exact, tops, strict=True):
        count = np.expm1(histogram)
        found["float"].append(rank_correlation(mean_tier(count), mean_tier(counted)))
        found["top"].append(rank_correlation(mean_tier(most_similar(count)), top))
        found["error"].append(float(np.abs(histogram - np.log1p(counted)).mean()))
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
