"""Each test is in one lane, the lanes together are the suite, and a run says what it left out."""

import ast
import asyncio
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import lanes
from tests.conftest import pytest_pyfunc_call
from tests.refusals import refused

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
USUAL = OPTIONS["addopts"][OPTIONS["addopts"].index("-m") + 1]
"""What `python -m pytest` runs without words."""


def test_markers_are_known_without_the_tests_folder():
    """`python -m pytest aif_jax/metrics` reads pyproject.toml alone."""
    assert OPTIONS["markers"][1:] == [f"{lane}: {meaning}" for lane, meaning in lanes.LANES.items()]


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
    unmarked = SimpleNamespace(get_closest_marker={}.get, fixturenames=["tmp_path", "python"])
    assert lanes.lane_of(unmarked) == "standing"


def test_the_lanes_together_are_the_suite():
    """What pytest runs without words, what .ci/run adds on every change, and two lanes before a release."""
    assert lanes.left_out(USUAL) == [lane for lane in lanes.LANES if lane != lanes.DEFAULT]
    for page in (".ci/run", "README.md", "docs/contributing.md"):
        assert 'python -m pytest -m "docs or experiments or standing"' in (ROOT / page).read_text(), page
    assert "pytest -m engines" in (ROOT / ".ci/run").read_text()
    assert "pytest -m reliability" in (ROOT / "docs/reliability.md").read_text()


def test_left_out():
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
