"""What a person sees of the main objects when they print one."""

import aif_jax as aif
from aif_jax import blocks
from tests import demo
from tests.test_candidates import of_log

SCHEMA = (
    "Schema(items: item 50, category 6, tags 9x3; users: gender 3, interests 7x2; behaviours: item, category; actions: 4; "
    "user_floats: 2; item_floats: 1; content: 12; side: bid)"
)


def test_schema_and_config():
    assert repr(demo.schema()) == SCHEMA
    small = aif.Schema(item_attributes=(aif.Attribute(name="item", size=3), aif.Attribute(name="category", size=2)))
    assert repr(small) == "Schema(items: item 3, category 2; users: none; behaviours: item, category; actions: 2)"
    config = aif.Config(schema=demo.schema(), width=16, blocks=(blocks.Bea(4), blocks.LshDin()))
    assert repr(config).startswith(f"Config(schema={SCHEMA}, width=16, short_length=32, ")
    assert ", blocks=(Bea(bridges=4, dot_product=False), LshDin(bits=64)), " in repr(config)
    configs = [demo.config(**changes) for changes in demo.VARIANTS.values()]
    assert len({repr(config) for config in configs}) == len(configs)
    assert repr(demo.config(blocks=(blocks.SimTier(tiers=5),))) != repr(demo.config(blocks=(blocks.SimTier(tiers=4),)))


def test_model_names_its_functions():
    start = "PreRanker(user=aif_jax.user.apply, item=aif_jax.item.apply, interaction=aif_jax.interaction.apply, config=Config("
    assert repr(aif.build(demo.config())).startswith(start)

    def own(params, features, *, config): ...

    mine = aif.assemble(demo.config(), item=aif.Component(own, own))
    assert "item=tests.test_repr.test_model_names_its_functions.<locals>.own, " in repr(mine)


def test_dataset_and_log():
    times = [1_500_000_000, 1_500_000_100, 1_600_000_000, 1_500_000_000]
    log = aif.EventLog([1, 1, 1, 2], [1, 2, 1, 2], [1] * 4, times, users=4)
    data = of_log(log, items=2, actions=2)
    assert repr(data) == f"Dataset('mine': 3 users, 2 items, 4 events, {data.schema!r})"
    assert repr(log) == "EventLog(4 events, 3 users, 2017-07-14 to 2020-09-13; events of a user: median 1, at most 3)"
    assert "1 users, second 3 to second 7; events" in repr(aif.EventLog([1, 1], [1, 1], [1, 1], [3, 7]))
    assert repr(aif.EventLog([], [], [], [], users=2)) == "EventLog(0 events, 1 users)"


def test_index_and_engine():
    model, params = demo.build(**demo.VARIANTS["base"])  # compiles soonest
    index = aif.ItemIndex.build(aif.Trained(model, params), demo.catalogue(), batch_size=64, progress=False)
    assert repr(index).startswith("ItemIndex(49 items, capacity=") and index.version[:12] in repr(index)
    assert "storage='float32'" in repr(index) and "bytes a row" in repr(index)
    unknown = aif.empty_user(model.config.schema, length=model.config.history_length)
    engine = aif.AsyncPreRanker(aif.Trained(model, params), index, features=lambda request: unknown)
    assert "version=not started" in repr(engine) and "pending=0/64" in repr(engine)
