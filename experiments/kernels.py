"""What a long history costs in real time: linear DIN, SimTier and the whole interaction.

Claim     On two CPU cores at C=1,000 candidates, L=4,096 behaviours, K=64 bits: DIN in its linear form under 0.3 ms, the exact
          SimTier under 2.5 ms, the interaction without SimTier under twice its head and the same at any L.
Command   python -m experiments.kernels --json kernels.json      (--smoke: seconds; --help lists all)
Time      3 minutes with --rounds 15 (--candidates, --lengths choose other sizes)
Models    "interaction_exact" has BEA, SIM, linear attention and SimTier on signatures of K bits, "interaction" the same without
          SimTier, "head_only" the head's MLP on ready inputs, whose spread over L is the noise of the clock
Protocol  Inputs are on the device; medians. What does not grow with L is timed in one round-robin over all lengths, so that a
          drift of the machine hits all alike; what grows is interleaved length by length.
"""

from __future__ import annotations

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

WIDTH, TIERS, BITS = 32, 8, 64
SCHEMA = aif.Schema(
    item_attributes=(aif.Attribute(name="item", size=10_000), aif.Attribute(name="category", size=64)), content=32
)
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
    lengths, figures = options.lengths, dict[str, Any]()
    for c in track(options.candidates, label="candidates", unit="sizes"):
        every = {f"{name}_ms {n}": form for n in lengths for name, form in fixed_forms(c, n).items()}
        times = common.medians(every, options.rounds)
        for n in lengths:
            few = max(2, options.rounds // 3 if c * n > 2e6 else options.rounds)
            times |= common.medians({f"{name}_ms {n}": form for name, form in growing_forms(c, n).items()}, few)
        for key, milliseconds in times.items():
            name, n = key.split()
            figures.setdefault(name, {})[f"{c},{n}"] = milliseconds
        for name in ("interaction", "head_only"):
            ms = [figures[f"{name}_ms"][f"{c},{n}"] for n in lengths]
            figures.setdefault(f"{name}_longest_over_shortest", {})[str(c)] = ms[-1] / ms[0]
            figures.setdefault(f"{name}_spread_over_lengths", {})[str(c)] = max(ms) / min(ms)
    common.report(figures, options.json)


def growing_forms(candidates: int, length: int) -> dict[str, Form]:
    """Return forms that compare every candidate with every behaviour."""
    item, past = signatures(candidates), signatures(length)
    tiers = TierHistory(signature=past, mask=jnp.arange(length) % 10 > 0)
    simtier = compiled(partial(histogram, tiers=TIERS), item, tiers)
    return {"simtier": simtier, "interaction_exact": interaction(candidates, length, BLOCKS)[0]}


def fixed_forms(candidates: int, length: int) -> dict[str, Form]:
    """Return forms whose inputs have the same shapes at any L: linear DIN, the interaction without SimTier, its head alone."""
    rng = np.random.default_rng(0)
    values, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((length, WIDTH), (WIDTH, 64)))
    summed = linear_memory.sum_events(signs(signatures(length)).T, values, jnp.arange(length) % 10 > 0)
    flat = tuple(block for block in BLOCKS if not isinstance(block, aif.blocks.SimTier))
    whole, config = interaction(candidates, length, flat)
    head, ready = drawn.head_alone(config, candidates)

    def linear(history: linear_memory.Summed, words: jax.Array, kernel: jax.Array) -> jax.Array:
        return signs(words) @ (history.moments @ kernel * linear_memory.scale(history))

    return {
        "din_linear": compiled(linear, summed, signatures(candidates), kernel),
        "interaction": whole,
        "head_only": compiled(head, whole.args[0]["head"], ready),
    }


def signatures(count: int) -> jax.Array:
    """Return signatures drawn at random, uint32 [n, K / 32]."""
    return jnp.asarray(np.random.default_rng(count).integers(0, 2**32, (count, BITS // 32), dtype=np.uint32))


def interaction(candidates: int, length: int, blocks: tuple[Any, ...]) -> tuple[Form, aif.Config]:
    """Return the interaction of a model with these blocks, and one user's state after `length` behaviours."""
    config = aif.presets.aif(SCHEMA, long_length=length, blocks=blocks)
    model = aif.build(config)
    params = jax.jit(lambda key: model.init(key, drawn.catalogue(SCHEMA)))(jax.random.key(0))
    state = jax.jit(model.user)(params, drawn.users(SCHEMA, config.history_length, events=int(0.9 * length)))
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(params, drawn.items(SCHEMA, (candidates,)))
    return compiled(model.interaction, params, state, rows), config


def compiled(f: Callable, *inputs: Any) -> Form:
    """Return the compiled form with its inputs on the device, run once."""
    made = partial(jax.jit(f), *jax.device_put(inputs))
    jax.block_until_ready(made())
    return made


if __name__ == "__main__":
    main()
