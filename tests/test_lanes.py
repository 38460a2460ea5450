"""How the tests run: each is in one lane, the lanes together are the suite; and what is compiled lightly."""

import ast
import asyncio
import tomllib
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tests import conftest, lanes, light
from tests.conftest import pytest_pyfunc_call
from tests.refusals import refused

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
USUAL = OPTIONS["addopts"][OPTIONS["addopts"].index("-m") + 1]
"""What `python -m pytest` runs without words."""


def test_no_test_of_the_default_lane_starts_an_interpreter():
    """Each costs seconds to import the package; those with the fixture `python` are told by it."""
    starting, unmarked = [], []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        module = ast.parse(path.read_text())
        for node in module.body:
            code = ast.unparse(node)
            if getattr(node, "name", "").startswith("test_") and "sys.executable" in code and "subprocess" in code:
                starting.append(node.name)
                unmarked += [] if "mark.lane(" in code or "\npytestmark" in ast.unparse(module) else [node.name]
    assert len(starting) > 5 and unmarked == []


@pytest.mark.parametrize("lane", lanes.but_for(["default"], ["default", "standing"]))
def test_a_test_gets_one_lane(request, lane):
    assert [mark.name for mark in request.node.iter_markers() if mark.name in lanes.LANES] == [lane]
    assert lanes.lane_of(SimpleNamespace(get_closest_marker={}.get, fixturenames=["tmp_path", "python"])) == "standing"


def test_the_lanes_together_are_the_suite():
    """What pytest runs without words, what .ci/run adds on every change, and two lanes before a release."""
    assert OPTIONS["markers"][1:] == [f"{lane}: {meaning}" for lane, meaning in lanes.LANES.items()]  # without this folder
    assert lanes.left_out(USUAL) == [lane for lane in lanes.LANES if lane != lanes.DEFAULT]
    for page in (".ci/run", "README.md", "docs/contributing.md"):
        assert 'python -m pytest -m "docs or experiments or standing"' in (ROOT / page).read_text(), page
    assert "pytest -m engines" in (ROOT / ".ci/run").read_text()
    assert "pytest -m reliability" in (ROOT / "docs/reliability.md").read_text()
    assert lanes.left_out("") == []
    assert lanes.left_out("not reliability and not engines") == ["reliability", "engines"]
    assert lanes.left_out("docs or experiments") == ["default", "standing", "reliability", "engines"]


def test_a_test_that_is_a_coroutine_runs_to_its_end(tmp_path):
    async def awaited(tmp_path):
        await asyncio.sleep(0)
        (tmp_path / "ran").touch()
        raise LookupError("a test that fails")

    test = SimpleNamespace(obj=awaited, funcargs={"tmp_path": tmp_path, "another": 1})
    refused(LookupError, "a test that fails", pytest_pyfunc_call, test)
    assert (tmp_path / "ran").exists() and pytest_pyfunc_call(SimpleNamespace(obj=len)) is None


def test_an_option_that_this_xla_lacks_is_left_out(monkeypatch):
    level = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(light, "WANTED", {**level, "xla_no_such_option": True})
    assert light.options.__wrapped__() == level
    monkeypatch.setattr(light, "WANTED", {"xla_backend_optimization_level": "many"})
    refused(jax.errors.JaxRuntimeError, "many", light.options.__wrapped__)


def test_what_is_compiled_inside_is_compiled_with_the_options(monkeypatch):
    monkeypatch.setattr(light, "options", lambda: {"xla_no_such_option": True})
    with light.lightly_compiled(), pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        jax.jit(lambda x: x * 3 - 1)(2.0)


def test_light_modules_share_programs_and_a_test_of_what_is_shipped_does_not(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    config = types.SimpleNamespace(stash={})
    files = "tests/test_serving.py", "tests/test_fit.py"
    shipped, lightly = (types.SimpleNamespace(config=config, nodeid=f"{file}::test") for file in files)
    with light.lightly_compiled(keep=True):
        pass
    conftest.pytest_runtest_setup(shipped)
    assert cleared == []
    for item in (shipped, types.SimpleNamespace(config=config, nodeid="aif_jax/run.py::aif_jax.run.fit")):
        around, before = conftest.Compilation().pytest_runtest_protocol(item), light._open
        next(around)
        assert light._open - before == (item is not shipped)  # the examples of the package compile lightly
        assert next(around, None) is None and light._open == before
        assert (conftest.LIGHT_PROGRAMS in config.stash) == (item is not shipped)
    conftest.pytest_runtest_setup(lightly)
    assert cleared == []
    conftest.pytest_runtest_setup(shipped)
    conftest.pytest_runtest_setup(shipped)
    assert cleared == [1]
    with light.lightly_compiled():
        pass
    assert cleared == [1, 1]
