"""The catalogue on Ray and Spark: a function of Arrow record batches and its adapters; see docs/scale_catalogue.md."""

from aif_jax.engines.items import ItemJob, encode_with_ray, encode_with_spark

__all__ = ["ItemJob", "encode_with_ray", "encode_with_spark"]
