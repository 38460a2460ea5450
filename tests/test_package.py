"""The house rules that a machine can check: who may import what, what an import may do, what is documented, what is tested."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import aif_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aif_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [m.name for m in pkgutil.walk_packages(aif_jax.__path__, "aif_jax.") if not m.name.endswith("__main__")]

OWNERS = {
    "flax": ("layers.py",),
    "orbax": ("checkpoint/storage.py",),
    "jax.export": ("export.py", "export/"),
    "jax.sharding": ("sharding.py",),
    "jax.make_mesh": ("sharding.py",),
    "jax.set_mesh": ("sharding.py",),
    "jax.shard_map": ("sharding.py",),
    "asyncio": ("serving.py", "serving/"),
    # a lock between readers and the writer of an index; a thread that makes the next training batches
    "threading": ("serving.py", "serving/", "index/lock.py", "data/prefetch.py"),
    "concurrent": ("serving.py", "serving/", "checkpoint/run.py", "index/writer.py"),
    "multiprocessing": (),
    "pickle": (),
    "experiments": (),
    "tests": (),
    "torch": (),
    "faiss": (),
}
OPTIONAL = (
    "sklearn", "matplotlib", "pyarrow", "torch", "faiss", "prometheus_client", "tensorboardX", "flatbuffers", "onnx",
    "onnxruntime",
)  # fmt: skip
TOP_LEVEL = {
    ".ci", ".github", ".gitignore", "README.md", "pyproject.toml", "aif_jax", "docs", "experiments", "tests",
}  # fmt: skip


def names_used(source: str) -> set[str]:
    """Dotted names of modules that a source imports or reaches through an attribute, such as "jax.export.export"."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            while isinstance(node.value, ast.Attribute):
                node = node.value
                parts.append(node.attr)
            if isinstance(node.value, ast.Name):
                used.add(".".join([node.value.id, *reversed(parts)]))
    return used


def violations(file: str, source: str) -> list[str]:
    """What a source uses though another file owns it."""
    return [
        f"{file} uses {name}: only {' or '.join(owners) or 'nobody'} may"
        for name in sorted(names_used(source))
        for owned, owners in OWNERS.items()
        if (name == owned or name.startswith(f"{owned}."))
        and not any(file == o or o[-1] == "/" and file.startswith(o) for o in owners)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_dependency_has_one_owner(path):
    assert violations(str(path.relative_to(PACKAGE)), path.read_text()) == []


@pytest.mark.parametrize(
    "file, source, found",
    [
        ("user.py", "import flax.linen as nn", 1),
        ("user.py", "from flax import linen", 1),
        ("layers.py", "from flax import linen", 0),
        ("index.py", "from orbax.checkpoint import v1", 1),
        ("train.py", "import jax\ndef f():\n  return jax.export.export(f)", 1),
        ("export/save.py", "from jax import export", 0),
        ("train.py", "from jax.sharding import Mesh", 1),
        ("train.py", "import jax\nmesh = jax.make_mesh((2,), ('x',))", 1),
        ("index.py", "def f():\n  import threading", 1),
        ("serving/engine.py", "import asyncio\nasyncio.sleep(0)", 0),
        ("train.py", "template.sharding\nasyncio_free = 1", 0),
    ],
)
def test_the_scan_for_owners_finds_what_it_should(file, source, found):
    assert (len(violations(file, source)) > 0) == bool(found)


def test_components_import_none_of_each_other():
    imports = {
        path.stem: {name.split(".")[1] for name in names_used(path.read_text()) if name.startswith("aif_jax.")}
        for path in PACKAGE.glob("*.py")
    }
    components = {"user", "item", "interaction"}
    assert components | {"model"} <= imports.keys()
    for component in components:
        reached, todo = set(), [component]
        while todo:
            found = imports.get(todo.pop(), set()) - reached
            reached |= found
            todo += found
        assert not reached & (components - {component} | {"model"}), component
    assert components <= imports["model"]


IMPORT_ALL = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional}:
            raise ImportError(name + " must not be needed")

def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError("an import reached for the network")

sys.meta_path.insert(0, Absent())
sys.addaudithook(audit)
import jax
before = dict(jax.config.values)
for name in {modules}:
    importlib.import_module(name)
assert dict(jax.config.values) == before, "an import changed jax.config"
try:
    jax.devices()
except RuntimeError:
    print("no device yet")
"""


def test_importing_touches_no_device_no_setting_no_network_and_no_optional_dependency(python):
    """No such platform exists: whatever asks for a device fails."""
    code = IMPORT_ALL.format(optional=OPTIONAL, modules=["aif_jax", *MODULES])
    assert python(code, env={"JAX_PLATFORMS": "no_such_platform"}) == "no device yet\n"


def test_every_module_is_scanned():
    assert len(MODULES) > 20
    assert {"aif_jax.user", "aif_jax.data.events", "aif_jax.checkpoint"} <= set(MODULES)


def undocumented(owner: object, name: str) -> list[str]:
    """Public names without a docstring of their own: the object itself, and methods of a class."""
    found = [] if (inspect.getdoc(owner) or "").strip() and not is_generated(owner) else [name]
    if inspect.isclass(owner):
        for attribute, member in vars(owner).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not attribute.startswith("_") and inspect.isfunction(function) and not function.__doc__:
                found.append(f"{name}.{attribute}")
    return found


def is_generated(owner: object) -> bool:
    """Whether the docstring is the one that a dataclass or a NamedTuple makes up."""
    return inspect.isclass(owner) and (owner.__doc__ or "").startswith(f"{owner.__name__}(")


def test_every_exported_name_is_documented():
    assert len(set(aif_jax.__all__)) == len(aif_jax.__all__)
    assert [gap for name in aif_jax.__all__ for gap in undocumented(getattr(aif_jax, name), name)] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_its_public_names_are_documented(name):
    module = importlib.import_module(name)
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and getattr(v, "__module__", None) == name}
    gaps = [] if module.__doc__ else [name]
    assert gaps + [gap for k, v in own.items() if callable(v) for gap in undocumented(v, f"{name}.{k}")] == []


def test_the_scan_for_docstrings_finds_gaps():
    class Documented:
        """Has a docstring."""

        def method(self): ...

        @property
        def quantity(self): ...

    assert undocumented(Documented, "D") == ["D.method", "D.quantity"]
    assert undocumented(lambda: 1, "f") == ["f"]


def test_top_level_entries():
    """The map of the project in its own words: these entries and no others."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of the project's own files")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL


def test_no_test_file_is_ignored():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert {"tests", "aif_jax"} == set(settings["testpaths"])
    assert not [option for option in settings["addopts"] if "ignore" in option or "deselect" in option or option == "-k"]
    assert not {"norecursedirs", "python_files", "python_functions", "collect_ignore"} & settings.keys()
    assert settings["filterwarnings"][0] == "error"
    for path in (ROOT / "tests").rglob("*.py"):
        source = path.read_text()
        if path != Path(__file__):
            assert "collect_ignore" not in source and "pytest_ignore_collect" not in source, path
        has_tests = re.search(r"^\s*(async )?def test_", source, re.M)
        assert not has_tests or path.name.startswith("test_"), f"{path}: pytest would not collect its tests"


def test_core_dependencies_have_lower_bounds_alone():
    """The lane "lowest" of .ci/run turns each bound into the version that it installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in project["dependencies"]), project["dependencies"]
    names = {line.split(">=")[0] for line in project["dependencies"]}
    assert names == {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "tqdm"}


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", aif_jax.__version__)
