"""README and docs as they stand: every code block runs, every command exists and is run, every link leads somewhere."""

import contextlib
import importlib.util
import io
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest

import aif_jax
import aif_jax as aif
from tests import demo

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *DOCS]
SITE = ROOT / "docs" / "website" / "mkdocs.yml"
RUN_ELSEWHERE = {
    "pip": ".ci/run runs the README's test command in a fresh environment, and installs the wheel in another",
    "pytest": "it is what runs this",
    "mkdocs": "test_site_builds_without_warnings",
}
"""Modules of commands that no test runs by their name, and what runs them instead."""


def fences(page: Path, *languages: str) -> list[str]:
    """The contents of the page's fenced blocks in one of the languages, from top to bottom."""
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [body for language, body in blocks if language in languages]


def commands(page: Path) -> list[str]:
    """Command lines of a page: in shell blocks, and `python -m ...` in running text and tables."""
    lines = [line.removeprefix("$ ") for block in fences(page, "sh", "bash", "console") for line in block.splitlines()]
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    lines += re.findall(r"`(python -m [^`]+)`", text)
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def split(command: str) -> tuple[str, list[str]]:
    """The module of a `python -m` command and its arguments."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], f"expected `python -m ...`, got {command!r}"
    return words[2], words[3:]


def run(module: str, arguments: list[str]) -> tuple[int, str]:
    """Runs a module as `python -m` does, in this process, which has JAX ready; its exit code and what it printed."""
    printed, kept, code = io.StringIO(), sys.argv, 0
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # another test imported it
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = kept
    return code, printed.getvalue()


@pytest.mark.parametrize("page", [page for page in DOCS if fences(page, "python")], ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    """Blocks share their state from top to bottom; then the page's commands run beside the files that it made."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for block in fences(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)
    for command in [line for block in fences(page, "sh", "bash", "console") for line in block.splitlines()]:
        if not re.search(r"\b[A-Z]{3,}\b", command):  # no placeholder such as DIR
            code, printed = run(*split(command))
            assert code == 0, f"{command}: exit code {code}\n{printed}"


def test_readme_block_runs():
    config = aif.tiny()
    items = demo.items(config, 8)
    namespace = {"config": config, "user_features": demo.user(config), "items": items, "catalogue": items}
    (block,) = fences(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (8,) and np.isfinite(namespace["logits"]).all()


def test_your_own_data_takes_ten_lines():
    (block,) = [
        block for block in fences(ROOT / "docs" / "tutorial_own_data.md", "python") if "dataset = tabular.read" in block
    ]
    assert len([line for line in block.splitlines() if line]) <= 10


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_command_exists(command):
    """Its module is there, and its help knows every subcommand and flag that the page gives it."""
    module, arguments = split(command)
    flags = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    if module == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[([\w,]+)\]", command)) <= set(extras), command
        return
    if module in RUN_ELSEWHERE:
        return
    subcommands = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    for name in subcommands[0].split("|") if subcommands else [None]:
        code, text = run(module, [*([name] if name else []), "--help"])
        assert code == 0, command
        assert not [flag for flag in flags if not re.search(rf"{flag}\b", text)], f"{command}: its help is\n{text}"


def test_each_command_is_run_by_some_test():
    """The name of its module stands in a test file other than this one, or in the table of exceptions with its reason."""
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py")) if path != Path(__file__)}
    modules = {split(command)[0] for page in PAGES for command in commands(page)} - RUN_ELSEWHERE.keys()
    assert modules >= {"experiments.quickstart", "aif_jax", "aif_jax.index", "aif_jax.data"}
    for module in modules:
        package, _, name = module.rpartition(".")
        if (ROOT / module.replace(".", "/") / "__main__.py").is_file():
            spelling = rf"from {re.escape(module)}(\.__main__ import| import __main__)"
        else:
            spelling = rf"[\"']{re.escape(module)}[\"']|from {re.escape(package)} import [\w, ]*\b{name}\b"
        assert any(re.search(spelling, text) for text in texts.values()), f"no test runs {module}"


def test_the_scan_for_commands_finds_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `python -m a.b --c D`.\n\n```sh\n$ python -m d e && python -m f\n```\n\n```python\n`python -m no`\n```\n"
    )
    assert commands(page) == ["python -m d e", "python -m f", "python -m a.b --c D"]
    assert split("python -m a.b --c 'D E'") == ("a.b", ["--c", "D E"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_no_dead_link(page):
    """Relative links lead to a file that is there."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_paper_map_names_things_that_exist():
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path


def test_reference_lists_every_module_once():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    modules = {m.name for m in pkgutil.walk_packages(aif_jax.__path__, "aif_jax.") if not m.name.endswith("__main__")}
    assert len(listed) == len(set(listed))
    assert set(listed) == modules | {"aif_jax"}, "docs/api.md: add or remove `::: module`"


def test_every_page_is_on_the_front_page_and_in_the_site():
    front, site = (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), SITE.read_text(encoding="utf-8")
    for page in DOCS:
        assert page.name == "index.md" or f"({page.name})" in front, f"docs/index.md does not link to {page.name}"
        assert f": {page.name}" in site, f"{SITE.name}: the nav lacks {page.name}"


def test_the_picture_names_modules_that_exist():
    """Every box of the front page names its module."""
    (picture,) = fences(ROOT / "docs" / "index.md", "text", "")
    names = re.findall(r"\b([a-z_]+)\.(py|[a-z]\w+)\b|\b([a-z_]+)/", picture)
    assert len(names) > 15
    for module, rest, package in names:
        path = ROOT / "aif_jax" / (package or f"{module}.py")
        assert path.exists(), f"docs/index.md names {module or package}"
        if not package and rest != "py":
            assert hasattr(importlib.import_module(f"aif_jax.{module}"), rest), f"docs/index.md names {module}.{rest}"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra 'docs'; .ci/run builds the site too")
def test_site_builds_without_warnings(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice of its theme about a later MkDocs
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(SITE), "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="aif_jax.model.build"' in reference and "&gt;&gt;&gt; model = aif.build(aif.tiny())" in re.sub(
        r"<[^>]+>", "", reference
    )
