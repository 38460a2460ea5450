"""The service: the engine behind HTTP and gRPC, for programs in other languages. `aif-jax serve FOLDER` starts it.

    http.py, inference_http.py   rpc.py, inference_rpc.py     fronts: bytes in, bytes out
            calls.py  frame.py  answers.py  errors.py         one form of calls, answers and problems for all of them
                          core.py                             `Service`: versions, limits, observers
              models.py  folder.py  mirror.py  features.py    versions of a folder or a store; what a call's user becomes
          log.py  shadow.py  replay.py  recent.py  metrics.py what an operator sees

It is thin over `aif_jax.serving`, which knows nothing of networks.
"""
