"""Promise: an exported folder scores as the joint model, for every preset, block and addition after training, at any length."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks, export, presets
from aif_jax import scores as aif_scores
from aif_jax.blocks import Block
from aif_jax.train.edits import platt, svd_factors
from tests import demo, lanes, light
from tests.reliability.sizes import FULL, fully, generator

LONG = 64  # the least length of a history that an export has as a symbol in every preset
ADDITIONS = ("factors", "offset", "unseen", "calibration")


class Case(NamedTuple):
    """A model to export."""

    preset: str | None  # None is a config of `blocks`, at its default length
    length: int | None = None  # None is the preset's default
    additions: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()

    def config(self) -> aif.Config:
        sizes: dict[str, Any] = {"width": 8, "towers": (8,), "head": aif.heads.Mlp((8,))}
        if self.length is not None:
            sizes |= {"long_length": self.length}
        if self.preset is None:
            return aif.Config(schema=demo.schema(), blocks=self.blocks, **sizes)
        if self.preset == "two_tower":  # no head, and no history but the short one
            sizes = {"width": 8, "towers": (8,)} | ({} if self.length is None else {"short_length": self.length})
        return presets.PRESETS[self.preset](demo.schema(), **sizes)

    def made(self, seed: int = 0) -> tuple[aif.PreRanker, Any]:
        """The model and its parameters, with the additions."""
        config, rng = self.config(), np.random.default_rng(seed)
        params = demo.init(aif.build(config), seed)
        if "unseen" in self.additions:
            table, seen = params["embedding"]["item"], rng.random(demo.ITEMS) < 0.5
            params |= {"embedding": params["embedding"] | {"item": jnp.where(seen[:, None], table, table[:1])}}
        if "factors" in self.additions:
            user, item = np.repeat(np.arange(30), 8), rng.integers(0, demo.ITEMS, 240)
            table = svd_factors(user, item, size=config.schema.table_sizes["item"])
            params, config = blocks.with_table(params, table, blocks.PureSvd(width=table.shape[1]), config=config)
        if "offset" in self.additions:
            table = blocks.popularity_offset(rng.integers(0, 9, demo.ITEMS))
            params, config = blocks.with_table(params, table, blocks.ItemOffset(), config=config)
        if "calibration" in self.additions:
            scores = rng.normal(size=400)
            scale, bias = platt(scores, rng.random(400) < 1 / (1 + np.exp(-scores)))
            params = aif_scores.with_calibration(params, {"scale": scale, "bias": bias})
        return aif.build(config), params


TIERS = blocks.SimTier(tiers=4, bits=32)
CASES = {
    "aif": Case("aif", None, ("factors", "calibration")),
    "aif, other additions": Case("aif", None, ("offset", "unseen", "calibration")),
    "paper": Case("paper", None, ("factors", "offset")),
    "two_tower": Case("two_tower", None, ("unseen", "factors", "offset", "calibration")),
    "two_tower_matching": Case("two_tower_matching", None, ("factors", "calibration")),
    "full_attention": Case("full_attention", None, ("factors", "unseen")),
    "in no preset": Case(None, None, (), (TIERS, blocks.PureSvd(), blocks.ItemOffset(), blocks.PositionBias())),
    "below 64": Case("aif", 40, ("factors",)),
    "above 64": Case("two_tower_matching", 65, ADDITIONS[:-1]),
    "beyond the factors' length": Case("two_tower_matching", 700, ("factors",)),
}


def expect_equal(folder: Any, case: Case, seed: int = 0) -> None:
    """Exports a model, loads it without the package's model code, and compares with `joint`."""
    model, params = case.made(seed)
    export.save(folder, aif.Trained(model, params), platforms=("cpu",))
    loaded = export.load(folder)
    places, items = model.config.history_length, demo.items(50, seed=seed)
    user = demo.user(model.config, events=places * 2 // 3, seed=seed)
    short = min(places, model.config.short_length + 1)
    joint = jax.jit(model.joint).lower(params, user, items).compile(light.options())
    for history in (user.history, demo.history(short, short // 2, seed=seed), demo.history(places, 0)):
        logits = loaded.interaction(loaded.user(dataclasses.replace(user, history=history)), loaded.item(items))
        expected = joint(params, dataclasses.replace(user, history=demo.pad(history, places)), items)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        if "calibration" in params["fitted"]:
            wanted = jax.nn.sigmoid(aif_scores.calibrated(params, expected))
            np.testing.assert_allclose(loaded.probabilities(logits), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", lanes.but_for(("aif", "two_tower"), CASES))
def test_exported_equals_joint(tmp_path, name):
    expect_equal(tmp_path / "model", CASES[name])


def test_every_preset_block_and_addition_is_exported():
    """At the default length; a new one fails here until it is among the cases."""
    default = [case for case in CASES.values() if case.length is None]
    assert {case.preset for case in default} == {None, *presets.PRESETS}
    configs = [(case, case.made()[0].config) for case in CASES.values()]
    met = {dataclasses.replace(part) for case, config in configs if case in default for part in config.blocks}
    every = {getattr(blocks, name) for name in blocks.__all__ if isinstance(getattr(blocks, name), type)}
    assert {type(part) for part in met} == {cls for cls in every if issubclass(cls, Block) and cls is not Block}
    long = [case.additions for case, config in configs if config.history_length >= LONG]
    assert {addition for additions in long for addition in additions} == set(ADDITIONS)


@fully
def test_exports_at_random(tmp_path):
    rng = generator("exports")
    for number in range(FULL.exports):
        preset = str(rng.choice(list(presets.PRESETS)))
        length = int(rng.choice([1, 31, 32, 33, 63, 64, 65, 100, 256, 511, 513, 1024]))
        chosen = rng.random(len(ADDITIONS)) < 0.5
        case = Case(preset, length, tuple(name for name, take in zip(ADDITIONS, chosen, strict=True) if take))
        print(number, case)
        expect_equal(tmp_path / str(number), case, seed=number)
