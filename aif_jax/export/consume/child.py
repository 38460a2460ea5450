"""Checks a folder in a child process with limits of memory and time: what its functions do cannot harm this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .files import ExportError, memory

# This very package, imported by its path: neither the folder, nor the working directory, nor other packages are imported.
START = """
import importlib.util, sys
home, order, *sys.path[:] = sys.argv[1:]
spec = importlib.util.spec_from_file_location("consume", home + "/__init__.py", submodule_search_locations=[home])
sys.modules["consume"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
importlib.import_module("consume.within").run(order)
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
