"""How well K signature bits keep what the float cosine says, by projection; what R bridge codes keep of SimTier's histogram.

Claim     Bits along the content's main directions, turned by ITQ about the origin, keep at K=64 what random bits keep at a K
          between 128 and 256. Codes that cover the catalogue lose nothing; fewer lose some of it. In real time they are a
          look-up, whatever L is.
Command   python -m experiments.signatures --data DIR --json signatures.json     (--smoke: seconds, on content made here)
Data      DIR holds the merged MovieLens: ratings.csv and content.npz (movieId, embedding). Any such pair does.
Time      two minutes of one core for projections, as much for codes with --part codes --users 40 --seeds 1.
Protocol  Users with at least 200 events; candidates drawn uniformly from the catalogue; similarity of two embeddings is
          1 - angle / pi. For every user, over candidates: "top" is the rank correlation between the mean of the 16 highest
          similarities to the user's history and the same in float; "tier" that of the mean tier of the SimTier histogram;
          "histogram" the mean total variation between the histogram of the bits (T=8) and the float one. Means over users, with
          the standard deviation over three seeds (projection, candidates). Nothing is trained, so there is no test set.
Codes     The package's functions from fit to table; T=8, signatures of K=64; the same users and candidates. "float" is the rank
          correlation of the mean tier with that of the histogram of the float similarity (1 + cosine) / 2, "top" that of the
          mean tier of the 16 most similar behaviours with their mean float similarity; "error" is the mean absolute difference
          to the float histogram in log1p counts, which the head reads. "signatures" is the exact histogram of signatures.
          Means over users and seeds (fit, candidates). "table ms" is the median time of the user side after `--length`
          behaviours, taken in turn; "state" and "fitted" are the KiB that it adds to a user's state and to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from aif_jax.blocks.signatures import fit_projection, sign
from aif_jax.blocks.simtier_codes import centre_tiers, code_table, fit_centres, nearest_centre, nearest_centres
from aif_jax.output import Bar, track
from aif_jax.types import Params
from experiments import common
from experiments.kernels import compiled

HIGHEST, TIERS, BITS = 16, 8, 64
FITS: dict[str, dict[str, Any] | None] = {
    "random": None,
    "rotated": {"centre": True},
    "itq": {"iterations": 20, "centre": True},
    "rotated at the origin": {"centre": False},
    "itq at the origin": {"iterations": 20, "centre": False},
}


SUMMARIES = {"": np.mean, "_sd": np.std}
Histories = list[np.ndarray]


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measures every projection and width, and every number of codes."""
    settings = {
        "part": (("both", "projections", "codes"), None, "what is measured"),
        "users": (60, 4, "users with long histories"),
        "candidates": (500, 60, "candidates of each user"),
        "seeds": (3, 1, "fits"),
        "bits": ([32, 64, 128, 256], [32, 64], "K"),
        "codes": ([64, 256, 1024, 4096, 16_384], [16, 1024], "R"),
        "per_item": ([1, 4], None, "J, codes of an item's row"),
        "length": (4096, 64, "behaviours of the timed table"),
    }
    options = common.options(__doc__, arguments, settings, need="data", data="folder of ratings.csv and content.npz")
    content, histories = planted() if options.smoke else movielens(options.data)
    histories = histories[: options.users]
    figures: dict[str, Any] = {"users": len(histories), "candidates": options.candidates}
    if options.part != "codes":
        figures["agreement"] = of_projections(content, histories, options)
    if options.part != "projections":
        figures["codes"] = of_codes(content, histories, options)
    common.report(figures, options.json)


def of_projections(content: np.ndarray, histories: Histories, options: Any) -> dict[str, dict[str, float]]:
    """The figures of the protocol by projection and width."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in track(range(options.seeds), label="fits", unit="seeds"):
        for name, similarity in projections(content, options.bits, seed):
            figures = agreement(content, histories, similarity, candidates=options.candidates, seed=seed)
            found.setdefault(name, []).append(figures)
    return {
        name: {f"{key}{suffix}": float(f([one[key] for one in seeds])) for key in seeds[0] for suffix, f in SUMMARIES.items()}
        for name, seeds in found.items()
    }


def projections(content: np.ndarray, bits: list[int], seed: int) -> Iterator[tuple[str, Any]]:
    """(name, similarity(items [C], behaviours [L]) -> float [C, L]) of every projection and width."""
    for k in bits:
        for kind, options in FITS.items():
            if options is None:
                gaussian = jax.random.normal(jax.random.key(seed), (content.shape[1], k))
                fitted: Params = {"projection": gaussian, "offset": jnp.zeros(k)}
            else:
                fitted = fit_projection(content, bits=k, seed=seed, **options)
            yield f"{kind} K={k}", by_bits(np.asarray(sign(fitted, jnp.asarray(content))))


def by_bits(signature: np.ndarray):
    """Share of equal bits between rows of a table of signatures [N, W]."""
    bits = 32 * signature.shape[1]
    return lambda items, past: 1 - np.bitwise_count(signature[items][:, None] ^ signature[past]).sum(-1, dtype=np.int64) / bits


def agreement(
    content: np.ndarray, histories: list[np.ndarray], similarity: Any, *, candidates: int, seed: int
) -> dict[str, float]:
    """The three figures of the protocol, means over users."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"top": [], "tier": [], "histogram": []}
    for past in histories:
        items = rng.choice(len(content), candidates, replace=False)
        angle = np.arccos(np.clip(content[items] @ content[past].T, -1, 1))
        ours, floats = similarity(items, past), 1 - angle / np.pi
        found["top"].append(rank_correlation(highest(ours), highest(floats)))
        tiers, exact = histogram(ours) / len(past), histogram(floats) / len(past)
        found["tier"].append(rank_correlation(tiers @ np.arange(TIERS), exact @ np.arange(TIERS)))
        found["histogram"].append(np.abs(tiers - exact).sum(1).mean() / 2)
    return {name: float(np.mean(values)) for name, values in found.items()}


def highest(similarity: np.ndarray) -> np.ndarray:
    """Mean of the highest similarities of every candidate [C]."""
    count = min(HIGHEST, similarity.shape[1])
    return np.partition(similarity, -count, axis=1)[:, -count:].mean(1)


def histogram(similarity: np.ndarray) -> np.ndarray:
    """How many behaviours are in every tier of a similarity in [0, 1], int [C, T]."""
    tier = np.clip((similarity * TIERS).astype(int), 0, TIERS - 1)
    return np.stack([(tier == t).sum(1) for t in range(TIERS)], 1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where one side is constant."""
    return 0.0 if 0 in (np.ptp(a), np.ptp(b)) else float(stats.spearmanr(a, b).statistic)


def movielens(folder: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Content of unit length [N, E], and the rows of every user with at least 200 events."""
    stored = np.load(folder / "content.npz")
    content = stored["embedding"].astype(np.float32)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    ratings = np.loadtxt(folder / "ratings.csv", delimiter=",", skiprows=1, usecols=(0, 1), dtype=np.int64)
    order = np.argsort(stored["movieId"])
    rows = order[np.searchsorted(stored["movieId"], ratings[:, 1], sorter=order)]
    users, starts, counts = np.unique(ratings[:, 0], return_index=True, return_counts=True)
    long = np.random.default_rng(0).permutation(np.flatnonzero(counts >= 200))
    return content, [rows[starts[u] : starts[u] + counts[u]] for u in long]


def planted() -> tuple[np.ndarray, list[np.ndarray]]:
    """Content in twenty clusters and histories that keep to a few of them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 24))
    content = (np.repeat(centres, 30, axis=0) + 0.7 * rng.normal(size=(600, 24))).astype(np.float32)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    picks = [rng.choice(20, 3, replace=False) for _ in range(4)]
    return content, [(30 * rng.choice(pick, 40) + rng.integers(0, 30, 40)) for pick in picks]


# codes


class Codes(NamedTuple):
    """One number of codes, fitted."""

    nearest: np.ndarray  # int32 [N, J] nearest codes of every item
    weight: np.ndarray  # float32 [N, J]
    table: Callable[[jax.Array, jax.Array], jax.Array]  # (rows int [L], mask [L]) -> float32 [R, T]
    fitted_bytes: int


def of_codes(content: np.ndarray, histories: Histories, options: Any) -> dict[str, dict[str, float]]:
    """The figures of every number of codes."""
    longest = max(map(len, histories))
    padded = [(np.pad(rows, (0, longest - len(rows))), np.arange(longest) < len(rows)) for rows in histories]
    past, everything = np.random.default_rng(0).integers(0, len(content), options.length), np.ones(options.length, bool)
    found: dict[str, list[dict[str, float]]] = {}
    sizes: dict[str, dict[str, float]] = {}
    bar = Bar(options.seeds * len(options.codes), label="codebooks", unit="fits")
    for seed in range(options.seeds):
        signature = np.asarray(sign(fit_projection(content, bits=BITS, seed=seed), jnp.asarray(content)))
        rng = np.random.default_rng(seed)
        candidates = [rng.choice(len(content), options.candidates, replace=False) for _ in histories]
        pairs = list(zip(candidates, histories, strict=True))
        cosines = [content[items] @ content[rows].T for items, rows in pairs]
        exact, tops = [histogram((1 + cosine) / 2) for cosine in cosines], [highest(cosine) for cosine in cosines]
        bits = [histogram(by_bits(signature)(items, rows)) for items, rows in pairs]
        found.setdefault("signatures", []).append(tables_agree([np.log1p(x) for x in bits], exact, tops))
        tables: dict[str, Any] = {}
        for r in options.codes:
            codes = fit(content, r, max(options.per_item), seed)
            tables[f"R={r}"] = compiled(codes.table, past, everything)
            sizes[f"R={r}"] = {"state": r * TIERS * 4 / 1024, "fitted": codes.fitted_bytes / 1024}
            states = [np.asarray(jax.jit(codes.table)(rows, mask)) for rows, mask in padded]
            for j in options.per_item:
                weight = codes.weight[:, :j] / codes.weight[:, :j].sum(1, keepdims=True)
                read = [(t[codes.nearest[i, :j]] * weight[i, :, None]).sum(1) for t, i in zip(states, candidates, strict=True)]
                found.setdefault(f"R={r} J={j}", []).append(tables_agree(read, exact, tops))
            bar.update()
        if seed == 0:
            for name, median in common.medians(tables, 2 if options.smoke else 15).items():
                sizes[name]["table ms"] = median
    bar.close()
    return {
        name: {key: float(np.mean([one[key] for one in seeds])) for key in seeds[0]} | sizes.get(name.rsplit(" J=", 1)[0], {})
        for name, seeds in found.items()
    }


def fit(content: np.ndarray, r: int, per_item: int, seed: int) -> Codes:
    """Codes by k-means on the sphere, as `SimTierCodes` fits them."""
    centres = fit_centres(content, codes=r, seed=seed)
    between, code = jnp.asarray(centre_tiers(centres, tiers=TIERS)), jnp.asarray(nearest_centre(content, centres))
    nearest = partial(nearest_centres, jnp.asarray(centres), count=per_item, tiers=TIERS)
    index, weight = jax.jit(lambda rows: jax.lax.map(nearest, rows, batch_size=64))(jnp.asarray(content))

    def table(past: jax.Array, mask: jax.Array) -> jax.Array:
        return code_table(between, code[past], jnp.zeros(past.shape[0], jnp.int32), mask, tiers=TIERS)

    return Codes(np.asarray(index), np.asarray(weight), table, centres.nbytes + between.nbytes + code.nbytes)


def tables_agree(read: list[np.ndarray], exact: list[np.ndarray], tops: list[np.ndarray]) -> dict[str, float]:
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
    main()
