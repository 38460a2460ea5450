"""Processes that are killed at work; a fork server that never ran JAX starts them."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tests import light

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.reliability.victims", "tests.stream_world"])


def compile_into(folder: str) -> None:
    """This process compiles lightly, and keeps its programs for those that go on where it is killed."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    light.install(always=True)


def killed_at(event: str, pattern: str, work: Callable[..., object], *arguments: Any) -> None:
    """Work of a `Life` that ends at the next audit event of that name with the pattern among its arguments."""

    def kill(name: str, given: tuple[Any, ...]) -> None:
        if name == event and pattern in str(given):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    work(*arguments)


class Life:
    """One process, from its start to its kill or its end: it runs `work(*arguments)`."""

    def __init__(self, work: Callable[..., None], *arguments: Any):
        self.process = CONTEXT.Process(target=work, args=arguments, daemon=True)  # it ends with the test that fails
        self.process.start()

    def await_word(self, log: Path, word: str, times: int = 1, *, after: int = 0) -> None:
        """Until the process has written a word so many times behind place `after` of a log, or has ended."""
        while self.process.is_alive() and not (log.exists() and log.read_text()[after:].count(word) >= times):
            time.sleep(0.002)

    def kill(self, *, after: float = 0.0) -> None:
        """SIGKILL after so many seconds, unless it ends before."""
        self.process.join(after)
        self.process.kill()

    def killed(self) -> bool:
        """Waits for its end; False where it did all its work, and an error where it failed."""
        self.process.join(300)
        code = self.process.exitcode
        self.process.close()
        assert code in (0, -signal.SIGKILL), f"a process failed: exit code {code}"
        return code != 0
