"""Several devices give the training run of one: in a separate process, where a CPU counts as eight devices."""

CODE = """
import dataclasses, tempfile
import jax, numpy as np, optax
import aif_jax as aif
from aif_jax import checkpoint, sharding, train
from aif_jax.train import losses
from jax.sharding import NamedSharding, PartitionSpec
from tests import demo
from tests.test_sparse import batch_of

schema = demo.schema()
sized = tuple(dataclasses.replace(a, size=64) if a.name == "item" else a for a in schema.item_attributes)
config = demo.config(schema=dataclasses.replace(schema, item_attributes=sized), **demo.SMALL | {"sequence": True})
model, optimizer = aif.build(config), optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
rows = demo.catalogue().features([*range(50), *range(14)])  # 50 rows and 14 more
params = demo.init(model, items=aif.Catalogue(schema=config.schema, raw=np.arange(63), items=rows))
batches = [batch_of(config, seed=seed, samples=16) for seed in range(4)]
fresh = lambda: train.init_state(params, optimizer)
item = lambda state: state.trained["embedding"]["item"]
given = dict(loss=losses.pointwise_bce, sparse=("item",))
step = train.make_step(model, optimizer, **given)

def run(state, batches, step=step):
    seen = []
    for batch in batches:
        state, metrics = step(state, batch)
        seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return state, np.array(seen)

whole, expected = run(fresh(), batches)
mesh, smaller, four = (sharding.row_mesh(jax.devices()[:count]) for count in (8, 2, 4))
placed = [sharding.place_batch(batch, mesh) for batch in batches]
assert placed[0].labels.addressable_shards[0].data.shape[0] == 2
folder = tempfile.mkdtemp() + "/2"
state, seen = run(sharding.place_state(fresh(), mesh), placed[:2])
with checkpoint.Checkpoints(folder[:-2]) as saving:
    saving.save_async(2, state.params, config, opt_state=(state.step, state.skipped, state.opt_state))
state, more = run(state, placed[2:])
np.testing.assert_allclose([*seen, *more], expected, rtol=2e-4)
print("same", item(state).addressable_shards[0].data.shape[0])

like = sharding.place_state(fresh(), smaller)
read = checkpoint.load(folder, like={"params": like.params, "opt_state": (like.step, like.skipped, like.opt_state)})
count, skipped, opt_state = read.opt_state
groups = {group: {name: read.params[name] for name in getattr(like, group)} for group in ("trained", "fitted")}
state = train.TrainState(step=count, skipped=skipped, **groups, opt_state=opt_state)
assert len(item(state).sharding.device_set) == 2 and item(state).addressable_shards[0].data.shape[0] == 64
state, seen = run(state, [sharding.place_batch(b, smaller) for b in batches[2:]])
np.testing.assert_allclose(seen, expected[4:], rtol=2e-4)
np.testing.assert_allclose(item(state), item(whole), atol=1e-4)
print("restored", int(state.step))
alone = checkpoint.load(folder)
tables = alone.params["embedding"]
print((tables["item"] * jax.device_put(1.0, jax.devices()[1])).devices())  # what is loaded may go to any device
split = jax.ShapeDtypeStruct(tables["item"].shape, np.float32, sharding=NamedSharding(four, PartitionSpec(four.axis_names)))
split = checkpoint.load(folder, like={"params": {**alone.params, "embedding": {**tables, "item": split}}}).params
checkpoint.save(folder + "-split", aif.Trained(model, split))
assert checkpoint.load(folder + "-split").version == alone.version == aif.fingerprint(split, model.config)
print("split", split["embedding"]["item"].addressable_shards[0].data.shape[0])

try:
    sharding.place_batch({"x": np.zeros(7)}, four)
except ValueError as error:
    print(error)
"""


def test_several_devices_train_as_one_and_a_checkpoint_goes_on_under_another_mesh(python):
    """The loss curve is that of one device; a batch that cannot be spread is refused."""
    assert python(CODE, devices=8, timeout=280, lightly=True).splitlines() == [
        "same 64",
        "restored 4",
        "{CpuDevice(id=1)}",
        "split 16",
        "batch: expected samples that are a multiple of 4 devices, got 7",
    ]
