"""Public data sets as `aif_jax.data.dataset.Dataset`: readers, downloads, and a synthetic world whose truth is known."""
