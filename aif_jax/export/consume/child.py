"""Checks a folder in a child process with limits of memory and time: what its functions do cannot harm this process.

Where Python has no `resource` module (Windows) the child has a limit of time alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .files import ExportError, memory

try:
    import resource
except ModuleNotFoundError:
    resource = None

# This very package, imported by its path: neither the folder, nor the working directory, nor other packages are imported.
START = """
import importlib.util, sys
home, order, *sys.path[:] = sys.argv[1:]
spec = importlib.util.spec_from_file_location("consume", home + "/__init__.py", submodule_search_locations=[home])
sys.modules["consume"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["consume.child"].run(order)
"""
SETTINGS = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "MALLOC_ARENA_MAX": "2"}
"""Accelerators belong to the parent; an arena of memory for each thread would count as memory that the functions take."""


def verify_in_child(
    folder: Path, platforms: Any, *, tolerance: float, sha256: str, max_bytes: int | None, max_seconds: float
) -> dict[str, Any]:
    """The report of `verify(folder, trusted=True)`, run on the CPU of a child process.

    Raises:
      ExportError: as `verify`; the child crashed, or took more than `max_bytes` (None: half of the memory) or `max_seconds`;
        functions that do not run on a CPU.
    """
    if "cpu" not in platforms:
        raise ExportError(f"platforms: expected cpu, where a child process checks, got {platforms}; trusted=True runs here")
    limit = memory() // 2 if max_bytes is None else max_bytes
    order = {"folder": str(folder.absolute()), "tolerance": tolerance, "sha256": sha256, "max_bytes": max_bytes}
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    command = [sys.executable, "-I", "-c", START, str(Path(__file__).parent), json.dumps([order, limit, max_seconds]), *path]
    what = "functions: expected ones that a child process can read and run with the golden inputs"
    try:
        done = subprocess.run(
            command, env=os.environ | SETTINGS, stdin=subprocess.DEVNULL, capture_output=True, timeout=max_seconds
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"{what} in at most {max_seconds:g} s, got no end; max_seconds sets the limit") from None
    except OSError as error:
        raise ExportError(f"{what}, got no child process ({error}); trusted=True does without") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ExportError(f"{what} in at most {limit} bytes of memory, it died of {name}; max_bytes sets the limit")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        words = done.stderr.decode(errors="replace").strip()[-500:]
        raise ExportError(f"{what}, it ended with code {done.returncode}: {words}") from None
    if "error" in answer:
        raise ExportError(answer["error"])
    return answer


def run(text: str) -> None:
    """The child: takes its limits, verifies, prints the report or the error as JSON."""
    import jax

    from .model import verify

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
