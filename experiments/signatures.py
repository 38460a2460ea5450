"""How well K signature bits keep what the float cosine says, by projection.

Claim     Bits along the content's main directions, turned by ITQ about the origin, keep at K=64 what random bits keep at a K
          between 128 and 256.
Command   python -m experiments.signatures --data DIR --json signatures.json     (--smoke: seconds, on content made here)
Data      DIR holds the merged MovieLens: ratings.csv and content.npz (movieId, embedding). Any such pair does.
Time      two minutes of one core.
Protocol  Users with at least 200 events; candidates drawn uniformly from the catalogue; similarity of two embeddings is
          1 - angle / pi. For every user, over candidates: "top" is the rank correlation between the mean of the 16 highest
          similarities to the user's history and the same in float; "tier" that of the mean tier of the SimTier histogram;
          "histogram" the mean total variation between the histogram of the bits (T=8) and the float one. Means over users, with
          the standard deviation over three seeds (projection, candidates). Nothing is trained, so there is no test set.
          `experiments/codes.py` measures SimTier by bridge codes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.blocks.signatures import fit_projection, sign
from aif_jax.output import track
from aif_jax.types import Params
from experiments import common

HIGHEST, TIERS = 16, 8
DATA = "folder of ratings.csv and content.npz"
FITS: dict[str, dict[str, Any] | None] = {
    "random": None,
    "rotated": {"centre": True},
    "itq": {"iterations": 20, "centre": True},
    "rotated at the origin": {"centre": False},
    "itq at the origin": {"iterations": 20, "centre": False},
}


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measures every projection and width."""
    settings = {
        "users": (60, 4, "users with long histories"),
        "candidates": (500, 60, "candidates of each user"),
        "seeds": (3, 1, "fits"),
        "bits": ([32, 64, 128, 256], [32, 64], "K"),
    }
    options = common.options(__doc__, arguments, settings, need="data", data=DATA)
    content, histories = planted() if options.smoke else movielens(options.data)
    histories = histories[: options.users]

    found: dict[str, list[dict[str, float]]] = {}
    for seed in track(range(options.seeds), label="fits", unit="seeds"):
        for name, similarity in projections(content, options.bits, seed):
            figures = agreement(content, histories, similarity, candidates=options.candidates, seed=seed)
            found.setdefault(name, []).append(figures)
    figures = {
        name: {f"{key}{suffix}": float(f([one[key] for one in seeds])) for key in seeds[0] for suffix, f in SUMMARIES.items()}
        for name, seeds in found.items()
    }
    common.report({"agreement": figures, "users": len(histories), "candidates": options.candidates}, options.json)


SUMMARIES = {"": np.mean, "_sd": np.std}


def projections(content: np.ndarray, bits: list[int], seed: int) -> Iterator[tuple[str, Any]]:
    """(name, similarity(items [C], behaviours [L]) -> float [C, L]) of every projection and width."""
    for k in bits:
        for kind, options in FITS.items():
            if options is None:
                fitted = random_projection(content.shape[1], bits=k, seed=seed)
            else:
                fitted = fit_projection(content, bits=k, seed=seed, **options)
            yield f"{kind} K={k}", by_bits(np.asarray(sign(fitted, jnp.asarray(content))))


def random_projection(width: int, *, bits: int, seed: int = 0) -> Params:
    """A Gaussian projection [E, K], which needs no data."""
    return {"projection": jax.random.normal(jax.random.key(seed), (width, bits)), "offset": jnp.zeros(bits)}


def by_bits(signature: np.ndarray):
    """Share of equal bits between rows of a table of signatures [N, W]."""
    bits = 32 * signature.shape[1]
    return lambda items, past: 1 - np.bitwise_count(signature[items][:, None] ^ signature[past]).sum(-1, dtype=np.int64) / bits


def by_angle(content: np.ndarray):
    """1 - angle / pi between rows of a table of unit length [N, E]."""
    return lambda items, past: 1 - np.arccos(np.clip(content[items] @ content[past].T, -1, 1)) / np.pi


def agreement(
    content: np.ndarray, histories: list[np.ndarray], similarity: Any, *, candidates: int, seed: int
) -> dict[str, float]:
    """The three figures of the protocol, means over users."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"top": [], "tier": [], "histogram": []}
    for past in histories:
        items = rng.choice(len(content), candidates, replace=False)
        ours, floats = similarity(items, past), by_angle(content)(items, past)
        found["top"].append(rank_correlation(highest(ours), highest(floats)))
        tiers = histogram(ours)
        found["tier"].append(rank_correlation(tiers @ np.arange(TIERS), histogram(floats) @ np.arange(TIERS)))
        found["histogram"].append(np.abs(tiers - histogram(floats)).sum(1).mean() / 2)
    return {name: float(np.mean(values)) for name, values in found.items()}


def highest(similarity: np.ndarray) -> np.ndarray:
    """Mean of the highest similarities of every candidate [C]."""
    count = min(HIGHEST, similarity.shape[1])
    return np.partition(similarity, -count, axis=1)[:, -count:].mean(1)


def histogram(similarity: np.ndarray) -> np.ndarray:
    """Share of the history in every tier [C, T]."""
    tier = np.minimum(np.floor(similarity * TIERS), TIERS - 1)
    return np.stack([(tier == t).mean(1) for t in range(TIERS)], 1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties given their mean rank; 0 where one side is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


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


if __name__ == "__main__":
    main(sys.argv[1:])
