"""The head as one MLP over concatenated blocks."""

import numpy as np


def logit(params, blocks):
    """One pair: blocks is name -> [width], in the order of the head's kernels."""
    x = np.concatenate([blocks[name] for name in blocks])
    kernel = np.concatenate([params["first"]["kernels"][name] for name in blocks])
    x = np.maximum(x @ kernel + params["first"]["bias"], 0)
    for i in range(len(params["rest"])):
        layer = params["rest"][f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        if i + 1 < len(params["rest"]):
            x = np.maximum(x, 0)
    return float(x[0])
