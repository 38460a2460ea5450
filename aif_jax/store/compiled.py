"""Compiled programs that are kept on disk: the next process loads what this one compiled.

The commands of `aif-jax` use it, a library call never does. Programs stand in the user's cache folder, apart for each version
of JAX and each kind of processor. `JAX_COMPILATION_CACHE_DIR` names another folder; `JAX_ENABLE_COMPILATION_CACHE=false` keeps
none.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import time
from pathlib import Path

import jax
import jaxlib

DAYS = 14
"""Programs that no run read for so long are removed, and folders of other versions or machines that no run used."""
logger = logging.getLogger(__name__)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What a compiled program may rely on: the processor's features, or its name where the system lists no features."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()


def kept_folder(name: str = "aif_jax") -> Path:
    """The folder for this JAX on this machine, in the folder `name` of the user's cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    features = hashlib.sha256(cpu_features().encode()).hexdigest()[:8]
    return cache / name / f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{platform.machine()}-{features}"  # pyright: ignore[reportPrivateImportUsage]


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
    """Makes the folder and prunes it. Raises OSError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # in use, although a run may write nothing new
        prune(folder)
    except OSError as error:
        got = f"{folder} ({error}). Name another: JAX_COMPILATION_CACHE_DIR=FOLDER"
        raise OSError(f"compiled programs: expected a folder that can be written, got {got}") from error
    return folder


def keep() -> Path | None:
    """Lets JAX keep and load compiled programs in this process, in the folder that is set already or in `kept_folder()`.

    Returns:
      The folder; None where it cannot be written, which a warning says: programs are then compiled again.
    """
    if (chosen := getattr(jax.config, "jax_compilation_cache_dir", None)) is not None:
        return Path(chosen)
    try:
        folder = prepare(kept_folder())
    except OSError as error:
        logger.warning("%s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder
