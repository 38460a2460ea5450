"""The head as one MLP over concatenated inputs."""

import numpy as np


def logit(params, inputs):
    """One pair: inputs is block -> name -> [width], in the order of the head's kernels."""
    x = np.concatenate([value for named in inputs.values() for value in named.values()])
    kernel = np.concatenate([params["first"]["kernels"][block][name] for block in inputs for name in inputs[block]])
    x = np.maximum(x @ kernel + params["first"]["bias"], 0)
    for i in range(len(params["rest"])):
        layer = params["rest"][f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        if i + 1 < len(params["rest"]):
            x = np.maximum(x, 0)
    return float(x[0])
