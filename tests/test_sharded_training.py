"""Several devices give the training run of one: in a separate process, where a CPU counts as eight devices."""

SETUP = """
import tempfile
import jax, numpy as np, optax
import aif_jax as aif
from aif_jax import checkpoint, sharding, train
from aif_jax.train import SparseConfig, losses
from tests import demo
from tests.test_sparse import SMALL, batch_of

import dataclasses
schema = demo.schema()
sized = tuple(dataclasses.replace(a, size=64) if a.name == "item" else a for a in schema.item_attributes)
config = demo.config(schema=dataclasses.replace(schema, item_attributes=sized), **SMALL)
model, optimizer = aif.build(config), optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
items = jax.tree.map(lambda x: np.concatenate([x, x[:14]]), demo.catalogue().items)  # 50 rows and 14 more
params = demo.init(model, items=items)
batches = [batch_of(config, seed=seed, samples=16) for seed in range(4)]
fresh = lambda: train.init_state(params, optimizer)
item = lambda state: state.trained["embedding"]["item"]

def run(state, step, batches):
    seen = []
    for batch in batches:
        state, metrics = step(state, batch)
        seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return state, np.array(seen)

make = lambda sparse, **more: train.make_step(model, optimizer, loss=losses.pointwise_bce, sparse=sparse, **more)
by_row = SparseConfig(tables=("item",))
"""


def test_the_loss_curve_of_one_device(python):
    code = """
mesh = sharding.row_mesh()
assert mesh.size == 8
placed = [sharding.place_batch(batch, mesh) for batch in batches]
assert placed[0].labels.addressable_shards[0].data.shape[0] == 2
model = aif.build(config.replace(sequence=True))
params = demo.init(model, items=items)
step = make(by_row, sequence_loss=train.SequenceLoss(weight=1.0, negatives=8))  # negatives of all devices' samples
_, expected = run(fresh(), step, batches)
assert expected[0] > run(fresh(), make(by_row), batches[:1])[1][0] + 0.5
for split in ((), ("item",)):
    state, seen = run(sharding.place_state(fresh(), mesh, split=split), step, placed)
    np.testing.assert_allclose(seen, expected, rtol=2e-4)
    shard = item(state).addressable_shards[0].data.shape[0]
    assert shard == (8 if split else 64), (shard, split)
    print("same", split)
"""
    assert python(SETUP + code, devices=8, timeout=280, lightly=True).count("same") == 2


def test_a_checkpoint_goes_on_under_another_mesh(python):
    code = """
mesh, smaller = sharding.row_mesh(), sharding.row_mesh(jax.devices()[:2])
step = make(by_row)
whole, expected = run(fresh(), step, batches)
state, _ = run(sharding.place_state(fresh(), mesh, split=("item",)), step,
               [sharding.place_batch(b, mesh) for b in batches[:2]])
folder = tempfile.mkdtemp() + "/saved"
checkpoint.save(folder, aif.Trained(model, state.params), opt_state=(state.step, state.skipped, state.opt_state))
like = sharding.place_state(fresh(), smaller, split=("item",))
read = checkpoint.load(folder, like={"params": like.params, "opt_state": (like.step, like.skipped, like.opt_state)})
count, skipped, opt_state = read.opt_state
groups = {group: {name: read.params[name] for name in getattr(like, group)} for group in ("trained", "fitted")}
state = train.TrainState(step=count, skipped=skipped, **groups, opt_state=opt_state)
assert len(item(state).sharding.device_set) == 2 and item(state).addressable_shards[0].data.shape[0] == 32
state, seen = run(state, step, [sharding.place_batch(b, smaller) for b in batches[2:]])
np.testing.assert_allclose(seen, expected[4:], rtol=2e-4)
np.testing.assert_allclose(item(state), item(whole), atol=1e-4)
assert int(state.step) == 4
print("restored")
"""
    assert "restored" in python(SETUP + code, devices=8, timeout=280, lightly=True)


def test_a_batch_that_cannot_be_spread_is_refused_and_a_table_padded(python):
    code = """
from aif_jax import sharding
import numpy as np
mesh = sharding.row_mesh()
try:
    sharding.place_batch({"x": np.zeros(7)}, mesh)
except ValueError as error:
    print(error)
table = sharding.place_state({"embedding": {"item": np.ones((9, 2))}}, mesh, split=("item",))["embedding"]["item"]
print(table.shape, float(table.sum()), table.addressable_shards[0].data.shape)
"""
    assert python(code, devices=4).splitlines() == [
        "batch: expected samples that are a multiple of 4 devices, got 7",
        "(12, 2) 18.0 (3, 2)",
    ]
