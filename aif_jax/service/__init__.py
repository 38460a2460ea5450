"""The service: the engine behind HTTP, for programs in other languages. `aif-jax serve FOLDER` starts it.

    processes.py  process.py                      the processes, and one of them
    http.py  inference.py                         fronts: bytes in, bytes out
        tensors.py  calls.py                      one form of calls and problems for all of them
                  core.py                         `Service`: versions, limits, observers, answers
    models.py  features.py                          versions of a folder or a store; what a call's user becomes
              log.py                              what an operator sees
    client.py                                     for callers

It is thin over `aif_jax.serving`, which knows nothing of networks.
"""
