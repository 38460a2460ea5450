"""Fixtures that several test files use."""

import functools
import gc
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import aif_jax as aif
from aif_jax.store import folders
from tests import demo, lanes, light, servers

ROOT = Path(__file__).resolve().parent.parent

CACHE = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
"""Every program is kept, however small."""
TORN = "Error reading persistent compilation cache entry"
"""JAX does not write an entry at one stroke: a process that reads half of one warns and compiles."""


def pytest_configure(config: pytest.Config) -> None:
    """Strict dtypes and ranks in every test; what one process or an earlier run has compiled the others need not compile."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if "AIF_JAX_COMPILED" not in os.environ:  # the workers inherit it
        try:
            os.environ["AIF_JAX_COMPILED"] = str(folders.compiled_folder("aif_jax-tests"))
        except OSError as error:
            raise pytest.UsageError(f"{error}, or AIF_JAX_COMPILED=FOLDER") from error
    CACHE["jax_compilation_cache_dir"] = os.environ["AIF_JAX_COMPILED"]
    for name, value in CACHE.items():
        jax.config.update(name, value)
    config.addinivalue_line("filterwarnings", f"ignore:{TORN}")
    light.install()
    config.pluginmanager.register(Compilation())


LONGEST = (
    "tests/test_docs.py::test_page_runs", "tests/test_docs.py::test_a_notebook_runs",
    "tests/test_docs.py::test_readme_block_runs", "tests/test_question.py::test_smoke", "tests/test_experiments.py",
    "tests/test_ranker_recall.py", "tests/test_scale_out_serving.py",
    "tests/test_several_processes.py", "tests/test_sharded_training.py",
    "tests/reliability/test_kills.py", "tests/reliability/test_road.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test gets its lane. The longest tests come first, so that no worker ends alone with one; then those that compile
    lightly, which share programs.
    """
    for item in items:
        item.add_marker(lanes.lane_of(item))
    items.sort(key=lambda item: (not item.nodeid.startswith(LONGEST), not is_light(item)))


SHIPPED = (
    "tests/promises/", "tests/reliability/", "tests/test_export", "tests/test_index", "tests/test_lanes.py",
    "tests/test_serving", "tests/test_service_memory.py", "tests/test_sharded_training.py",
    "tests/test_tier_histogram.py", "tests/test_writers.py",
)  # fmt: skip
"""Tests of what is shipped: equal bits, the hot path, exports, the form of the compiled program. All others compile lightly."""
LIGHT = (
    "tests/promises/test_adding_a_part.py", "tests/promises/test_one_encoding.py", "tests/reliability/test_kills.py",
    "tests/reliability/test_road.py",
)  # fmt: skip
LIGHT_PROGRAMS = pytest.StashKey[bool]()
"""Whether JAX's caches hold programs that were compiled lightly."""


def is_light(item: pytest.Item) -> bool:
    """Whether all programs of a test are compiled lightly."""
    return not item.nodeid.startswith(SHIPPED) or item.nodeid.startswith(LIGHT)


class Compilation:
    """A plugin, since hooks of this file are for tests of its folder, and the examples of the package are tests too."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """A test that compiles lightly is under `tests.light.lightly_compiled`, fixtures too; the next finds its programs."""
        if not is_light(item):
            return (yield)
        with light.lightly_compiled(keep=True):
            done = yield
        item.config.stash[LIGHT_PROGRAMS] = True
        return done


@pytest.hookimpl(tryfirst=True)  # before the fixtures of its module
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Programs that light modules share are dropped before a test of what is shipped."""
    if item.config.stash.get(LIGHT_PROGRAMS, False) and not is_light(item):
        jax.clear_caches()
        item.config.stash[LIGHT_PROGRAMS] = False


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine runs to its end; one that hangs fails."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    from tests.serving_world import run

    run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}))
    return True


@pytest.hookimpl(trylast=True)  # after the durations
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says which lanes the run left out."""
    if out := lanes.left_out(config.option.markexpr):
        terminalreporter.write_line(f"lanes left out: {', '.join(out)}; docs/contributing.md has the commands that run them")


def child_environment(flags: str | None = None) -> dict[str, str]:
    """The environment of a process that a test starts: it shares what was compiled, and warnings are errors.

    Without `flags` of XLA it compiles lightly.
    """
    return {
        **os.environ,
        **{name.upper(): str(value) for name, value in CACHE.items()},
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {light.flags() if flags is None else flags}".strip(),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": f"error,ignore:{TORN}",
    }


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported and collected stays, so the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A test that sets up logging, as `aif-jax serve` does, leaves no handler and no level to the next one."""
    ours, root = logging.getLogger("aif_jax"), logging.root
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    if (root.level, ours.level) != levels:
        logging.captureWarnings(False)
        root.handlers = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


@pytest.fixture
def programs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies drop programs after each model, as they run for days; small ones find those of their other models again."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


@pytest.fixture
def lightly() -> Iterator[None]:
    """Compiles lightly for a test of numbers whose file tests what is shipped."""
    with light.lightly_compiled():
        yield


@pytest.fixture(scope="session")
def data() -> aif.Dataset:
    """30 users with 40 events each on 90 items, for modules without data of their own; no test changes it."""
    from experiments.datasets.synthetic import synthetic_world

    return synthetic_world(0, users=30, items=90, topics=12, categories=8, events_per_user=40, lag=8, content_dim=12).dataset


@pytest.fixture(scope="session")
def small(data: aif.Dataset) -> aif.PreRanker:
    """A model of `data` that compiles fast."""
    return aif.build(demo.config(schema=data.schema, **demo.SMALL))


@pytest.fixture(scope="session")
def run(data: aif.Dataset, small: aif.PreRanker, tmp_path_factory: pytest.TempPathFactory) -> aif.Run:
    """A run of `small` by `demo.FIT` in a folder of its own, for modules that compile lightly; no test changes either."""
    with light.lightly_compiled(keep=True):  # a test of what is shipped may be the first to ask for it
        return demo.fit(small, data, out=tmp_path_factory.mktemp("fit") / "run", **demo.FIT)


@pytest.fixture(scope="module")
def world() -> Any:
    """`tests.serving_world.shared()`: what engines need, made once in a process; no test changes it."""
    from tests.serving_world import shared

    return shared()


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The URL of a Valkey server, one for all tests of a process; each writes keys of its own, or empties the server first."""
    with servers.valkey() as url:
        yield url


@pytest.fixture(scope="session")
def kafka_address() -> Iterator[str]:
    """The address of a Kafka broker, one for all tests of a process; each has topics of its own."""
    with servers.kafka() as address:
        yield address


@pytest.fixture(params=["disk", "s3"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """`open_store(**options)` is a snapshot store that is empty at first, the same one at each call: on a disk, and in S3."""
    from aif_jax.connectors import SnapshotStore

    if request.param == "disk":
        return functools.partial(SnapshotStore, str(tmp_path / "store"))
    return functools.partial(SnapshotStore, f"s3://bucket/{tmp_path.name}", **request.getfixturevalue("bucket"))


@pytest.fixture(scope="session")
def bucket() -> Iterator[dict[str, Any]]:
    """Options of an S3 server, one for all tests of a process; each writes below a name of its own."""
    with servers.s3() as options:
        yield options


@pytest.fixture
def python() -> Callable[..., str]:
    """Runs code in a process of its own, for what must be fixed before JAX starts, such as devices; gives what it printed."""

    def run(code: str, *, devices: int = 1, expect: int = 0, timeout: int = 120, lightly: bool = False, env: Any = None) -> str:
        flags = f"--xla_force_host_platform_device_count={devices} {light.flags() if lightly else ''}"
        environment = {**child_environment(flags), **(env or {})}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True
        )
        assert done.returncode == expect, f"exit {done.returncode}, expected {expect}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
