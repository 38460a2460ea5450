"""Each test is in one lane, the lanes together are the suite, and a run says what it left out."""

import ast
import asyncio
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from aif_jax.presets import PRESETS
from aif_jax.store import folders
from tests import demo, lanes
from tests.conftest import pytest_pyfunc_call
from tests.refusals import refused

ROOT = Path(__file__).resolve().parent.parent
LINES = [(line, lane) for lane, entries in lanes.TABLE.items() for line in entries]
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
USUAL = OPTIONS["addopts"][OPTIONS["addopts"].index("-m") + 1]
"""What `python -m pytest` runs without words."""


def functions(path: Path) -> set[str]:
    return {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_lines_name_tests_that_exist_and_each_changes_something():
    """A file, function or case that is renamed would leave its lane in silence."""
    assert set(lanes.CHIEF) <= set(demo.VARIANTS) and {"aif", "two_tower"} <= set(PRESETS)
    assert set(lanes.TABLE) <= set(lanes.LANES) - set(lanes.MARKED)
    names = [line for line, _ in LINES]
    assert len(names) == len(set(names))
    for line, lane in LINES:
        file, _, function = line.partition("[")[0].partition("::")
        assert (ROOT / file).is_dir() if file.endswith("/") else (ROOT / file).is_file(), line
        assert not function or function in functions(ROOT / file), f"{line}: no such test"
        wider = [other for other in names if other != line and line.startswith(other)]
        assert not wider or lanes.lane_of(max(wider, key=len)) != lane, f"{line}: {wider} has it in {lane} already"


def test_no_file_marks_a_lane_of_the_table():
    """So that a test is in one lane: those with a marker of MARKED, then those with a line, then the rest."""
    marks = re.compile(rf"mark\.({'|'.join(set(lanes.LANES) - set(lanes.MARKED))})\b")
    assert [path for path in (ROOT / "tests").rglob("*.py") if marks.search(path.read_text())] == []


def test_markers_are_known_without_the_tests_folder():
    """`python -m pytest aif_jax/metrics` reads pyproject.toml alone."""
    assert OPTIONS["markers"] == [f"{lane}: {meaning}" for lane, meaning in lanes.LANES.items()]


def test_no_test_of_the_default_lane_starts_an_interpreter():
    """Each costs seconds to import the package; the fixtures of `lanes.STARTERS` are told by their name."""
    found, texts = [], {path: path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    for path in [path for path, text in texts.items() if "mark.engines" not in text]:
        for node in ast.parse(texts[path]).body:
            name, code = f"{path.relative_to(ROOT).as_posix()}::{getattr(node, 'name', '')}", ast.unparse(node)
            if "::test_" in name and "sys.executable" in code and "subprocess" in code:
                found.append((name, lanes.lane_of(name)))
    assert len(found) > 5 and [name for name, lane in found if lane == lanes.DEFAULT] == []


def test_a_test_with_two_lanes_is_refused():
    with pytest.raises(ValueError, match="a.py::test_b: expected one lane, got the markers reliability and engines"):
        lanes.lane_of("a.py::test_b", marks=["engines", "reliability", "skip"])


@pytest.mark.parametrize(("test", "marks", "fixtures", "lane"), [
    ("tests/test_model.py::test_any", (), (), "default"),
    ("aif_jax/run.py::aif_jax.run.fit", (), (), "default"),
    ("tests/test_docs.py::test_page_runs[scale]", (), (), "docs"),
    ("tests/test_question.py::test_smoke", (), ("tmp_path",), "experiments"),
    ("tests/test_datasets.py::test_any", (), ("server",), "experiments"),
    ("tests/test_folders.py::test_any", (), ("python",), "standing"),
    ("tests/test_package.py::test_any", (), ("python",), "default"),
    ("tests/reliability/test_storm.py::test_storm", (), (), "standing"),
    ("tests/reliability/test_storm.py::test_storm", ("reliability",), (), "reliability"),
    ("tests/test_cli.py::test_a_process_whose_output_nobody_reads_ends_in_silence", (), (), "standing"),
    ("tests/test_cli.py::test_a_process_whose_output_nobody_reads_ends_in_silence_more", (), (), "default"),
    ("tests/test_cli.py::test_many_kills", ("reliability",), (), "reliability"),
    ("tests/promises/test_exported_equals_joint.py::test_exported_equals_joint[aif]", (), (), "default"),
    ("tests/promises/test_exported_equals_joint.py::test_exported_equals_joint[paper]", (), (), "standing"),
    ("tests/test_engines.py::test_any", ("engines", "filterwarnings"), (), "engines"),
])  # fmt: skip
def test_lane_of(test, marks, fixtures, lane):
    assert lanes.lane_of(test, marks=marks, fixtures=fixtures) == lane


def test_the_lanes_together_are_the_suite():
    """What pytest runs without words, what .ci/run adds on every change, and two lanes before a release."""
    assert lanes.left_out(USUAL) == [lane for lane in lanes.LANES if lane != lanes.DEFAULT]
    landing = lanes.command(lanes.LANDING)
    assert {lanes.DEFAULT, *lanes.LANDING, *lanes.MARKED} == set(lanes.LANES)
    for page in (".ci/run", "README.md", "docs/contributing.md"):
        assert landing in (ROOT / page).read_text(), f"{page}: expected {landing}"
    assert "pytest -m engines" in (ROOT / ".ci/run").read_text()
    assert "pytest -m reliability" in (ROOT / "docs/reliability.md").read_text()


def test_left_out():
    assert lanes.left_out("") == []
    assert lanes.left_out("not reliability and not engines") == ["reliability", "engines"]
    assert lanes.left_out("docs or experiments") == ["default", "standing", "reliability", "engines"]


def test_the_folder_is_named_by_versions_and_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = folders.compiled_folder("aif_jax-tests")
    assert here.parent == tmp_path / "aif_jax-tests"
    monkeypatch.setattr(folders.jaxlib, "__version__", "0.0.1")
    assert folders.compiled_folder("aif_jax-tests").name.startswith(f"jax-{folders.jax.__version__}-jaxlib-0.0.1-")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(folders, "cpu_features", lambda: "avx512f of another machine")
    assert folders.compiled_folder("aif_jax-tests") != here
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folders.compiled_folder("aif_jax-tests").parent == tmp_path / "home" / ".cache" / "aif_jax-tests"


def test_features_of_a_processor(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: x\nflags\t\t: fpu avx2\n\nmodel name\t: x\nflags\t\t: fpu avx2\n")
    assert folders.cpu_features(info) == "fpu avx2"
    assert folders.cpu_features(tmp_path / "none") == folders.platform.processor()


def test_what_no_run_used_goes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = folders.compiled_folder() / "program"
    other = tmp_path / "aif_jax" / "other" / "program"
    other.parent.mkdir()
    for age, stay in ((folders.DAYS - 1, True), (folders.DAYS + 1, False)):
        for path in (here, other):
            path.write_text("p")
            os.utime(path, (time.time() - age * 86_400,) * 2)
        assert folders.compiled_folder() == here.parent and here.exists() == other.exists() == stay


def test_commands_keep_compiled_programs(tmp_path):
    """In the user's cache folder; a folder of the user's choice stays, and one that cannot be written only warns."""
    code = "import jax; from aif_jax.cli import keep_compiled; print(keep_compiled(), jax.config.jax_compilation_cache_dir)"

    def run(**changes: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        return subprocess.run([sys.executable, "-c", code], env=kept | changes, capture_output=True, text=True, check=True)

    folder, setting = run(XDG_CACHE_HOME=str(tmp_path)).stdout.split()
    assert folder == setting and Path(folder).is_relative_to(tmp_path / "aif_jax") and Path(folder).is_dir()
    chosen = str(tmp_path / "mine")
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=chosen).stdout.split() == [chosen, chosen]
    (tmp_path / "file").write_text("")
    failed = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    way_out = r"a folder that can be written, got .*file/aif_jax/.*JAX_COMPILATION_CACHE_DIR=FOLDER"
    assert failed.stdout.split() == ["None", "None"] and re.search(way_out, failed.stderr)


async def awaited(tmp_path):
    await asyncio.sleep(0)
    (tmp_path / "ran").touch()
    raise LookupError("a test that fails")


def test_a_test_that_is_a_coroutine_runs_to_its_end(tmp_path):
    test = SimpleNamespace(obj=awaited, funcargs={"tmp_path": tmp_path, "another": 1})
    refused(LookupError, "a test that fails", pytest_pyfunc_call, test)
    assert (tmp_path / "ran").exists() and pytest_pyfunc_call(SimpleNamespace(obj=len)) is None
