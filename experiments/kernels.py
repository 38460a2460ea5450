"""What a long history costs in real time: every form of DIN, SimTier and the whole interaction.

Claim     On two CPU cores at C=1,000 candidates, L=4,096 behaviours, K=64 bits: DIN in its linear form under 0.3 ms, the exact
          SimTier under 2.5 ms, the interaction without SimTier under twice its head and the same at any L.
Command   python -m experiments.kernels --json kernels.json      (--smoke: seconds; --help lists all)
Time      3 minutes with --rounds 15 (--candidates, --lengths choose other sizes)
Models    "interaction_exact" has BEA, SIM, linear attention and SimTier on signatures of K bits, "interaction" the same without
          SimTier, "head_only" the head's MLP on ready inputs; it does not see L, so its spread over L is the noise of the
          clock. Weights are as initialised.
Protocol  Every form is compiled and its result checked before the clock starts; inputs are on the device, `block_until_ready`
          ends the clock, a figure is the median. What does not grow with L is timed in one round-robin over all lengths, so
          that a drift of the machine hits all alike; what grows is interleaved length by length. Forms that hold a [C, L]
          array are left out where that has more than 7e7 entries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax.blocks import linear_memory
from aif_jax.blocks.signatures import signs
from aif_jax.blocks.simtier import TierHistory, histogram
from aif_jax.output import track
from experiments import common, drawn

WIDTH, TIERS, CONTENT, BITS = 32, 8, 32, 64
LARGEST = 7e7
BLOCKS = (
    aif.blocks.Bea(dot_product=True), aif.blocks.Sim("category"), aif.blocks.LinearMemory(dot_product=True),
    aif.blocks.SimTier(tiers=16, bits=BITS, length=512), aif.blocks.DotProduct(),
)  # fmt: skip
"""The approximations of a long history next to each other; no matching statistics."""
Form = partial[Any]
"""A compiled form with its inputs on the device."""


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measure every form at every size and print the tables."""
    settings = {
        "rounds": (30, 2, "how often each form is timed"),
        "candidates": ([1000, 10_000], [40], "C"),
        "lengths": ([256, 1024, 4096, 16_384, 65_536], [64], "L"),
    }
    options = common.options(__doc__, arguments, settings)
    candidates, lengths = options.candidates, options.lengths

    figures: dict[str, Any] = {}
    bar = track(total=len(candidates) * (len(lengths) + 1), label="sizes", unit="sizes")
    for c in candidates:
        every = {(name, n): form for n in lengths for name, form in fixed_forms(c, n).items()}
        times = common.medians({f"{name}_ms {n}": form for (name, n), form in every.items()}, options.rounds)
        bar.update()
        for n in lengths:
            few = max(2, options.rounds // 3 if c * n > 2e6 else options.rounds)
            times |= common.medians({f"{name}_ms {n}": form for name, form in forms(c, n).items()}, few)
            bar.update()
        for key, milliseconds in times.items():
            name, n = key.split()
            figures.setdefault(name, {})[f"{c},{n}"] = milliseconds
        for name in ("interaction", "head_only"):
            ms = [figures[f"{name}_ms"][f"{c},{n}"] for n in lengths]
            figures.setdefault(f"{name}_longest_over_shortest", {})[str(c)] = ms[-1] / ms[0]
            figures.setdefault(f"{name}_spread_over_lengths", {})[str(c)] = max(ms) / min(ms)
    bar.close()
    common.report(figures, options.json)


def history(candidates: int, length: int) -> tuple[jax.Array, ...]:
    """Return signatures of items and behaviours, values, mask and a kernel, drawn at random."""
    rng = np.random.default_rng(0)
    item, past = (jnp.asarray(rng.integers(0, 2**32, (n, BITS // 32), dtype=np.uint32)) for n in (candidates, length))
    values = jnp.asarray(rng.normal(size=(length, WIDTH)), jnp.float32)
    mask, kernel = rng.random(length) < 0.9, rng.normal(size=(WIDTH, 64)).astype(np.float32)
    return item, past, values, jnp.asarray(mask), jnp.asarray(kernel)


def forms(candidates: int, length: int) -> dict[str, Form]:
    """Return forms of the package that compare every pair, compiled and checked against each other."""
    item, past, values, mask, kernel = history(candidates, length)
    tiers = TierHistory(signature=past, group=jnp.zeros(length, jnp.int32), mask=mask)
    made: dict[str, Form] = {
        "simtier": compiled(partial(histogram, tiers=TIERS), item, tiers),
        "interaction_exact": whole(candidates, length, BLOCKS)[0],
    }
    if candidates * length <= LARGEST:
        made["din_direct"] = compiled(weighted, item, past, values, mask, kernel)
        summed = linear_memory.sum_events(signs(past).T, values, mask)
        np.testing.assert_allclose(linear(summed, item, kernel), made["din_direct"](), rtol=1e-3, atol=1e-3)
    return made


def weighted(item: jax.Array, past: jax.Array, values: jax.Array, mask: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return DIN on LSH by comparing every pair, [C, H]."""
    differing = jax.lax.population_count(item[:, None, :] ^ past[None, :, :]).sum(-1)
    weights = jnp.where(mask[None, :], BITS - 2.0 * differing, 0.0) / (BITS**0.5 * jnp.maximum(mask.sum(), 1))
    return weights @ values @ kernel


def linear(history: linear_memory.Summed, item: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the same from the sums of a history."""
    return signs(item) @ (history.moments @ kernel * linear_memory.scale(history))


def fixed_forms(candidates: int, length: int) -> dict[str, Form]:
    """Return forms whose inputs have the same shapes at any L: linear DIN, the interaction without SimTier, its head alone."""
    item, past, values, mask, kernel = history(candidates, length)
    summed = linear_memory.sum_events(signs(past).T, values, mask)
    made: dict[str, Form] = {"din_linear": compiled(linear, summed, item, kernel)}
    flat = tuple(block for block in BLOCKS if not isinstance(block, aif.blocks.SimTier))
    made["interaction"], config = whole(candidates, length, flat)
    head, ready = drawn.head_alone(config, candidates)
    made["head_only"] = compiled(head, made["interaction"].args[0]["head"], ready)
    return made


def whole(candidates: int, length: int, blocks: tuple[Any, ...]) -> tuple[Form, aif.Config]:
    """Return the interaction of a model with these blocks, and one user's state after `length` behaviours."""
    config = aif.presets.aif(schema(), long_length=length, blocks=blocks)
    model = aif.build(config)
    params = jax.jit(lambda key: model.init(key, drawn.catalogue(schema())))(jax.random.key(0))
    user = drawn.users(schema(), config.history_length, events=int(0.9 * length))
    state = jax.jit(model.user)(params, user)
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(params, drawn.items(schema(), (candidates,)))
    return compiled(model.interaction, params, state, rows), config


def schema() -> aif.Schema:
    """Return a catalogue of items with a category and content."""
    attributes = (aif.Attribute(name="item", size=10_000), aif.Attribute(name="category", size=64))
    return aif.Schema(item_attributes=attributes, content=CONTENT)


def compiled(f: Callable, *inputs: Any) -> Form:
    """Return the compiled form with its inputs on the device, run once."""
    made = partial(jax.jit(f), *jax.device_put(inputs))
    jax.block_until_ready(made())
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
