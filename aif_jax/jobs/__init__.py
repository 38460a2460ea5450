"""Jobs over Arrow record batches: a catalogue in, encoded rows and their version out, on whatever engine.

`Iterator[pyarrow.RecordBatch] -> Iterator[pyarrow.RecordBatch]`; see docs/scale_catalogue.md. Needs the `data` extra.
"""

from aif_jax.jobs.encode import ItemJob

__all__ = ["ItemJob"]
