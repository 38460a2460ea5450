"""Fixtures that several test files use."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import aif_jax as aif
from aif_jax.types import Params
from tests import demo

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Strict dtypes and ranks in every test; what one worker of a run compiles the others need not compile again."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / f"aif_jax-compiled-{run}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_report_header() -> str:
    """The seeds of tests that draw at random, so that a failure can be repeated."""
    return "seeds: fixed in each test; hypothesis prints how to reproduce a failure"


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """`getkey()` gives a new typed random key at each call, the same ones in every run."""
    state = jax.random.key(2511)

    def draw() -> jax.Array:
        nonlocal state
        state, key = jax.random.split(state)
        return key

    return draw


@pytest.fixture(scope="session")
def tiny_model() -> tuple[aif.PreRanker, Params]:
    """`(model, params)` with every approximation at a small size, initialised once for all tests."""
    return demo.build()


@pytest.fixture
def data_dir() -> Callable[[str], Path]:
    """`data_dir(name)` is the folder of a real data set; the test is skipped where it is not at hand."""
    roots = [Path(os.environ["AIF_JAX_DATA"])] if "AIF_JAX_DATA" in os.environ else [ROOT.parent / "shared" / "data"]

    def find(name: str) -> Path:
        for root in roots:
            if (root / name).is_dir():
                return root / name
        pytest.skip(f"real data {name!r} is not in {roots[0]}; AIF_JAX_DATA can name the folder that holds it")

    return find


@pytest.fixture
def python() -> Callable[..., str]:
    """`python(code, *, devices=1, expect=0)` runs code in a process of its own and returns what it printed.

    For what must be fixed before JAX starts: the number of devices, what is imported, a process that dies. Warnings are errors
    there too.
    """

    def run(code: str, *, devices: int = 1, expect: int = 0, timeout: float = 120, env: dict[str, str] | None = None) -> str:
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **(env or {})}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True
        )
        assert done.returncode == expect, f"exit {done.returncode}, expected {expect}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
