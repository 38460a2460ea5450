"""Writes arrays in the safetensors layout: readable from any language, nothing to execute; `consume.read_arrays` reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.export.consume.files import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name, widest element first so that every array is aligned; TypeError for a dtype the format lacks."""
    host = {name: np.asarray(value) for name, value in arrays.items()}
    host = dict(sorted(host.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0])))
    header, end = {}, 0
    for name, value in host.items():
        dtype = NAMES.get(value.dtype.newbyteorder("<"))
        if dtype is None:
            raise TypeError(f"{name}: expected a dtype among {sorted(NAMES.values())}, got {value.dtype}")
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in host.values():
            file.write(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<"), copy=False)).tobytes())
