"""Signatures from their definition: bits in Python lists, one pair at a time."""

import numpy as np


def sign(content, projection):
    """bool [n, K]: one dot product for each bit."""
    n, bits = len(content), projection.shape[1]
    out = np.zeros((n, bits), bool)
    for i in range(n):
        for k in range(bits):
            out[i, k] = sum(float(a) * float(b) for a, b in zip(content[i], projection[:, k], strict=True)) > 0
    return out


def pack(bits):
    """Bit k is bit k % 32 of word k // 32."""
    words = [0] * (len(bits) // 32)
    for k, bit in enumerate(bits):
        words[k // 32] |= int(bit) << (k % 32)
    return words


def differing(a, b):
    """Hamming distance of two lists of words."""
    return sum(bin(int(x) ^ int(y)).count("1") for x, y in zip(a, b, strict=True))


def signs(words):
    return [1.0 if int(words[k // 32]) >> (k % 32) & 1 else -1.0 for k in range(32 * len(words))]


def signed(content, fitted):
    """uint32 [n, W]: the packed signs of every row of content under a fitted projection."""
    return np.array([pack(row) for row in sign(content, np.asarray(fitted["projection"]))])
