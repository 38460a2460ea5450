"""Settings and arguments that are refused as soon as they are given: each call, and what its error must say.

A refusal that needs a file, a model or a run stands next to the tests of what it protects.
"""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks, metrics, train
from aif_jax.blocks.signatures import fit_projection
from aif_jax.catalogue import Catalogue
from aif_jax.data.negatives import NegativeSampler
from aif_jax.data.order import BatchKey
from aif_jax.data.split import sample_positions, split_by_time, time_cuts
from aif_jax.encoding.columns import Columns
from aif_jax.heads import LogitSum, Mlp
from aif_jax.refreshing import GateConfig
from aif_jax.registry import BLOCKS, HEADS
from aif_jax.service.current import ExportEntry, parse_current, publish
from aif_jax.service.process import Listening, source_of
from aif_jax.serving import Request, ServingConfig
from aif_jax.train import losses
from aif_jax.train.edits import platt, svd_factors
from tests import demo

ITEM, CATEGORY = aif.Attribute(name="item", size=10), aif.Attribute(name="category", size=4)
TAGS = aif.Attribute(name="tags", size=5, length=3)
BARE = aif.Schema(item_attributes=(aif.Attribute(name="item", size=5), aif.Attribute(name="category", size=3)))
FOUR = aif.Schema(item_attributes=(aif.Attribute(name="item", size=4), aif.Attribute(name="category", size=3)))
BITS = "signature bits: expected a multiple of 32 from 32 to 256"
TEN_DAYS = int(np.datetime64("2022-05-01", "s").astype(int)) + 86_400 * np.arange(10)
LOG = aif.EventLog([1] * 7, [1] * 7, [1] * 7, range(7), users=3)
SAMPLER, KEY = NegativeSampler([0, 1, 1]), BatchKey(0, 0, 0)
TWO = [[1.0, 2.0], [3.0, 4.0]], [[0, 1], [1, 0]]
LONG = "x" * 1025


def schema(**changes):
    return aif.Schema(**{"item_attributes": (ITEM, CATEGORY, TAGS)} | changes)


def record(**changes):
    return aif.Config.from_json(demo.config().to_json() | changes)


def log(*columns, users=3):
    return aif.EventLog(*columns, users=users)


def each(call, owner, expected, **values):
    """Refusals by one argument alone, for each of its wrong values: "OWNER.ARGUMENT: expected EXPECTED, got VALUE"."""
    return [
        (lambda wrong={name: value}: call(**wrong), f"{owner}.{name}: expected {expected}, got {value!r}")
        for name, wrong_ones in values.items() for value in wrong_ones
    ]  # fmt: skip


def calibrated(scores=(0.0, 1.0, 0.5, 2.0), labels=(0, 1, 1, 0), **options):
    return platt(list(scores), list(labels), **options)


REFUSED = [  # call, error (ValueError where none is named), message: "..." stands for any text
    # schema and catalogue
    (lambda: aif.Attribute(name="", size=3), "Attribute.name...non-empty"),
    (lambda: aif.Attribute(name="a/b", size=3), "Attribute.name...a/b"),
    (lambda: aif.Attribute(size=1, name="x"), "'x'.size: expected at least 2...got 1"),
    (lambda: aif.Attribute(length=0, name="x", size=3), "'x'.length: expected at least 1, got 0"),
    (lambda: schema(item_attributes=(CATEGORY,)), "single-valued 'item'"),
    (lambda: schema(item_attributes=(ITEM, aif.Attribute(name="category", size=4, length=2))), "single-valued 'category'"),
    (lambda: schema(item_attributes=(ITEM, CATEGORY, ITEM)), "names that differ"),
    (lambda: schema(user_attributes=(ITEM,)), "names that differ"),
    (lambda: schema(behaviour_fields=("item",)), "behaviour_fields: expected 'category'"),
    (lambda: schema(behaviour_fields=("item", "category", "tags")), "behaviour_fields...got 'tags'"),
    (lambda: schema(behaviour_fields=("item", "category", "shop")), "behaviour_fields...got 'shop'"),
    *each(schema, "Schema", "at least 2...", actions=[1]),
    *each(schema, "Schema", "...", user_floats=[-1], item_floats=[-2], content=[-3]),
    (lambda: aif.Schema.from_json({**demo.schema().to_json(), "colour": 1}), TypeError, "colour"),
    (lambda: Catalogue.from_items(FOUR, [1, 2], ids={"category": [1.5, 2]}),
     TypeError, "ids['category']: expected integers, got dtype float64"),
    (lambda: Catalogue.from_items(FOUR, [1, 2], ids={"category": [2**32 + 1, 2]}),
     "ids['category']: expected values in [0, 2147483648), got 4294967297"),
    (lambda: Catalogue.from_items(FOUR, [1, 2], ids={"category": [1, 2, 1]}),
     "ids['category']: expected 2 rows like raw, got shape [3]"),
    (lambda: Catalogue.from_items(FOUR, [1.5, 2.5], ids={"category": [1, 2]}), "Catalogue.raw: expected integers or strings"),
    (lambda: Catalogue.from_items(FOUR, [1, 2, 3, 4], ids={"category": [1, 2, 1, 1]}),
     "Catalogue.ids['item']: expected values in [0, 4), got 4"),
    (lambda: demo.catalogue().features([50]), "rows: expected values in [0, 50), got 50 at position [0]"),
    (lambda: demo.catalogue().features([0, -1]), "got -1 at position [1]"),
    (lambda: demo.catalogue().features([1.0]), TypeError, "rows: expected integers, got dtype float64"),
    (lambda: demo.catalogue().features([True]), TypeError, "rows: expected integers, got dtype bool"),
    # item statistics
    (lambda: schema(item_floats=3, item_statistics=(3600,)),
     "Schema.item_floats: expected at least 4, for item_statistics, got 3"),
    (lambda: schema(actions=3, item_floats=9, item_statistics=(3600,), statistic_actions=("shown",)),
     "Schema.statistic_actions: expected none or 2 names, for actions, got ('shown',)"),
    (lambda: Columns(action="what", item_statistics=(3600,)),
     "Columns.item_statistics: expected Columns.actions, the values of 'what', which are"),
    (lambda: Columns(history_actions=("click",)), "Columns.history_actions: expected a column for them in Columns.action"),
    (lambda: Columns(action="a", actions=(1, 2), history_actions=(3,)), "expected actions among Columns.actions (1, 2)"),
    (lambda: Columns(action="a", actions=(1, "b", "1")), "Columns.actions: expected each action once, got (1, 'b', '1')"),
    # config
    *((lambda kind=kind, wrong=wrong: kind(**{wrong: 1}),
       f"{kind.__name__}: expected the fields ...got '{wrong}'; did you mean '{meant}'") for kind, wrong, meant in (
        (aif.Config, "long_lenght", "long_length"), (Columns, "itm", "item"), (train.NextItem, "negative", "negatives"),
        (train.Impressions, "treshold", "threshold"),
    )),
    *((lambda block=block: aif.Config(schema=BARE, blocks=(block,)),
       "Signatures: expected schema.content > 0, got 0: give the data a content embedding, or leave the block out")
      for block in (blocks.LshDin(), blocks.SimTier())),
    *each(demo.config, "Config", "at least 1", width=[0], short_length=[0], long_length=[-4]),
    *each(demo.config, "Config", "int", width=[2.5, np.int64(8)], long_length=[True]),
    *each(demo.config, "Config", "bool", sequence=["no"]),
    *each(demo.config, "Config", "tuple[str, ...]", objectives=["click", ["click"], (3,)]),
    *each(demo.config, "Config", "widths of at least 1", towers=[(16, 0)]),
    *each(demo.config, "Config", "tuple[int, ...]", towers=[16, None]),
    *((lambda value=value: demo.config(head=value), TypeError,
       f"Config.head: expected a value of a class made by the decorator `head`, such as ...'Mlp'...], got {value!r}")
      for value in ((64, 32), None)),
    *each(Mlp, "Mlp", "tuple[int, ...]", widths=[(2.5,)]),
    *each(Mlp, "Mlp", "at least one width, each at least 1", widths=[(16, 0), ()]),
    (lambda: demo.config(blocks=(blocks.Bea(), blocks.Bea(bridges=4))),
     "Config.blocks: expected blocks and tables of different names, ...none of tower, fields, calibration, got ['bea', 'bea']"),
    (lambda: demo.config(blocks=(blocks.Sim("category"), blocks.Sim("category", slots=2))),
     "Config.blocks: expected blocks and tables of different names, strings without '/', ...got ['sim_category', 'sim_cat"),
    (lambda: demo.config(head=LogitSum(), blocks=(blocks.DotProduct(), blocks.Bea(bridges=4))),
     "Config.head: expected a head that reads the features of bea, got LogitSum(): give head=Mlp((64, 32))"),
    (lambda: demo.config(blocks=(blocks.Sim("brand"),)),
     "Sim.field: expected one of schema.behaviour_fields ('item', 'category'), got 'brand'"),
    (lambda: demo.config(head=LogitSum(), blocks=()),
     "Config.blocks: expected at least one block for the head LogitSum(), got none"),
    *each(blocks.Bea, "Bea", "int", bridges=[2.5]),
    *each(blocks.Sim, "Sim", "str", field=[7]),
    *each(blocks.SimTier, "SimTier", "int or None", length=[512.0]),
    *each(blocks.MatchingStatistics, "MatchingStatistics", "tuple[str, ...]", fields=[("item", 8.0)]),
    (lambda: aif.Attribute(name="item", size="9"), "Attribute.size: expected int, got '9'"),
    (lambda: dataclasses.replace(BARE, content=4.0), "Schema.content: expected int, got 4.0"),
    *each(ServingConfig, "ServingConfig", "tuple[int, ...]", buckets=[512]),
    *each(ServingConfig, "ServingConfig", "float or None", budget=["1s"]),
    *each(train.NextItem, "NextItem", "int", negatives=["15"]),
    *((lambda value=value: demo.config(blocks=(value,)), TypeError,
       f"Config.blocks: expected a value of a class made by the decorator `block`, such as ...'Bea', ...], got {value!r}")
      for value in ("bea", blocks.Signatures(), None)),
    (lambda: demo.config(blocks=(blocks.Bea,)), TypeError,
     "Config.blocks: expected a value of Bea as it was defined last; make it by Bea(...), got <class"),
    (lambda: aif.assemble(demo.config(), item=aif.layers.MLP), TypeError,
     "assemble item: expected a Component, or an instance of a Flax module, got <class"),
    (lambda: record(sharper=True), "config: expected fields among ['assembled', 'blocks', ...'width'], got ['sharper']"),
    (lambda: record(blocks=[{"block": "Bea", "sharper": True}]),
     "block 'Bea': expected fields among ['bridges', 'dot_product'], got ['sharper']"),
    (lambda: record(blocks=[{"block": "Mine"}]),
     "block: expected one of ['Bea', ...'TargetAttention'...], got 'Mine'; import the module"),
    (lambda: record(blocks=[None]), "block: expected one of ...got None"),
    (lambda: record(head=[64, 32]), "head: expected one of ...'Mlp'...got [64, 32]; give {\"head\": NAME, FIELD"),
    (lambda: HEADS.from_json({"head": "Mlp", "width": 9}), "head 'Mlp': expected fields among ['widths'], got ['width']"),
    (lambda: record(schema=None), "config"),
    (lambda: record(schema={"sharper": True}), "config"),
    (lambda: record(width={}), "Config.width: expected int, got {}"),
    (lambda: aif.Config.from_json({}), "config: expected a record that `to_json` made, got another: KeyError"),
    (lambda: BLOCKS.from_json({}), "block: expected one of ...got {}"),
    (lambda: BLOCKS.from_json({"block": "Bea", "bridges": 0}), "Bea.bridges: expected at least 1, got 0"),
    # blocks
    (lambda: blocks.LinearMemory(width=0), "LinearMemory.width: expected at least 1, got 0"),
    (lambda: blocks.LinearMemory(keys="sharp"), "LinearMemory.keys: expected 'linear' or 'softmax', got 'sharp'"),
    (lambda: blocks.MatchingStatistics(()), "at least one field, each once, got ()"),
    (lambda: blocks.MatchingStatistics(("item", "item")), "at least one field, each once"),
    (lambda: blocks.MatchingStatistics(recent_events=0), "at least 1, got 0"),
    (lambda: demo.config(blocks=(blocks.MatchingStatistics(("item", "tags")),)),
     "behaviour fields of the schema, ('item', 'category'), got ['tags']"),
    *each(blocks.PureSvd, "PureSvd", "...", width=[0], length=[0], decay=[-1]),
    *each(blocks.Sim, "Sim", "at least 1", slots=[0], length=[0]),
    *each(blocks.SimTier, "SimTier", "2 to 64", tiers=[1, 65]),
    (lambda: blocks.SimTier(length=0), "SimTier.length: expected None or at least 1, got 0"),
    (lambda: blocks.SimTier(bits=48), f"{BITS}, got 48"),
    *((lambda bits=bits: blocks.LshDin(bits=bits), f"{BITS}, got {bits}") for bits in (0, 48, 512)),
    *((lambda bits=bits: blocks.Signatures(bits), f"{BITS}, got {bits}") for bits in (0, 31, 48, 288)),
    (lambda: fit_projection(np.eye(3)[:1], bits=32), "at least 2 rows with content, got 1"),
    (lambda: demo.config(blocks=(blocks.Sim("tags"),)),
     "Sim.field: expected one of schema.behaviour_fields ('item', 'category'), got 'tags'"),
    (lambda: blocks.popularity_offset([0, -1]), "counts: expected finite"),
    (lambda: blocks.popularity_offset([1, 1], power=-1), "power"),
    (lambda: svd_factors([1], [90], size=90), "item"),
    (lambda: svd_factors([-1], [1], size=90), "user"),
    (lambda: svd_factors([1, 2], [1], size=90), "user, item: expected one of each"),
    (lambda: svd_factors([1], [1.5], size=9), TypeError, "item: expected integers"),
    # columns, vocabularies, hashes
    (lambda: Columns(time_unit="min"), "Columns.time_unit: expected 's' or 'ms' or 'us' or 'ns', got 'min'"),
    (lambda: Columns(item_attributes="brand"), "Columns.item_attributes: expected tuple[str, ...], got 'brand'"),
    (lambda: Columns(item_attributes=("item",)),
     "expected attributes of different names without '/', none of them user, item, category, action"),
    (lambda: Columns(item_attributes=("a/b",)), "expected attributes of different names without '/', ...got 'a/b' among"),
    (lambda: Columns(bag_separator=""), "Columns.bag_separator: expected a character or more between the values of a bag"),
    (lambda: Columns(text=("itm",)), "Columns.text: expected names among columns ('user', 'item', 'time', ...got 'itm'"),
    (lambda: Columns(behaviour_fields=("brand",)), "Columns.behaviour_fields: expected names among item_attributes"),
    (lambda: Columns(actions=("view",)), "Columns.actions: expected a column for them"),
    (lambda: Columns(user="item"), "expected each column of the events file in one place, got ['item'] in several"),
    (lambda: Columns(category="price", item_floats=("price",)), "expected each column of the items file in one place"),
    (lambda: Columns(user=float("nan")), "Columns.user: expected str, got nan"),
    (lambda: Columns(content=3), "Columns.content: expected str or None, got 3"),
    (lambda: Columns(bag_length=True), "Columns.bag_length: expected int, got True"),
    (lambda: Columns(item_floats=("price", 1)), "Columns.item_floats: expected tuple[str, ...], got ('price', 1)"),
    (lambda: Columns(bag_length=1), "Columns.bag_length: expected at least 2"),
    (lambda: Columns(**{"colour": 1}), "Columns: expected the fields user, ...colour"),
    *((lambda wrong=wrong: Columns(item_statistics=wrong), "item_statistics") for wrong in ((0,), (7, 7), (9, 3), ("day",))),
    (lambda: aif.Vocabulary([1, 2]).encode(["1"]), TypeError, "expected integers like the vocabulary, got dtype <U1"),
    (lambda: aif.Vocabulary(["a"]).encode([1]), TypeError, "expected strings like the vocabulary, got dtype int64"),
    (lambda: aif.Vocabulary([1, 2]).encode([1.0]), TypeError, "expected integers like the vocabulary, got dtype float64"),
    (lambda: aif.Vocabulary([1.0, float("nan")]), TypeError, "expected integers or strings, got dtype float64"),
    (lambda: aif.Vocabulary(["a", "b"]).encode(["a", "z", 7]), TypeError, "got str, then int at position 2"),
    # logs, splits, orders, negatives
    (lambda: log([0, 1], [1, 1], [1, 1], [1, 1]),
     "user: expected values in [1, 3)... got 0 at position 0; row 0 is the unknown"),
    (lambda: log([1, -1], [1, 1], [1, 1], [1, 1]), "user...got -1 at position 1"),
    (lambda: log([1, 3], [1, 1], [1, 1], [1, 1]), "user...got 3 at position 1"),
    (lambda: log([1, 1], [1, -2], [1, 1], [1, 1]), "item...got -2 at position 1"),
    (lambda: log([1, 1], [1, 2**31], [1, 1], [1, 1]), "item: expected values in [0, 2147483648), got 2147483648 at position 1"),
    (lambda: log([1, 1], [1, 1], [-1, 1], [1, 1]), "action...got -1 at position 0"),
    (lambda: log([1, 1], [1, 1], [1, 1], [1, -(2**63)]), "time...got -9223372036854775808 at position [1]"),
    (lambda: log([1, 1], [1, 1], [1, 1], [1, 1_511_544_070_000]),
     "EventLog.time: expected a time before 2100 in 's', got 1511544070000 at position [1], which looks like 'ms'"),
    (lambda: log([1, 1], [1, 1], [1, 1], [1.0, 2.0]), TypeError, "time: expected integers, got dtype float64"),
    (lambda: log([1, 1], ["a", "b"], [1, 1], [1, 1]), TypeError, "item: expected integers"),
    (lambda: log([1, 1], [1, 1], [True, False], [1, 1]), TypeError, "action: expected integers, got dtype bool"),
    (lambda: log([1, 1], [1, 1, 1], [1, 1], [1, 1]), "one length...'item': 3"),
    (lambda: log([[1, 1]], [1, 1], [1, 1], [1, 1]), "user: expected shape [n], got [1, 2]"),
    (lambda: log([], [], [], [], users=0), "users of at least 1...got 0"),
    (lambda: split_by_time(LOG, validation=-0.1), "validation: expected a share in [0, 1)...got -0.1"),
    (lambda: split_by_time(LOG, validation=0.5, test=0.5), "below 1, got 0.5 + 0.5"),
    (lambda: split_by_time(log([1, 2, 1], [1] * 3, [1] * 3, [7] * 3)), "got none of 3 with"),
    (lambda: split_by_time(log([], [], [], [])), "times: expected samples...got none"),
    (lambda: LOG.history_end([7]), "positions: expected values in [0, 7), got 7"),
    (lambda: LOG.history_end([0, -1]), "got -1 at position [1]"),
    (lambda: LOG.history_end([0.5]), TypeError, "positions: expected integers"),
    (lambda: LOG.history_end_at([5], [1]), "users: expected values in [0, 3), got 5"),
    (lambda: LOG.history_end_at([1, 1], [1]), "times: expected shape [2] like users, got [1]"),
    (lambda: LOG.history_end_at([1], [1.5]), TypeError,
     "times: expected integer times in 's' or datetime64, got dtype float64"),
    (lambda: LOG.windows([0], [1], 0), "length of at least 1, got 0"),
    (lambda: sample_positions(LOG, min_history=-1), "min_history of at least 0, got -1"),
    (lambda: time_cuts(TEN_DAYS, test="2022-13-06"), "test: expected an ISO date such as '2022-05-06'...got '2022-13-06'"),
    (lambda: time_cuts(TEN_DAYS, test=1.5), "test: expected a share in [0, 1), or a moment...got 1.5"),
    (lambda: time_cuts(TEN_DAYS, validation=-0.1), "validation: expected a share...got -0.1"),
    (lambda: time_cuts(TEN_DAYS, test=True), "test: expected an ISO date...got True"),
    (lambda: time_cuts(TEN_DAYS, test=[1, 2]), "test: expected an ISO date...got [1, 2]"),
    (lambda: time_cuts(TEN_DAYS, test=None), "test: expected an ISO date...got None"),
    (lambda: time_cuts(TEN_DAYS, since=0.5), "since: expected an ISO date...got 0.5"),
    (lambda: time_cuts(TEN_DAYS, since="2030-01-01"),
     "since: expected a moment with samples after it (the samples are from 2022-05-01"),
    (lambda: time_cuts(TEN_DAYS, test="2030-01-01"), "test: expected a moment with samples from it on ...got '2030-01-01'"),
    (lambda: time_cuts(TEN_DAYS, test="2001-01-01"),
     "times: expected samples before the first cut, to train on, got none of 10"),
    (lambda: time_cuts(TEN_DAYS, test="2022-05-06", validation="2022-05-08"),
     "validation: expected a moment before the test part, 2022-05-06T"),
    (lambda: time_cuts(TEN_DAYS, test=1_651_795_200_000),
     "test: ...before 2100 in 's', got 1651795200000, which looks like 'ms'"),
    (lambda: time_cuts(TEN_DAYS, test=0.6, validation=0.5), "validation, test: expected validation + test below 1"),
    (lambda: NegativeSampler([5, 1]), "at least 2 items with an event to draw as negatives, got 1"),
    (lambda: NegativeSampler([]), "at least 2 items with an event to draw as negatives, got 0"),
    (lambda: NegativeSampler([0, 1, np.nan]), "finite values of at least 0"),
    (lambda: NegativeSampler([0, 1, -1]), "finite values of at least 0"),
    (lambda: NegativeSampler([[1, 2]]), "counts: expected shape [any], got [1, 2]"),
    (lambda: SAMPLER.sample(2, 3, key=KEY, avoid=[1]), "avoid: expected shape [2], got [1]"),
    (lambda: SAMPLER.sample(2, 3, key=KEY, avoid=[1, 3]), "avoid: expected values in [0, 3), got 3"),
    # training
    (lambda: demo.config(objectives=("click", "click")), "Config.objectives: expected different names"),
    *((lambda names=names: demo.config(objectives=names), f"Config.objectives: expected {expected}") for names, expected in (
        (("conversion|click",), "after '|' an objective named before"),
        (("click", "conversion|"), "after '|' an objective named before"),
        *((wrong, "names such as 'click'") for wrong in (("long view",), ("lambda",))),
    )),
    (lambda: losses.pointwise_bce.of("click", objective="share").bind(("click", "conversion|click", "like")),
     "pointwise_bce.of('click', objective='share'): expected an objective of the model, ..., got 'share'"),
    (lambda: losses.pointwise_bce(jnp.zeros((1, 2)), {"like": 1, "click": 1}),
     "pointwise_bce: expected one array of labels, or the name of one by .of(name), got ['click', 'like']"),
    (lambda: losses.pointwise_bce.of("click")(jnp.zeros((1, 2)), {"like": np.zeros((1, 2), np.float32)}),
     "pointwise_bce.of('click'): expected labels by name, 'click' among them, got ['like']"),
    (lambda: losses.pointwise_bce.of("click")(jnp.zeros((1, 2)), np.zeros((1, 2), np.float32)), "got one array without a name"),
    (lambda: losses.pointwise_bce(jnp.zeros((2, 3)), jnp.zeros(3)), "labels: expected the shape of scores (2, 3)"),
    (lambda: losses.pointwise_bce(jnp.zeros(3, int), jnp.zeros(3)), "scores: expected floating-point logits"),
    (lambda: losses.pointwise_bce(jnp.zeros(3), jnp.zeros(3), where=jnp.ones(3)), "where: expected a bool mask, got dtype"),
    (lambda: losses.listwise_softmax(jnp.zeros((3, 3)), jnp.zeros((3, 3)), where=jnp.ones(3, bool)),
     "where: expected a shape of the same rank ... got (3,)"),
    (lambda: losses.listwise_softmax(jnp.zeros((2, 3)), jnp.zeros((2, 3)), log_q=jnp.zeros((2, 2))),
     "log_q: expected a shape of the same rank ... got (2, 2)"),
    (lambda: losses.distill_listwise(jnp.zeros(3), jnp.zeros(2)),
     "teacher_scores: expected the shape of scores (3,), got (2,)"),
    (lambda: losses.pointwise_bce + 1.0, TypeError, "unsupported operand"),
    (lambda: math.nan * losses.pointwise_bce, "weight: expected a finite number, got nan"),
    (lambda: train.NextItem(negatives=0), "NextItem.negatives: expected at least 1, got 0"),
    *each(aif.FitConfig, "FitConfig", "tuple[int, ...] or None", buckets=["short"]),
    (lambda: GateConfig(gauc=-1.0), "GateConfig.gauc: expected at least 0"),
    (lambda: GateConfig(volume=2.0), "volume: expected a share"),
    # metrics and calibration
    (lambda: metrics.auc([1.0, np.nan, np.nan], [0, 1, 1]), "scores: expected no NaN, got nan at position [1]"),
    (lambda: metrics.probabilities_by_user([np.nan], [1], [7]), "scores: expected no NaN"),
    (lambda: metrics.recall_at_k([[0, np.nan]], [[1, 0]], k=1), "scores: expected no NaN, got nan at position [0, 1]"),
    (lambda: metrics.auc([1.0, 2.0], [0, 2]), "labels: expected 0 or 1, got 2.0 at position [1]"),
    (lambda: metrics.auc([1.0, 2.0], [0, np.nan]), "labels: expected 0 or 1, got nan"),
    (lambda: metrics.auc([1.0, 2.0], [0]), "labels: expected the shape of scores (2,), got (1,)"),
    (lambda: metrics.auc([1.0, 2.0], [0, 1], where=[1, 1]), "where: expected a bool mask, got dtype int"),
    (lambda: metrics.auc(*TWO, where=[True, False]), "where: expected a shape of the same rank ... got (2,)"),
    (lambda: metrics.gauc_by_user(*TWO, [0, 1]), "users: expected a shape of the same rank ... got (2,)"),
    (lambda: metrics.gauc_by_user([1.0], [0], [0.5]), "users: expected integers or strings, got float64"),
    (lambda: metrics.recall_at_k(*TWO, k=0), "k: expected at least 1, got 0"),
    (lambda: metrics.recall_at_k(*TWO, k=2.5), TypeError, "k: expected an integer, got 2.5"),
    (lambda: metrics.recall_at_k(1.0, 1, k=1), "scores: expected lists"),
    (lambda: metrics.calibration([1.0], [0], bins=0), "bins: expected at least 1, got 0"),
    (lambda: metrics.mean_by_user([1, 0], [1]), "users: expected shape [2], got [1]"),
    (lambda: calibrated(rate=0.0), "calibration rate: expected a share above 0"),
    (lambda: calibrated(labels=[0, 0, 0, 0]), "calibration labels: expected entries of both classes, got 0 positives of 4"),
    (lambda: calibrated(labels=[0, 2, 0, 1]), "labels: expected 0 or 1"),
    (lambda: calibrated(labels=[1, 1, 0, 0]),
     "calibration scores: expected scores that rise with the labels, got a scale of -"),
    (lambda: calibrated(scores=[1, 1, 1, 1]), "calibration scores: expected scores that rise with the labels, got a scale of"),
    (lambda: calibrated(scores=[0, np.nan, 1, 2]), "scores: expected no NaN"),
    *((lambda size=size: calibrated(scores=[0, size, 1, 2]), "calibration scores: expected finite logits, none beyond 1e")
      for size in (1e38, -math.inf)),
    (lambda: calibrated(weights=[1, -1, 1, 1]), "weights: expected finite values of at least 0"),
    (lambda: calibrated(labels=[0, 1]), "labels: expected the shape of scores (4,)"),
    (lambda: calibrated(where=np.ones(3, bool)), "where: expected a shape of the same rank"),
    # serving
    *each(ServingConfig, "ServingConfig", "...", buckets=[(), (8, 4), (0, 4)], batch_size=[0, 2.5],
          budget=[0.0, math.inf], reserve=[-1.0, math.nan], callable_timeout=[-1.0], max_stale=[0.0], max_k=[0],
          max_pending=[0], max_hung=[0]),
    *each(ServingConfig, "ServingConfig", "None or a share from 0 to 1", max_unknown=[-0.1, 1.5, math.nan]),
    (lambda: Request(user=1, order=7), "Request.order"),
    (lambda: Request(user=1, budget=0.0), "Request.budget"),
    (lambda: Request(user=[1]), TypeError, "Request.user: expected something hashable"),
    *((lambda call=call: Request(**{"user": 1} | call), "expected at most 1024 characters, got 1025")
      for call in ({"user": LONG}, {"feature_version": LONG})),
    *((lambda ids=ids: Request(user=3, exclude=ids), TypeError, "Request.exclude") for ids in ([1.5], [1, "a"])),
    *((lambda ids=ids: Request(user=3, exclude=ids), "Request.exclude") for ids in ([[1]], 7, [LONG])),
    # connectors and the service
    *((lambda text=text: parse_current(text), expected) for text, expected in {
        "": "at least one", "../one": "names of folders", "/etc": "names of folders", ".hidden": "names of folders",
        "one\none": "different folders", "one sha256=12": "64 hex digits", "one\ntwo share=2": "a share in",
        "one\ntwo share=0.7\nthree share=0.7": "shares of at most 1", "one colour=red": "FOLDER",
    }.items()),
    (lambda: Listening(max_candidates=0), "max_candidates: expected more than 0, got 0"),
    *((lambda bids=bids: aif.Candidates([1, 2, 3], bids), message) for bids, message in (
        (np.ones(2), "bids: expected one bid for each of 3 ids, got shape [2]"),
        *(([1, 2, bid], "bids: expected finite bids") for bid in (np.nan, -1, 1e39)),
        ("abc", "bids: expected numbers [C]"), (["1.5", "2", "3"], "bids: expected numbers [C], none null, got '1.5' at "),
        ([True, False, True], "none null, got bool"), ([1, None, 2], "expected numbers [C], none null, got None at position 1"),
    )),
    (lambda: aif.Candidates([[1, [2]]]), "candidates: expected item ids [C], one axis of integers or strings, got list of l"),
    (lambda: aif.Candidates([1.5, np.float64(2.5)]), TypeError, "candidates: expected integers or strings, all of one kind"),
    (lambda: Listening(port=1 << 16), "0 to 65535"),
    *((lambda kind=kind: source_of(f"builtins:{kind}"), "expected an object with `async get") for kind in ("int", "dict")),
    *((lambda names=names: publish(".", names), TypeError, "entries: expected a list of folder names") for names in (
        "monday", ExportEntry("monday"), [b"monday"], [ExportEntry("monday", share="0.2")],
    )),
]  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused[-1])
def test_a_wrong_call_is_refused_and_told_what_was_expected(refused):
    call, *error, message = refused
    with pytest.raises(*(error or [ValueError]), match=".*".join(map(re.escape, message.split("...")))):
        call()
