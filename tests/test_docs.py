"""README and docs: every code block runs, every command exists and is run, every link leads somewhere, words are plain."""

import ast
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tokenize
import tomllib
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.cli import doctor
from tests import service_world
from tests.test_datasets import release

pytestmark = pytest.mark.lane("docs")
ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *DOCS]
SITE = ROOT / "docs" / "website" / "mkdocs.yml"
OWN_DATA = ROOT / "docs" / "tutorial_own_data.md"
RUN_ELSEWHERE = {
    "pip": ".ci/run runs the README's test command in a fresh environment, and installs the wheel in another",
    "pytest": "it is what runs this",
    "mkdocs": "test_site_builds_without_warnings",
    "ruff": ".ci/run",
    "pyright": ".ci/run",
}
"""Modules of commands that no test runs by their name, and what runs them instead."""
PRINTED = {"scale_training": r"^[1-9]\d* steps"}
"""What a page prints that its text relies on, number by number."""
SHOW_OUTPUTS = re.compile(r"tutorial_|connectors|which_config|scale|how_to_join")
"""Pages that show everything that they print; an HTML comment before the fence leaves one output unchecked."""
NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d*)?(?:e[-+]?\d+)?"
FACE = {"aif": "aif_jax", "columns": "Columns", "data": "Dataset", "model": "PreRanker", "run": "Run", "index": "ItemIndex"}
FACE |= {"engine": "AsyncPreRanker"}
"""What a page calls the package, and objects of it; the attributes of these are names that a user must learn."""
MOST_NAMES = 14
MOST_WORDS = 20000
DIALECT = re.compile(
    r"one's own|octaves?|survival|touched[- ]rows?|stands? on|stand for|asked once|of (its|their) own|passed over|beside|arms?"
    r"|bench|stretches of the history|anew|besides|at hand|mended|goes along|dear(er|est)|hops?|a way in",
    re.I,
)
"""Words that a reader would have to learn, because only this package used them so."""


def fences(page: Path, *languages: str) -> list[str]:
    """The contents of the page's fenced blocks in one of the languages, from top to bottom."""
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [body for language, body in blocks if language in languages]


def blocks_and_outputs(page: Path) -> list[tuple[str, str | None]]:
    """Its Python blocks, each with the text block that follows it at once: what it prints. None: shown, but not checked."""
    fence = r"^```python\n(.*?)^```\n(?:\n*(<!-- output not checked -->\n+)?```text\n(.*?)^```$)?"
    found = re.findall(fence, page.read_text(encoding="utf-8"), re.S | re.M)
    return [(block, None if unchecked else output) for block, unchecked, output in found]


def fits(shown: str, printed: str) -> bool:
    """Line by line the same, but for the numbers, the width of gaps, and `...`, which is any text."""

    def loose(text: str) -> str:
        text = re.sub(rf" *{NUMBER} *", " # ", text)
        return re.sub(r" +", " ", "\n".join(line.rstrip() for line in text.rstrip().splitlines()))

    pattern = re.sub(r"(?:\\ )?\\\.\\\.\\\.(?:\\ )?", ".*", re.escape(loose(shown)))  # no text needs no gap
    return re.fullmatch(pattern, loose(printed), re.S) is not None


def shell_lines(page: Path) -> list[str]:
    return [line.removeprefix("$ ") for block in fences(page, "sh", "bash", "console") for line in block.splitlines() if line]


def commands(page: Path) -> list[str]:
    """Command lines of a page: in shell blocks, and `python -m ...` or `aif-jax ...` in running text and tables."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    lines = shell_lines(page) + re.findall(r"`((?:python -m|aif-jax) [^`]+)`", text)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if not re.match(r"pip |python -m [\w.]*NAME", part)]


def split(command: str) -> tuple[str, list[str]]:
    """The module of a command and its arguments; `aif-jax` is `python -m aif_jax`."""
    words = shlex.split(command)
    if words[0] == "aif-jax":
        return "aif_jax", words[1:]
    assert words[:2] == ["python", "-m"], f"expected `python -m ...` or `aif-jax ...`, got {command!r}"
    return words[2], words[3:]


def run(module: str, arguments: list[str]) -> tuple[int, str]:
    """Runs a module as `python -m` does, in this process, which has JAX ready; its exit code and what it printed."""
    printed, before, code = io.StringIO(), sys.argv, 0
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # another test imported it
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, printed.getvalue()


@pytest.mark.parametrize("page", [page for page in DOCS if fences(page, "python")], ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    """Blocks share their state from top to bottom; then the page's commands run where its files are."""
    monkeypatch.chdir(tmp_path)
    namespace, printed = {"__name__": "page"}, ""
    for block, shown in blocks_and_outputs(page):
        exec(compile(block, str(page), "exec"), namespace)
        output = capsys.readouterr().out
        if shown or (shown is not None and SHOW_OUTPUTS.match(page.stem)):
            assert fits(shown, output), f"{page.name} shows\n{shown}\nand its block prints\n{output}\n{block}"
        printed += output
    assert re.search(PRINTED.get(page.stem, ""), printed)
    for command in shell_lines(page):
        if not re.search(r"\b[A-Z]{3,}\b|^pip ", command):  # no placeholder such as DIR
            code, printed = run(*split(command))
            assert code == 0, f"{command}: exit code {code}\n{printed}"
    for script in re.findall(r"\((clients/python/\w+\.py)\)", page.read_text(encoding="utf-8")):
        runpy.run_path(str(page.parent / script))
    namespace.clear()
    gc.collect()  # a client of tritonclient ends in the thread that made it


def test_the_join_of_outcomes_counts_each_candidate_of_each_call_once(tmp_path, monkeypatch):
    """The call `a` was tried again in the second of `b` and `c`, of which one counts; each names a candidate twice."""
    monkeypatch.chdir(tmp_path)
    (statement,) = re.findall(r'^joined = """\n(.*?)"""', (ROOT / "docs" / "how_to_join_outcomes.md").read_text(), re.S | re.M)
    lists = "[10] AS ids, [10, 11, 10, 12] AS candidates, [12] AS exclude"
    common = f"""'"ann"' AS user, {lists}, 'rank' AS method, false AS degraded"""
    calls = f"SELECT *, {common} FROM (VALUES ('a', 100.2), ('a', 200.1), ('b', 200.5), ('c', 200.9)) AS call(id, time)"
    database = pytest.importorskip("duckdb").connect()
    (tmp_path / "log").mkdir()
    database.execute(f"COPY ({calls}) TO 'log/calls.parquet'")
    database.execute("COPY (SELECT 'b' AS request, 11 AS item, 300 AS time) TO 'clicks.parquet'")
    database.execute(statement, {"window": 1800, "complete": 9999})
    joined = database.sql("SELECT user, time, item, shown, clicked FROM joined ORDER BY time, item").fetchall()
    expected = (100, 10, True, False), (100, 11, False, False), (200, 10, True, False), (200, 11, False, True)
    assert joined == [("ann", *row) for row in expected]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page):
    assert [block for block, _ in blocks_and_outputs(page)] == fences(page, "python")


def test_outputs_are_compared(tmp_path):
    page, block = tmp_path / "page.md", "```python\nprint(1)\n```\n"
    one, two, three = (f"```text\n{number}\n```\n" for number in (1, 2, 3))
    page.write_text(f"{block}\n{one}\n{block}Then\n\n{two}{block}\n<!-- output not checked -->\n{three}")
    assert blocks_and_outputs(page) == [("print(1)\n", "1\n"), ("print(1)\n", ""), ("print(1)\n", None)]
    assert fits("auc 0.91 [0.8, 1.0]\nversion ...\n", "auc 0.7321 [ 0.71, -12,345.6]\nversion 3fa\n")
    assert fits("", "") and fits("[1 2]\n", "[10 1e-05]\n") and fits("[0.52 0.5]\n", "[0.53223 0.5   ]\n")
    wrong = ("auc 0.91\n", "auc nan\n"), ("1\n", "1\n2\n"), ("1\n2\n", "1\n"), ("", "1\n"), ("1\n", ""), ("a b\n", "a c\n")
    assert not [case for case in wrong if fits(*case)]


def test_readme_block_runs(capsys):
    (block,) = fences(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), {"__name__": "page"})
    gauc, items, categories = re.findall(r"(?:GAUC|items|categories) \[?([\d. ]+)", capsys.readouterr().out.splitlines()[-1])
    assert float(gauc) > 0.7 and len(set(items.split())) == 5 and categories.split().count("7") >= 4  # what user 7 prefers


def test_readme_is_read_in_a_few_minutes_and_the_pages_do_not_grow():
    """Words of the pages of docs/, code included; references are looked up, not read."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120 and len(text.split()) <= 1450
    assert "GPU: never run" in text[: text.index("## Results")] and len(re.findall(r"^\| ---", text, re.M)) == 2
    read = [page for page in DOCS if not page.name.startswith("reference_") and page.name not in ("api.md", "glossary.md")]
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in read) <= MOST_WORDS


def attributes(code: str) -> set[str]:
    """Dotted names in code, such as `aif.presets.aif`, without those that a longer one begins with."""
    nodes = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    names = {name for name in nodes if re.fullmatch(r"[\w.]+", name)}
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def names_of_the_package(page: Path) -> set[str]:
    """Distinct `aif.X`, `aif.X.Y`, `run.X`, ... in the page's blocks."""
    names = [name.split(".") for name in attributes("\n".join(fences(page, "python")))]
    return {".".join(parts if parts[0] == "aif" else parts[:2]) for parts in names if parts[0] in FACE}


def test_own_data_takes_fourteen_names():
    names = names_of_the_package(OWN_DATA)
    assert {"aif.read", "aif.fit", "run.encoder", "run.index", "run.serve", "engine.rank", "run.export"} <= names
    assert len(names) <= MOST_NAMES, sorted(names)


def small_movielens(folder: Path) -> Path:
    """Ratings of 30 users in the layout of the MovieLens releases; each prefers one genre."""
    rng, genres = np.random.default_rng(0), ("Drama", "Comedy|Romance", "Crime", "(no genres listed)")
    ratings = []
    for user in range(1, 31):
        rated = sorted(rng.choice(np.arange(1, 121), 40, replace=False), key=lambda item: item % 4 != user % 4)  # noqa: B023
        ratings += [(user, item, rng.integers(1, 11) / 2, 10**9 + 1000 * place + user) for place, item in enumerate(rated)]
    return release(folder, ratings, {item: (f"Film {item} ({1950 + item % 60})", genres[item % 4]) for item in range(1, 121)})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """Every cell, with less data: outputs of the stored kinds, and of generated data the stored text but for the numbers."""
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.setenv("MOVIELENS", str(small_movielens(tmp_path / "movielens")))
    text = path.read_text(encoding="utf-8")
    if path.stem == "own_block":
        assert "= 150, 400, 8, 60" in text
        text = text.replace("= 150, 400, 8, 60", "= 12, 60, 4, 40")
    stored = json.loads(text)
    pairs = zip(stored["cells"], website("notebooks").run(stored)["cells"], strict=True)
    for before, after in pairs:
        old, new = before.get("outputs", []), after.get("outputs", [])
        assert [output["output_type"] for output in old] == [output["output_type"] for output in new], before["source"]
        for shown, made in zip(old, new, strict=True):
            if path.stem == "own_block" and "text" in shown:
                assert fits("".join(shown["text"]), "".join(made["text"]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_what_it_printed(path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    codes = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < 200_000 and stored["nbformat"] == 4
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1)), "run docs/website/notebooks.py"
    page = website("notebooks").page(stored, path.stem)
    images = sum("image/png" in output.get("data", {}) for cell in codes for output in cell["outputs"])
    assert page.count('<img alt="') == images > 0
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    assert f"(notebooks/{path.name})" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert f": notebooks/{path.stem}.md" in SITE.read_text(encoding="utf-8")


NEXT = {re.split("  +", line.strip())[0] for line in doctor.NEXT.splitlines()[1:]}
"""What `aif-jax doctor` says to run next."""


@pytest.mark.parametrize("command", sorted(NEXT.union(*map(commands, PAGES))))
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
    first = next((at for at, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    subcommands = [word for word in arguments[:first] if re.fullmatch(r"[a-z|]+", word)]
    for name in subcommands[0].split("|") if subcommands else [None]:
        code, text = run(module, [*([name, *subcommands[1:]] if name else []), "--help"])
        assert code == 0, f"{command}\n{text}"
        assert not [flag for flag in flags if not re.search(rf"{flag}\b", text)], f"{command}: its help is\n{text}"


def test_each_command_is_run_by_some_test():
    """The name of its module is in a test file other than this one, or in the table of exceptions with its reason."""
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py")) if path != Path(__file__)}
    modules = {split(command)[0] for page in PAGES for command in commands(page)} - RUN_ELSEWHERE.keys()
    assert modules >= {"experiments.quickstart", "aif_jax"}
    for module in modules:
        package, _, name = module.rpartition(".")
        spelling = rf"[\"']{re.escape(module)}[\"']|from {re.escape(package)} import ([\w, ]*|\([\w,\s]*)\b{name}\b"
        if module == "aif_jax":
            spelling = r"\bcli\.main\("
        elif (ROOT / module.replace(".", "/") / "__main__.py").is_file():
            spelling = rf"from {re.escape(module)}(\.__main__ import| import __main__)"
        assert any(re.search(spelling, text) for text in texts.values()), f"no test runs {module}"


def test_curl_lines_of_the_reference_are_answered():
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    blocks = [body for body in fences(ROOT / "docs" / "reference_http.md", "text") if body.startswith("curl")]
    with service_world.running(service_world.exports().root / "one") as served:
        address = served.addresses["http"]
        lines = [line for block in blocks for line in re.split(r"\n(?=curl)", block.strip())]
        calls = [shlex.split(line.replace("http://127.0.0.1:8080", address)) for line in lines]
        answered = [subprocess.run(call, capture_output=True, check=True, text=True).stdout for call in calls]
    assert len(answered) == 11
    ranked, error = json.loads(answered[0]), json.loads(answered[-1])["error"]
    assert len(ranked["ids"]) == 2 and not ranked["degraded"] and {"version", "stages", "scores"} <= ranked.keys()
    assert json.loads(answered[1])["mask"] == [True, True] and not json.loads(answered[3])["degraded"]
    assert json.loads(answered[6])["ready"] and "aif_stage_seconds_bucket" in answered[8]
    page = (ROOT / "docs" / "reference_http.md").read_text(encoding="utf-8")
    served = set(re.findall(r"^# TYPE (aif_\w+) (?:counter|gauge|histogram)", answered[8], re.M))
    assert len(served) > 30 and served - told_metrics(served) == set()
    assert error["message"] in page and error["field"] == "k"


def told_metrics(names: set[str]) -> set[str]:
    """Those metrics that the table of the HTTP reference has, in which `*` is any end."""
    table = (ROOT / "docs" / "reference_http.md").read_text(encoding="utf-8").partition("## Alerts")[0]
    told = "|".join(name.replace("*", "[a-z_]+") for name in re.findall(r"`(aif_[a-z_*]+)[`{]", table))
    return {name for name in names if re.fullmatch(told, re.sub("_(bucket|count)$", "", name))}


def test_deployment_files_and_alerts_fit_the_commands_and_metrics():
    alerts = (ROOT / "docs" / "reference_http.md").read_text(encoding="utf-8").partition("## Alerts")[2]
    alerting = set(re.findall(r"`(aif_\w+)[`{]", alerts))
    assert len(alerting) > 20 and alerting - told_metrics(alerting) == set()
    yaml = pytest.importorskip("yaml")
    for name in ("service.yaml", "cronjob.yaml"):
        documents = list(yaml.safe_load_all((ROOT / "docs" / "deploy" / name).read_text(encoding="utf-8")))
        assert all({"apiVersion", "kind", "metadata", "spec"} <= document.keys() for document in documents)
        pod = documents[0]["spec"].get("jobTemplate", documents[0])["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        program, command = container["command"]
        help_text = run("aif_jax", [command, "--help"])[1]
        flags = [word.split("=")[0] for word in container["args"] if word.startswith("--")]
        assert program == "aif-jax" and flags and not [flag for flag in flags if flag not in help_text]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    board = json.loads((ROOT / "docs" / "deploy" / "dashboard.json").read_text(encoding="utf-8"))
    used = {name for panel in board["panels"] for target in panel["targets"] for name in re.findall(r"aif_\w+", target["expr"])}
    assert len(board["panels"]) == 10 and used - told_metrics(used) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_no_dead_link(page):
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if not target.startswith(("https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
            to = page.parent / target if target else page
            assert not anchor or to.suffix != ".md" or leads_somewhere(to, anchor), f"{page.name} links to {link}"


def leads_somewhere(page: Path, anchor: str) -> bool:
    """Whether a heading of the page, or a name of the reference or an attribute of one, has the anchor."""
    if page.name == "api.md" and anchor.startswith("aif_jax"):
        entries = set(reference_entries())
        return anchor in entries or anchor.rpartition(".")[0] in entries
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.*)", text, re.M)]
    return anchor in {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_the_map_of_the_paper_and_the_picture_name_what_exists():
    paths = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8"))
    assert paths and [path for path in paths if not (ROOT / path).is_file()] == []
    (picture,) = [block for block in fences(ROOT / "docs" / "how_it_works.md", "text", "") if "interaction.py" in block]
    names = ["".join(found) for found in re.findall(r"\b([a-z_]+\.py)\b|\b([a-z_]+)/", picture)]
    assert len(names) > 15
    assert [name for name in names if not any((ROOT / "aif_jax" / room / name).exists() for room in ("", "blocks"))] == []


def public(module: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every public name of a package and of what it names, with its value; a module without `__all__` is one name."""
    for name in module.__all__:
        value = getattr(module, name)
        if name == "__version__":
            continue
        if isinstance(value, types.ModuleType) and hasattr(value, "__all__") and value is not aif.train.losses:
            yield from public(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value


def reference_entries() -> list[str]:
    return website("entries").names((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))


def test_reference_lists_every_public_name_once():
    """Each under one of its public names; what is not reachable from `aif` is there because a page imports it by path."""
    listed, names = reference_entries(), dict(public(aif, "aif_jax"))
    used, texts = {name for page in DOCS for name in used_by(page)}, "".join(page.read_text() for page in DOCS)
    by_path = [name for name in listed if name not in names and name not in used]
    unused = [name for name in by_path if f"{'.'.join(name.split('.')[-2:])}(" not in texts]
    assert unused == [], "docs/api.md lists names that no page uses"
    by_value: dict[int, set[str]] = {}
    for name, value in names.items():
        by_value.setdefault(id(value), set()).add(name)
    for same in by_value.values():
        assert len(same.intersection(listed)) == len([name for name in listed if name in same]) >= 1, f"list once: {same}"
        classes = {type(names[name]) for name in same}
        assert len(same.intersection(listed)) == 1 or classes <= {str, int, tuple}, f"list once: {same}"


def used_by(page: Path) -> set[str]:
    """Full names of what the page's code takes from the package: `aif_jax.train.losses.pointwise_bce`."""
    alias, names = {"aif": "aif_jax"}, set()
    for code in fences(page, "python", "text", ""):
        with contextlib.suppress(SyntaxError):
            names |= attributes(code)
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aif_jax"):
                    alias |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    roots = [(name.partition(".")[0], name) for name in names]
    names = {*alias.values(), *(alias[root] + name.removeprefix(root) for root, name in roots if root in alias)}
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


@pytest.mark.parametrize("page", [page for page in DOCS if fences(page, "python", "text")], ids=lambda page: page.stem)
def test_pages_use_what_is_in_the_reference(page):
    known = {*reference_entries(), *dict(public(aif, "aif_jax")), "aif_jax"}
    prefixes = {name: {name.rsplit(".", cut)[0] for cut in range(max(1, name.count(".")))} for name in used_by(page)}
    assert {name for name, every in prefixes.items() if not every & known} == set()


def fields_without_meaning(kind: type) -> list[str]:
    """Fields of a public class that no `Attributes:` explains, its own or that of a public base."""
    named = dataclasses.is_dataclass(kind)
    fields = [field.name for field in dataclasses.fields(kind)] if named else getattr(kind, "_fields", ())
    public_classes = {id(value) for value in dict(public(aif, "aif_jax")).values()}
    docs = "\n".join(inspect.getdoc(base) or "" for base in kind.__mro__ if base is kind or id(base) in public_classes)
    sections = re.findall(r"^Attributes:\n((?:  .*\n?)+)", docs, re.M)
    explained = {
        name for part in sections for names in re.findall(r"^  ((?:\w+, )*\w+): \S", part, re.M) for name in names.split(", ")
    }
    return [name for name in fields if not name.startswith("_") and name not in explained]


def test_every_field_of_a_public_class_is_in_the_reference():
    """In the class docstring, which the site renders; it shows no comments and no module docstrings."""
    kinds = {name: value for name, value in public(aif, "aif_jax") if inspect.isclass(value)}
    assert {name: gaps for name, value in kinds.items() if (gaps := fields_without_meaning(value))} == {}


BLOCKS = [
    kind
    for kind in vars(aif.blocks).values()
    if inspect.isclass(kind) and issubclass(kind, aif.blocks.Block) and kind is not aif.blocks.Block
]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_a_block_tells_its_formula_paper_cost_and_use(kind):
    doc = inspect.getdoc(kind)
    assert re.search(r"^- Formula: \S|^    \S.*[=(\[]", doc, re.M), "a formula: an indented block, or '- Formula: ...'"
    assert [word for word in ("Paper", "Cost", "When") if not re.search(rf"^- {word}: \S", doc, re.M)] == []


def test_the_page_of_formulas_has_every_block():
    page = (ROOT / "docs" / "reference_formulas.md").read_text(encoding="utf-8")
    assert [kind.__name__ for kind in BLOCKS if not re.search(rf"\b{kind.__name__}\b", page)] == []
    pytest.importorskip("latex2mathml")
    drawn = website("equations").on_page_markdown(page)
    assert page.count("\n$$\n") % 2 == 0 and "$" not in drawn
    assert drawn.count("<math") == page.count("$`") + page.count("\n$$\n") // 2 > 60


@functools.cache
def website(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SITE.parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current():
    """`python docs/website/reference.py` writes them."""
    reference = website("reference")
    for name, made in reference.PAGES.items():
        stale = f"docs/{name}: run {reference.__doc__.splitlines()[0]}"
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made(), stale


def test_every_field_and_every_error_has_a_row():
    page = website("reference").settings()
    errors = [name for name, kind in public(aif, "aif_jax") if inspect.isclass(kind) and issubclass(kind, Exception)]
    assert len(set(errors)) > 15 and [name for name in errors if f"| [`{name.rpartition('.')[2]}`](api.md#" not in page] == []
    kinds = (aif.FitConfig, aif.RefreshConfig, aif.ServingConfig)
    fields = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    assert [name for name in fields if not re.search(rf"^\| `{name}` \| `[^|]+` \| \S.+ \|$", page, re.M)] == []


def test_the_table_of_extras_is_that_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", (ROOT / "docs" / "support.md").read_text(encoding="utf-8"), re.M)
    packages = {name: ", ".join(re.split(r"[<>=;]", each)[0] for each in listed) for name, listed in extras.items()}
    assert dict(rows) | {"tests": packages["tests"]} == packages and len(rows) == len(extras)


def test_every_page_is_on_the_front_page_and_in_the_site():
    front, site = (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), SITE.read_text(encoding="utf-8")
    for page in DOCS:
        assert page.name == "index.md" or f"({page.name})" in front, f"docs/index.md does not link to {page.name}"
        assert f": {page.name}" in site, f"{SITE.name}: the nav lacks {page.name}"


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page; of a module its strings and comments, each with the number of its line."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from enumerate(node.value.splitlines(), node.lineno)


def dialect(path: Path) -> list[str]:
    """Places where a page, docstring, message or comment has words that a reader would have to learn."""
    words = re.compile(rf"\b(?:{DIALECT.pattern})\b", re.I)
    return [f"{path.name}:{number}: {found[0]}" for number, line in texts(path) for found in words.finditer(line)]


def test_words_are_plain_and_no_argument_is_documented_by_a_bare_genitive():
    """`seed: of the draws` says nothing on its own in `--help`; `seed: seed of the draws` does."""
    assert [place for path in (*PAGES, *sorted((ROOT / "aif_jax").rglob("*.py"))) for place in dialect(path)] == []
    bare = re.compile(r"^ {6,}(?:\w+, )*[a-z_0-9]+: (?:of|the same of|as for) ", re.M)
    sources = [(path.name, path.read_text()) for path in (ROOT / "aif_jax").rglob("*.py")]
    assert [(name, found[0]) for name, source in sources for found in bare.finditer(source)] == []
    page = website("reference").command_line()
    assert re.findall(r"^- `[^`]+`: (?:required\. )?(?:of|to|in|between|the same for users) .*", page, re.M) == []


def test_the_scans_of_pages_find_what_they_should(tmp_path):
    page, path, api = tmp_path / "page.md", tmp_path / "module.py", ROOT / "docs" / "api.md"
    page.write_text(
        "# The `fit` call: [why](x.md)\n\n`python -m a.b --c D`, `aif-jax e`\n```sh\n$ python -m d && python -m f\n```\n"
    )
    assert commands(page) == ["python -m d", "python -m f", "python -m a.b --c D", "aif-jax e"]
    assert leads_somewhere(page, "the-fit-call-why") and leads_somewhere(api, "aif_jax.Run.with_svd")
    assert not leads_somewhere(page, "no-heading") and not leads_somewhere(api, "aif_jax.train.gone")
    path.write_text('beside = 1  # a row of its own\n"""Touched rows,\nasked once."""\nprint(f"survival {beside}")\n')
    found = ["module.py:1: of its own", "module.py:2: Touched rows", "module.py:3: asked once", "module.py:4: survival"]
    assert dialect(path) == found


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra 'docs'")
def test_site_builds_without_warnings(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice of its theme about a later MkDocs
    environment["AIF_JAX_REPOSITORY"] = "https://example.org/aif_jax"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(SITE), "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "INFO" in said and "WARNING" not in said, said  # --quiet would hide warnings

    def page(name: str) -> str:
        return (tmp_path / "site" / name / "index.html").read_text(encoding="utf-8")

    results = page("results")
    assert 'href="../experiments/notes/results/' in results and page("experiments/notes/results")
    assert 'href="https://example.org/aif_jax/edit/main/docs/results.md"' in results and "md-tabs__link" in results
    assert "user_attributes," not in page("api/your-files"), "names that share a line are taken apart"
    models = page("api/models")
    assert 'id="aif_jax.build"' in models and 'href="../api/train/#aif_jax.fit"' in page("tutorial_own_data")
    assert "aif.build(aif.presets.aif(schema)) is aif.build(aif.presets.aif(schema))" in re.sub(r"<[^>]+>", "", models)
