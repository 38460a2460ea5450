"""The folder of compiled programs that test runs share and keep: a second run compiles what changed and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import time
from pathlib import Path

import jax
import jaxlib

DAYS = 14
"""Programs that no run read for so long are removed, and folders of other versions or machines that no run used."""


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What a compiled program may rely on: the processor's features, or its name where the system lists no features."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()


def kept_folder() -> Path:
    """The folder for this JAX on this machine, in the user's cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    features = hashlib.sha256(cpu_features().encode()).hexdigest()[:8]
    return cache / "aif_jax-tests" / f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{platform.machine()}-{features}"


def prune(folder: Path, *, now: float | None = None) -> None:
    """Removes programs and neighbouring folders that were not read or written for DAYS; other runs may do the same now."""
    oldest = (time.time() if now is None else now) - DAYS * 86_400

    def used(path: Path) -> float:
        status = path.stat()
        return max(status.st_atime, status.st_mtime)

    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run was faster
            if path.is_file() and used(path) < oldest:
                path.unlink()
    for other in folder.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if other != folder and other.is_dir() and other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)


def prepare(folder: Path) -> Path:
    """Makes the folder and prunes it.

    Raises:
      OSError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # in use, although a run may write nothing new
        prune(folder)
    except OSError as error:
        raise OSError(
            f"compiled programs: expected a folder that can be written, got {folder} ({error}). "
            "Name another: AIF_JAX_COMPILED=FOLDER python -m pytest"
        ) from error
    return folder
