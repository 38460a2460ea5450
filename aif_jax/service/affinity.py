"""Affinity: the text by which a proxy or a router sends all calls of a user to one replica, where the state is cached."""

from __future__ import annotations

import hashlib

HEADER = "x-aif-user"
"""Header of HTTP, or metadata of gRPC, that a consistent hash reads; `Client` sends it with every call."""


def affinity_key(user: int | str) -> str:
    """16 hex digits that depend on the user alone: the start of the SHA-256 of the id as UTF-8, decimal for integers.

    A digest, so that neither the logs of a proxy nor its limits of a header see ids.

    Example:
      >>> affinity_key("ann"), affinity_key(7) == affinity_key("7")
      ('49915e0d7d4b402e', True)
    """
    return hashlib.sha256(str(user).encode("utf-8", "surrogatepass")).hexdigest()[:16]
