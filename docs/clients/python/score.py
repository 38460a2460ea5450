"""Scores the golden case of the folder `exported` with jax, numpy and json alone, as a loader in another language would."""

import json

import jax
import jax.export
import numpy as np


def arrays(path):
    """Arrays of a safetensors file by name."""
    raw = np.fromfile(path, np.uint8)
    size = int(raw[:8].view("<u8")[0])
    head, kinds = json.loads(raw[8 : 8 + size].tobytes()), {"F32": "<f4", "I32": "<i4", "U32": "<u4", "BOOL": "?"}
    head.pop("__metadata__", None)
    parts = {name: raw[8 + size :][slice(*entry["data_offsets"])].view(kinds[entry["dtype"]]) for name, entry in head.items()}
    return {name: part.reshape(head[name]["shape"]) for name, part in parts.items()}


manifest, stored = json.loads(np.fromfile("exported/manifest.json", np.uint8).tobytes()), arrays("exported/params.safetensors")


def function(name):
    """A function of the manifest, of inputs by name."""
    spec, raw = manifest["functions"][name], np.fromfile(f"exported/{name}.jax_export", np.uint8)
    exported, params = jax.export.deserialize(bytearray(raw)), {path: stored[path] for path in spec["params"]}
    return jax.jit(lambda given: exported.call(params, {entry["name"]: given[entry["name"]] for entry in spec["inputs"]}))


golden = arrays("exported/golden.safetensors")
given = {name.removeprefix("interaction.inputs/"): value for name, value in golden.items()}
logits = function("interaction")(given)["logits"]
np.testing.assert_allclose(logits, golden["interaction.outputs/logits"], atol=1e-5)
print(f"{logits.size} logits are those of the golden case")
