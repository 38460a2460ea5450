"""The arms: what every model of the study is, as changes to one base config.

ADDITIVE is the paper's table built up block by block, "minus ..." the full model without one block, "sweep ..." the paper's
model with one size changed. All arms of a data set share widths, features, candidates, optimizer and number of steps.
"""

from __future__ import annotations

from typing import Any

import aif_jax as aif
from aif_jax.data.schema import Schema

OFF: dict[str, Any] = dict(bridges=0, sim_fields=(), memory=(), simtier="off")
SIZES: dict[str, Any] = dict(
    width=32,
    short_length=32,
    long_length=128,
    tower_hidden=(64,),
    head_hidden=(64, 32),
    matching=True,
    memory_keys="softmax",
    signature_bits=128,
    tiers=16,
)
SMOKE: dict[str, Any] = dict(width=8, short_length=8, long_length=32, head_hidden=(16, 8), tower_hidden=(16,))
MEMORY = ("lsh", "learned")
OCTAVES = (4, 8, 16, 32, 64, 128)


def names() -> list[str]:
    """Every arm, in the order of the report."""
    return [*BASELINES, *ADDITIVE, *LONGER, *WINDOWS, *LEAVE_ONE_OUT, *MEMORIES, *SIGNATURES, *SWEEPS]


def config(arm: str, schema: Schema, *, sim_fields: tuple[str, ...], smoke: bool = False, **changes: Any) -> aif.Config:
    """The config of an arm on a data set.

    Args:
      arm: one of `names()`.
      schema: of the data set.
      sim_fields: fields with a SIM cache where SIM is on.
      smoke: small sizes.
      changes: config fields, over everything.

    Raises:
      ValueError: no such arm.
    """
    if arm not in _ARMS:
        raise ValueError(f"arm: expected one of {names()}, got {arm!r}")
    full: dict[str, Any] = SIZES | dict(sim_fields=sim_fields, memory=MEMORY) | (SMOKE if smoke else {})
    own = dict(_ARMS[arm])
    if "sim_fields" in own and own["sim_fields"] == "all":
        own["sim_fields"] = sim_fields
    if smoke:
        own = {name: min(value, 64) if name.endswith("_length") else value for name, value in own.items()}
    return aif.Config(schema=schema, **(full | own | changes))


def family(arm: str) -> str:
    """Whose tuned hyperparameters an arm uses: its own baseline's, or those of the full model."""
    own = arm.partition(", ")[0]
    return own if own in BASELINES else "aif"


BASELINES: dict[str, dict[str, Any]] = {
    "two_tower": dict(architecture="two_tower"),
    "cold": dict(architecture="cold"),
    "exact": dict(architecture="exact"),
}
_BASE = OFF | dict(sequence=False, item_content=False)
_TOWERS = OFF
_SIM = OFF | dict(sim_fields="all")
_BEA = _SIM | dict(bridges=10)
_LSH = _BEA | dict(memory=("lsh",))
_TIERS = _LSH | dict(simtier="exact")
ADDITIVE: dict[str, dict[str, Any]] = {
    "base": _BASE,
    "+ user and item blocks": _TOWERS,
    "+ SIM": _SIM,
    "+ BEA": _BEA,
    "+ DIN on LSH": _LSH,
    "+ SimTier": _TIERS,
    "aif": {},
}
"""The last row adds the learned long memory; the one before it is the paper's model."""
LONGER: dict[str, dict[str, Any]] = {
    "two_tower, S=128": dict(architecture="two_tower", short_length=128),
    "exact, L=512": dict(architecture="exact", long_length=512),
    "+ SimTier, L=512": _TIERS | dict(long_length=512),
    "aif, L=512": dict(long_length=512),
    "aif, L=512, tiers by octaves": dict(long_length=512, tier_windows=OCTAVES),
}
"""The arms with longer histories; a two-tower model has the short one alone. The last one has an addition that is ours."""
WINDOWS: dict[str, dict[str, Any]] = {"aif, L=512, tiers by recency": dict(long_length=512, tier_windows=(32,))}
"""Two histograms where octaves have seven."""
AIF = ("aif", *(name for name in (*LONGER, *WINDOWS) if name.startswith("aif")))
"""The arms with every block on, and what else is not as usual in them."""
LEAVE_ONE_OUT: dict[str, dict[str, Any]] = {
    "minus sequence": dict(sequence=False),
    "minus SIM": dict(sim_fields=()),
    "minus BEA": dict(bridges=0),
    "minus DIN on LSH": dict(memory=("learned",)),
    "minus SimTier": dict(simtier="off"),
    "minus content": dict(item_content=False),
    "minus matching": dict(matching=False),
    "minus softmax keys": dict(memory_keys="linear"),
}
MEMORIES: dict[str, dict[str, Any]] = {"learned, not LSH": dict(memory=("learned",), simtier="off")}
"""Long memories at equal cost in real time, no SimTier; "+ BEA" has none, "+ DIN on LSH" the other, "minus SimTier" both."""
SIGNATURES: dict[str, dict[str, Any]] = {f"+ SimTier, K={k}": _TIERS | dict(signature_bits=k) for k in (32, 64, 256)}
"""The paper's model with other signatures; "+ SimTier" itself has K=128."""
SWEEPS: dict[str, dict[str, Any]] = {
    **{f"sweep M={m}": _TIERS | dict(bridges=m) for m in (1, 4, 32)},
    **{f"sweep Q={q} P={p}": _TIERS | dict(sim_slots=q, sim_length=p) for q, p in ((4, 8), (16, 2), (64, 8), (16, 32))},
    **{f"sweep L={length}": _TIERS | dict(long_length=length) for length in (16, 32, 64, 256)},
    "sweep L=512, tiers by recency": _TIERS | dict(long_length=512, tier_windows=(32,)),
    "sweep L=512, tiers by octaves": _TIERS | dict(long_length=512, tier_windows=OCTAVES),
}
"""The paper's model with one size changed; its K stands under SIGNATURES, its L=512 under LONGER."""
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
"""Size to its values to their arms: what SWEEPS, SIGNATURES and the paper's model are points of."""
_ARMS = BASELINES | ADDITIVE | LONGER | WINDOWS | LEAVE_ONE_OUT | MEMORIES | SIGNATURES | SWEEPS
