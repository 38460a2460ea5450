"""The catalogue on an engine: a function of Arrow record batches, and adapters to Ray and Spark, each with its extra.

`Iterator[pyarrow.RecordBatch] -> Iterator[pyarrow.RecordBatch]`; see docs/scale_catalogue.md.
"""

from aif_jax.engines.items import ItemJob, encode_with_ray, encode_with_spark

__all__ = ["ItemJob", "encode_with_ray", "encode_with_spark"]
