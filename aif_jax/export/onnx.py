"""ONNX for the parts that a converter and onnxruntime can take, each checked against the golden case.

The converter is jax2onnx, fed with the function's jaxpr, so that no module of the model is patched. What cannot be converted,
or gives other numbers, is refused with the reason, and nothing is written for it. With jax2onnx 0.17 and onnxruntime 1.32 the
interaction passes wherever it does not compare signatures (SimTier by bridge codes, learned memory, BEA, SIM; two_tower); the
exact SimTier and the LSH memory are refused, onnxruntime having no kernels for their uint32 operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from aif_jax.export.functions import Exported, order

TOLERANCE = 1e-4


def write(
    folder: Path,
    name: str,
    built: Exported,
    leaves: Mapping[str, np.ndarray],
    golden: Mapping[str, Any],
    *,
    candidates: int,
) -> dict[str, Any]:
    """Converts one function and writes `name.onnx` if it passes; the parameters are inside and all sizes are fixed.

    Args:
      folder: to write to.
      name: of the function.
      built: the exported function.
      leaves: parameters by path.
      golden: the golden case, whose sizes are taken but for
      candidates: C, which the golden rows are repeated to.

    Returns:
      `file`, `inputs` in order, `outputs` and `max_abs_diff`; or `refused`, the reason.

    Raises:
      ModuleNotFoundError: jax2onnx or onnxruntime is not installed.
    """
    to_onnx, onnxruntime = _tools()
    inputs = {key: _repeated(golden[f"{name}.inputs/{key}"], spec, candidates) for key, spec in built.inputs.items()}
    names = [key for kind, key in order({}, inputs) if kind == "inputs"]
    outputs = sorted(built.outputs)
    params = {path: jnp.asarray(leaves[path]) for path in built.params}

    def flat(*values: Any) -> list[Any]:
        made = built.function(params, dict(zip(names, values, strict=True)))
        return [made[key] for key in outputs]

    specs = [jax.ShapeDtypeStruct(inputs[key].shape, inputs[key].dtype) for key in names]
    try:
        model = to_onnx(jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(flat)(*specs)), specs)
        raw = model.SerializeToString()
        session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
        taken = [entry.name for entry in session.get_inputs()]
        got = session.run(None, {key: inputs[own] for key, own in zip(taken, names, strict=True)})
    except Exception as error:  # a converter fails in many ways; each of them is a reason, and none is ours to handle
        return {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
    largest = 0.0
    for key, value in zip(outputs, got, strict=True):
        expected = _repeated(golden[f"{name}.outputs/{key}"], built.outputs[key], candidates)
        if value.shape != expected.shape:
            return {"refused": f"{key}: expected shape {list(expected.shape)}, onnxruntime gives {list(value.shape)}"}
        gap = float(np.max(np.abs(value.astype(np.float64) - expected), initial=0.0))
        if not gap <= TOLERANCE:
            return {"refused": f"{key}: differs from the golden output by {gap}"}
        largest = max(largest, gap)
    (folder / f"{name}.onnx").write_bytes(raw)
    shapes = {key: list(inputs[key].shape) for key in names}
    return {"file": f"{name}.onnx", "inputs": dict(zip(taken, names, strict=True)), "shapes": shapes, "outputs": outputs,
            "max_abs_diff": largest}  # fmt: skip


def _repeated(array: Any, spec: Any, candidates: int) -> np.ndarray:
    """A golden array with its candidates repeated to the number wanted."""
    shape = [candidates if str(want) == "c" else got for want, got in zip(spec.shape, np.shape(array), strict=True)]
    return np.resize(array, shape)


def _tools() -> tuple[Any, Any]:
    try:
        import onnxruntime  # type: ignore[import-not-found]
        from jax2onnx import to_onnx  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "ONNX needs onnxruntime and jax2onnx; the latter pins an older orbax-checkpoint, which it does not use here: "
            "pip install onnx onnx-ir onnxruntime && pip install --no-deps jax2onnx"
        ) from None
    return to_onnx, onnxruntime
