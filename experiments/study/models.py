"""The models of the study, as block lists over one set of sizes.

ADDITIVE is the paper's table built up block by block, "minus ..." the full model without one block, "sweep ..." the paper's
model with one size changed. All models of a data set share widths, features, candidates, optimizer and number of steps.
"preset" is `presets.aif`; the baselines are the presets of their names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import aif_jax as aif
from aif_jax.blocks import (
    Bea,
    Concatenation,
    CosineTiers,
    CrossAttention,
    DecayedMemory,
    DecayedSim,
    DotProduct,
    LinearMemory,
    LshDin,
    Sim,
    SimTier,
    TargetAttention,
)
from experiments.study.similarity import KernelSums, Prototypes

SIZES: dict[str, Any] = dict(width=32, short_length=32, long_length=128, towers=(64,), head=(64, 32))
SMOKE: dict[str, Any] = dict(width=8, short_length=8, long_length=32, towers=(16,), head=(16, 8))
BITS, TIERS = 128, 16
YEAR = 365.25 * 86400
SEVEN = (4, 8, 16, 32, 64, 128)  # ends of seven recency windows, each twice as long as the one before

EACH = "each"
"""As the field of `Sim`: a cache for every SIM field of the data set."""
FACTORS, SEQUENTIALLY = ", with factors", ", sequential"
"""After a model's name: with factors (`Run.with_svd`); user and items computed when candidates are there."""
BEA, SIM, LSH, DOT = Bea(bridges=10, dot_product=True), Sim(EACH), LshDin(bits=BITS), DotProduct()
LEARNED, SIM_TIER = LinearMemory(dot_product=True), SimTier(tiers=TIERS, bits=BITS)
WINDOWED = dataclasses.replace(SIM_TIER, length=512)
DECAYED, DECAYED_SIM = DecayedMemory(dot_product=True), DecayedSim(EACH)
PAPER = (BEA, LSH, SIM, SIM_TIER, DOT)
FULL = (BEA, LSH, LEARNED, SIM, SIM_TIER, DOT)


def names() -> list[str]:
    """Every model, in the order of the report."""
    return list(_MODELS)


def config(model: str, schema: aif.Schema, *, sim_fields: tuple[str, ...], smoke: bool = False, **changes: Any) -> aif.Config:
    """The config of a model on a data set.

    Args:
      model: one of `names()`.
      schema: of the data set.
      sim_fields: fields with a SIM cache where SIM is on.
      smoke: small sizes.
      changes: config fields, over everything.

    Raises:
      ValueError: no such model.
    """
    if model not in _MODELS:
        raise ValueError(f"model: expected one of {names()}, got {model!r}")
    fields = dict(_MODELS[model])
    if smoke:
        fields = {name: min(value, 64) if name.endswith("_length") else value for name, value in fields.items()}
    made: dict[str, Any] = SIZES | (SMOKE if smoke else {}) | fields | changes
    return aif.Config(schema=schema, blocks=_each(made.pop("blocks"), sim_fields), **made)


def family(model: str) -> str:
    """Whose tuned hyperparameters a model uses: those of its baseline, or those of the full model."""
    name = model.partition(", ")[0]
    return name if name in BASELINES else "aif"


def _each(blocks: tuple[Any, ...], sim_fields: tuple[str, ...]) -> tuple[Any, ...]:
    """The blocks with a `Sim` for every SIM field in place of `Sim(EACH)`."""
    made: list[Any] = []
    for block in blocks:
        each = isinstance(block, Sim | DecayedSim) and block.field == EACH
        made += [dataclasses.replace(block, field=field) for field in sim_fields] if each else [block]
    return tuple(made)


def _paper(**changes: Any) -> dict[str, Any]:
    """The paper's model with the blocks of some names replaced: `sim`, `bea`, `lsh`, `tiers`; other changes as they are."""
    parts = {"bea": BEA, "lsh": LSH, "sim": SIM, "tiers": SIM_TIER}
    blocks = {name: changes.pop(name, block) for name, block in parts.items()}
    return {"blocks": (*blocks.values(), DOT), **changes}


def _without(left_out: Any) -> dict[str, Any]:
    return {"blocks": tuple(block for block in FULL if block != left_out)}


BASELINES: dict[str, dict[str, Any]] = {
    "two_tower": dict(head=(), blocks=(DOT,)),
    "cold": dict(towers=None, blocks=(Concatenation(),)),
    "exact": dict(
        blocks=(CrossAttention(dot_product=True), TargetAttention(dot_product=True), SIM, CosineTiers(tiers=TIERS), DOT)
    ),
}
ADDITIVE: dict[str, dict[str, Any]] = {
    "base": dict(sequence=False, item_content=False, blocks=(DOT,)),
    "+ user and item blocks": dict(blocks=(DOT,)),
    "+ SIM": dict(blocks=(SIM, DOT)),
    "+ BEA": dict(blocks=(BEA, SIM, DOT)),
    "+ DIN on LSH": dict(blocks=(BEA, LSH, SIM, DOT)),
    "+ SimTier": dict(blocks=PAPER),
    "aif": dict(blocks=FULL),
}
"""The last row adds the learned long memory; the one before it is the paper's model."""
LONGER: dict[str, dict[str, Any]] = {
    "two_tower, S=128": BASELINES["two_tower"] | dict(short_length=128),
    "exact, L=512": BASELINES["exact"] | dict(long_length=512),
    "exact, L=2048": BASELINES["exact"] | dict(long_length=2048),
    "+ SimTier, L=512": dict(blocks=PAPER, long_length=512),
    "aif, L=512": dict(blocks=FULL, long_length=512),
    "preset": dict(blocks=(BEA, SIM, LEARNED, WINDOWED, DOT), long_length=512),
    "preset, L=2048": dict(blocks=(BEA, SIM, LEARNED, SIM_TIER, DOT), long_length=2048),
    "aif, L=512, seven recency windows": dict(
        blocks=(*FULL[:-2], SimTier(tiers=TIERS, bits=BITS, windows=SEVEN), DOT), long_length=512
    ),
}
"""Longer histories; a two-tower model has the short one alone. Recency windows in SimTier are ours, not the paper's.

"preset" is `presets.aif`: "aif, L=512" without DIN on LSH; with L=2048 its SimTier, too, reads all 2,048 events.
"""
LENGTHS: dict[str, dict[str, Any]] = {
    "preset, L=2048, SimTier of 512 events": dict(blocks=(BEA, SIM, LEARNED, WINDOWED, DOT), long_length=2048),
}
"""What of the preset gains from a longer history: with this, linear attention and SIM alone read 2,048 events."""
WINDOWS: dict[str, dict[str, Any]] = {
    "aif, L=512, two recency windows": dict(
        blocks=(*FULL[:-2], SimTier(tiers=TIERS, bits=BITS, windows=(32,)), DOT), long_length=512
    )
}
"""Two recency windows."""
AIF = ("aif", *(name for name in (*LONGER, *WINDOWS) if name.startswith("aif")))
"""The models with every block, and what else differs in them."""


def _streaming(*, sim: Any = DECAYED_SIM, memory: Any = DECAYED, **changes: Any) -> dict[str, Any]:
    return dict(blocks=(BEA, sim, memory, WINDOWED, DOT), long_length=512) | changes


STREAMING: dict[str, dict[str, Any]] = {"streaming": _streaming()}
"""Memory and SIM that every event updates: `presets.streaming`, trained on the last 512 events of a history."""
HALF_LIVES: dict[str, dict[str, Any]] = {
    "streaming, fixed half-lives": _streaming(memory=dataclasses.replace(DECAYED, learned=False)),
    "streaming, K=16": _streaming(memory=dataclasses.replace(DECAYED, width=16)),
}
"""The same with half-lives that are not learned, or with fewer of them than 64."""
RESTING: dict[str, dict[str, Any]] = {
    "window, Q=128 P=2": dict(blocks=(BEA, Sim(EACH, slots=128, length=2), LEARNED, WINDOWED, DOT), long_length=512),
    "streaming, Q=128 P=2, L=2048": _streaming(sim=DecayedSim(EACH, slots=128, length=2, half_life=2 * YEAR), long_length=2048),
}
"""For users with a hundred interests, most of which rest: "preset" and "streaming" with more and smaller SIM slots."""
_WINDOW = dataclasses.replace(SIM_TIER, length=128)
SIMILARITY: dict[str, dict[str, Any]] = {
    f"preset, {name}": dict(blocks=(BEA, SIM, LEARNED, *blocks, DOT), long_length=512)
    for name, blocks in {
        "no SimTier": (),
        "cosine tiers": (CosineTiers(tiers=TIERS),),
        "kernel sums": (KernelSums(),),
        "kernel sums, learned temperatures": (KernelSums(learned=True),),
        "64 prototypes": (Prototypes(learned=True),),
        "128 prototypes": (Prototypes(learned=True, count=128),),
        "SimTier of 128 events": (_WINDOW,),
        "SimTier of 128 events, 64 prototypes": (_WINDOW, Prototypes(learned=True)),
    }.items()
}
"""The preset with other forms of content similarity in place of SimTier over 512 events."""
LEAVE_ONE_OUT: dict[str, dict[str, Any]] = {
    "minus sequence": dict(blocks=FULL, sequence=False),
    "minus SIM": _without(SIM),
    "minus BEA": _without(BEA),
    "minus DIN on LSH": _without(LSH),
    "minus SimTier": _without(SIM_TIER),
    "minus content": dict(blocks=FULL, item_content=False),
    "minus matching": dict(blocks=(Bea(bridges=10), LSH, LinearMemory(), SIM, SIM_TIER)),
    "minus softmax keys": dict(blocks=(BEA, LSH, LinearMemory(keys="linear", dot_product=True), SIM, SIM_TIER, DOT)),
}
MEMORIES: dict[str, dict[str, Any]] = {"learned, not LSH": dict(blocks=(BEA, LEARNED, SIM, DOT))}
"""Long memories at equal cost in real time, no SimTier; "+ BEA" has none, "+ DIN on LSH" the other, "minus SimTier" both."""
SIGNATURES: dict[str, dict[str, Any]] = {
    f"+ SimTier, K={k}": _paper(lsh=LshDin(bits=k), tiers=SimTier(tiers=TIERS, bits=k)) for k in (32, 64, 256)
}
"""The paper's model with other signatures; "+ SimTier" itself has K=128."""
SWEEPS: dict[str, dict[str, Any]] = {
    **{f"sweep M={m}": _paper(bea=Bea(bridges=m, dot_product=True)) for m in (1, 4, 32)},
    **{f"sweep Q={q} P={p}": _paper(sim=Sim(EACH, slots=q, length=p)) for q, p in ((4, 8), (16, 2), (64, 8), (16, 32))},
    **{f"sweep L={length}": _paper(long_length=length) for length in (16, 32, 64, 256)},
    **{
        f"sweep L=512, {name} recency windows": _paper(tiers=SimTier(tiers=TIERS, bits=BITS, windows=windows), long_length=512)
        for name, windows in (("two", (32,)), ("seven", SEVEN))
    },
}
"""The paper's model with one size changed; its K is in SIGNATURES, its L=512 in LONGER."""
SWEPT: dict[str, dict[str, str]] = {
    "bridges M": {"1": "sweep M=1", "4": "sweep M=4", "10": "+ SimTier", "32": "sweep M=32"},
    "signature bits K": {str(k): "+ SimTier" if k == 128 else f"+ SimTier, K={k}" for k in (32, 64, 128, 256)},
    "SIM: values Q x events P": {
        "4x8": "sweep Q=4 P=8",
        "16x2": "sweep Q=16 P=2",
        "16x8": "+ SimTier",
        "64x8": "sweep Q=64 P=8",
        "16x32": "sweep Q=16 P=32",
    },
    "long history L": {
        **{str(length): f"sweep L={length}" for length in (16, 32, 64)},
        "128": "+ SimTier",
        "256": "sweep L=256",
        "512": "+ SimTier, L=512",
    },
}
"""Size to its values to their models: what SWEEPS, SIGNATURES and the paper's model are points of."""
_MODELS = (
    BASELINES
    | ADDITIVE
    | LONGER
    | LENGTHS
    | WINDOWS
    | STREAMING
    | HALF_LIVES
    | RESTING
    | SIMILARITY
    | LEAVE_ONE_OUT
    | MEMORIES
    | SIGNATURES
    | SWEEPS
)
