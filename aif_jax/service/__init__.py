"""The service: the engine behind HTTP, for programs in other languages. `aif-jax serve FOLDER` starts it.

    process.py                                    the process: settings, signals, an HTTP server
    http.py  inference.py                         fronts: bytes in, bytes out
              calls.py                            one form of calls and problems for both
                  core.py                         `Service`: versions, observers, answers
    models.py  features.py                          versions of a folder or a store; what a call's user becomes
    current.py                                    which exports of a folder serve
              log.py                              answered calls as Parquet files, which training joins

It is thin over `aif_jax.serving`, which knows nothing of networks.
"""
