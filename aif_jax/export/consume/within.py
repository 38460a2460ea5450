"""What runs within the child process of `child`: takes its limits, verifies a folder, prints the report.

Where Python has no `resource` module (Windows) there is a limit of time alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax

from .files import ExportError
from .model import verify

try:
    import resource
except ModuleNotFoundError:
    resource = None


def run(text: str) -> None:
    """The child: takes its limits, verifies, prints the report or the error as JSON."""
    order, limit, seconds = json.loads(text)
    jax.devices()  # what JAX itself needs is not counted
    if resource is not None:
        # The parent stops a child that takes too long; by its processor time it also ends where the parent was killed.
        processor = int(min(seconds, 1e6) * (os.cpu_count() or 1)) + 1
        limits = {resource.RLIMIT_AS: _address_space() + limit, resource.RLIMIT_CPU: processor, resource.RLIMIT_CORE: 0}
        for kind, most in limits.items():
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        answer = verify(trusted=True, **order)
    except ExportError as error:
        answer = {"error": str(error)[:2000]}
    except MemoryError:
        answer = {"error": f"functions: expected ones that run in at most {limit} bytes of memory; max_bytes sets the limit"}
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # nothing of the functions runs any more


def _address_space() -> int:
    """Bytes of address space that this process has."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return 8 << 30
    return pages * os.sysconf("SC_PAGE_SIZE")
