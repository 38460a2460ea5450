"""Static configuration of a model: frozen, hashable, checked once.

Every block of AIF has its switch here, so that the paper's additive table (base, + sequence, + SIM, + BEA, + long
history) is a list of configs. Source: arXiv 2511.12934; where the paper's abstract gives no number the default is ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from aif_jax.data.schema import Attribute, Schema

Architecture = Literal["aif", "two_tower", "cold", "exact"]
MEMORY_KINDS = ("lsh", "learned")
KEY_FORMS = ("linear", "softmax")
SIMTIER_FORMS = ("off", "exact", "codes")
CODE_KINDS = ("signature", "cosine")
ARCHITECTURES = ("aif", "two_tower", "cold", "exact")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What `build` needs to know.

    Attributes:
      schema: the features.
      architecture: "aif", or a baseline in the same frame: "two_tower", "cold", "exact".
      width: D, the width of vectors, embeddings and attention.
      short_length: S, the recent behaviours that self- and cross-attention see.
      long_length: L, the behaviours that SIM, long memory and SimTier see.
      tower_hidden: hidden widths of the user and the item MLP.
      head_hidden: hidden widths of the head MLP; at least one.
      sequence: short-sequence block of the user (self-attention and profile-to-sequence cross-attention); off: mean pooling.
      item_content: content embedding in the item MLP (needs schema.content).
      bridges: M of Bridge Embedding Approximation; 0 switches it off.
      sim_fields: item fields with a SIM pre-cache; () switches it off.
      sim_slots: Q, cached values per field.
      sim_length: P, behaviours per cached value.
      memory: long-memory kinds: "lsh" (DIN on LSH signatures), "learned" (trained queries and keys), both, or ().
      memory_width: K of the learned memory.
      memory_keys: how a behaviour's learned key weighs: "linear" as it is, or "softmax" over the history for each of the K
        entries, which makes the learned memory K bridges over the long history.
      matching: the two-tower's dot product, and the item's with what BEA and the learned memory read, are added to the logit.
      simtier: "exact" (histogram over the whole long history), "codes" (bridge codes, independent of L) or "off".
      tiers: T, equal tiers of similarity in [0, 1].
      tiers_by_action: one histogram per behaviour type instead of one for all.
      tier_windows: one histogram per stretch of the history instead of one for all; ends in behaviours, counted from the most
        recent: (4, 32) counts the last 4, the 28 before them and the rest apart.
      signature_bits: K of the LSH signatures, a multiple of 32 up to 256.
      codes: R, bridge codes of simtier="codes".
      codes_per_item: J, nearest codes that a row carries.
      codes_by: how codes are compared: by "signature" (k-majority in Hamming space) or by "cosine" of the content (k-means; a
        behaviour counts by the code of its item, so an item that was not there at the fit is not counted).

    Raises:
      ValueError: names the field, what was expected and what came.
    """

    schema: Schema
    architecture: Architecture = "aif"
    width: int = 32
    short_length: int = 32
    long_length: int = 256
    tower_hidden: tuple[int, ...] = (64,)
    head_hidden: tuple[int, ...] = (64, 32)
    sequence: bool = True
    item_content: bool = True
    bridges: int = 10
    sim_fields: tuple[str, ...] = ("category",)
    sim_slots: int = 16
    sim_length: int = 8
    memory: tuple[str, ...] = ("lsh",)
    memory_width: int = 64
    memory_keys: Literal["linear", "softmax"] = "linear"
    matching: bool = False
    simtier: Literal["off", "exact", "codes"] = "exact"
    tiers: int = 8
    tiers_by_action: bool = False
    tier_windows: tuple[int, ...] = ()
    signature_bits: int = 64
    codes: int = 256
    codes_per_item: int = 1
    codes_by: Literal["signature", "cosine"] = "signature"

    def __post_init__(self):
        _expect(self.architecture in ARCHITECTURES, "architecture", f"one of {ARCHITECTURES}", self.architecture)
        for field in (
            "width",
            "short_length",
            "long_length",
            "sim_slots",
            "sim_length",
            "memory_width",
            "codes",
            "codes_per_item",
        ):
            _expect(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        _expect(self.bridges >= 0, "bridges", "0 (off) or more", self.bridges)
        _expect(len(self.head_hidden) >= 1, "head_hidden", "at least one hidden layer", self.head_hidden)
        _expect(2 <= self.tiers <= 64, "tiers", "2 to 64", self.tiers)
        ascending = all(a < b for a, b in zip((0, *self.tier_windows), self.tier_windows, strict=False))
        _expect(ascending, "tier_windows", "ascending numbers of behaviours, at least 1", self.tier_windows)
        for field in self.sim_fields:
            _expect(field in self.schema.behaviour_fields, "sim_fields", f"names among {self.schema.behaviour_fields}", field)
        for kind in self.memory:
            _expect(kind in MEMORY_KINDS, "memory", f"kinds among {MEMORY_KINDS}", kind)
        _expect(self.memory_keys in KEY_FORMS, "memory_keys", f"one of {KEY_FORMS}", self.memory_keys)
        _expect(self.simtier in SIMTIER_FORMS, "simtier", f"one of {SIMTIER_FORMS}", self.simtier)
        _expect(self.codes_by in CODE_KINDS, "codes_by", f"one of {CODE_KINDS}", self.codes_by)
        bits = self.signature_bits
        _expect(bits % 32 == 0 and 32 <= bits <= 256, "signature_bits", "a multiple of 32 from 32 to 256", bits)
        _expect(self.codes_per_item <= self.codes, "codes_per_item", f"at most codes={self.codes}", self.codes_per_item)
        if self.uses_signatures or self.uses_code_centres:
            _expect(
                self.schema.content > 0,
                "schema.content",
                "a content embedding for memory='lsh' and SimTier",
                self.schema.content,
            )

    def __repr__(self) -> str:
        """The fields that differ from their defaults: what a reader of a log looks for."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name != "schema" and getattr(self, field.name) != field.default
        ]
        return f"Config({', '.join([*changed, f'schema={self.schema!r}'])})"

    @property
    def uses_signatures(self) -> bool:
        """Whether any block compares LSH signatures; false for baselines, which have no such block."""
        compared = self.simtier == "exact" or self.simtier == "codes" and self.codes_by == "signature"
        return self.architecture == "aif" and ("lsh" in self.memory or compared)

    @property
    def uses_code_centres(self) -> bool:
        """Whether SimTier goes by codes that are compared by the cosine of their content."""
        return self.architecture == "aif" and self.simtier == "codes" and self.codes_by == "cosine"

    @property
    def signature_words(self) -> int:
        """W, uint32 words of a signature."""
        return self.signature_bits // 32

    @property
    def tier_groups(self) -> int:
        """G, histograms per candidate."""
        return (self.schema.actions if self.tiers_by_action else 1) * (len(self.tier_windows) + 1)

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `Config.from_json` reads it back."""
        return dataclasses.asdict(self) | {"schema": self.schema.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Config:
        """The config that `to_json` wrote. Unknown fields raise TypeError: the file is of a newer version."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**{**fields, "schema": Schema.from_json(value["schema"])})


def tiny(schema: Schema | None = None, **changes: Any) -> Config:
    """Every block switched on, at sizes for tests: compiles in a second or two."""
    sizes: dict[str, Any] = dict(
        width=8, short_length=6, long_length=24, tower_hidden=(16,), head_hidden=(16, 8), bridges=4, sim_slots=4,
        sim_length=3, memory=("lsh", "learned"), memory_width=8, tiers=4, signature_bits=32, codes=16,
    )  # fmt: skip
    return Config(schema=schema or demo_schema(), **{**sizes, **changes})


def paper(schema: Schema, **changes: Any) -> Config:
    """Sizes in the range that the paper's setting names: a history of thousands, about ten bridges."""
    sizes: dict[str, Any] = dict(
        width=64, short_length=64, long_length=4096, tower_hidden=(256, 128), head_hidden=(128, 64), bridges=10,
        sim_slots=32, sim_length=16, signature_bits=64,
    )  # fmt: skip
    return Config(schema=schema, **{**sizes, **changes})


def demo_schema() -> Schema:
    """A small schema with every kind of feature; tests and docs use it."""
    return Schema(
        item_attributes=(
            Attribute(name="item", size=50),
            Attribute(name="category", size=6),
            Attribute(name="tags", size=9, length=3),
        ),
        user_attributes=(Attribute(name="gender", size=3), Attribute(name="interests", size=7, length=2)),
        actions=4,
        user_floats=2,
        item_floats=1,
        content=12,
        side=("bid",),
    )


def _expect(ok: bool, field: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"Config.{field}: expected {expected}, got {got!r}")
