"""Jobs over Arrow record batches: a catalogue or users' events in, encoded rows and their version out, on whatever engine.

`Iterator[pyarrow.RecordBatch] -> Iterator[pyarrow.RecordBatch]`; see docs/scale_catalogue.md. And on one machine the join of a
request log with what followed. Needs the `data` extra.
"""

from aif_jax.jobs.encode import ItemJob, UserJob
from aif_jax.jobs.outcomes import JoinSummary, join_outcomes

__all__ = ["ItemJob", "JoinSummary", "UserJob", "join_outcomes"]
