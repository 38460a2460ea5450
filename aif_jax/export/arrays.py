"""Arrays as bytes in the safetensors layout: readable from any language, nothing to execute.

Source: the public safetensors format; the reader stands in `consume`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.export.consume import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name, widest element first so that every array is aligned.

    Raises:
      TypeError: a dtype that the format does not have.

    Example:
      >>> import tempfile
      >>> from aif_jax.export.consume import read_arrays
      >>> path = Path(tempfile.mkdtemp()) / "x.safetensors"
      >>> write_arrays(path, {"a": np.arange(3, dtype=np.int32)})
      >>> read_arrays(path.read_bytes())["a"].tolist()
      [0, 1, 2]
    """
    host = {name: np.asarray(value) for name, value in arrays.items()}
    for name, value in host.items():
        if value.dtype.newbyteorder("<") not in NAMES:
            raise TypeError(f"{name}: expected a dtype among {sorted(NAMES.values())}, got {value.dtype}")
    host = dict(sorted(host.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0])))
    header, end = {}, 0
    for name, value in host.items():
        dtype = NAMES[value.dtype.newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in host.values():
            file.write(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<"), copy=False)).tobytes())


def vocabulary_arrays(vocabularies: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Vocabularies as arrays: int64 ids, or UTF-8 bytes and offsets for strings."""
    return {key: value for name, vocabulary in vocabularies.items() for key, value in _vocabulary(name, vocabulary.raw)}


def _vocabulary(name: str, raw: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if raw.dtype.kind in "iu":
        yield f"{name}/ids", raw.astype(np.int64)
        return
    encoded = [str(text).encode() for text in raw.tolist()]
    yield f"{name}/utf8", np.frombuffer(b"".join(encoded), np.uint8)
    yield f"{name}/offsets", np.cumsum([0, *map(len, encoded)]).astype(np.int64)
