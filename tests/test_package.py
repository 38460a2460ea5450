"""The house rules that a machine can check: who may import what, what an import may do, what is documented, what is tested."""

import ast
import collections
import functools
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aif_jax
from tests import demo

pytestmark = pytest.mark.lane("default")
ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aif_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [m.name for m in pkgutil.walk_packages(aif_jax.__path__, "aif_jax.") if not m.name.endswith("__main__")]

OWNERS = {
    "flax": ("layers.py", "types.py", "trees.py"),
    "flax.linen": ("layers.py",),
    "flax.struct": ("types.py",),
    "flax.traverse_util": ("trees.py",),
    "scipy": ("train/edits.py",),
    "orbax": ("checkpoint/storage.py",),
    "safetensors": ("store/sealed.py",),
    "optax": ("train/", "run.py"),
    "jax.export": ("export/",),
    "jax.sharding": ("sharding/meshes.py",),
    "jax.make_mesh": ("sharding/meshes.py",),
    "jax.set_mesh": ("sharding/meshes.py",),
    "jax.shard_map": ("sharding/meshes.py",),
    "asyncio": ("serving/", "service/", "connectors/"),
    "fsspec": ("connectors/snapshot_store.py",),
    "confluent_kafka": ("connectors/kafka.py",),
    "redis": (),  # the client is the caller's
    # a lock between readers and the writer of an index
    "gc": (),  # a library leaves its caller's collections alone
    "threading": ("serving/", "service/", "index/store.py"),
    # threads that make the next training batches, take a share of one, save a checkpoint
    "concurrent": ("serving/", "data/pipeline.py", "train/step.py", "checkpoint/contents.py"),
    "uvicorn": ("service/process.py",),
    "httptools": ("service/process.py",),
    "orjson": ("service/http.py", "service/process.py"),
    "uvloop": ("service/process.py",),
    # pyarrow, on the first file that is read; the package's blocks for a config in JSON; your modules that --import names
    "importlib.import_module": ("readers/tables.py", "config.py", "cli/__init__.py"),
    "lazy_loader": ("__init__.py", "data/__init__.py", "export/__init__.py"),
    "tqdm": ("output/__init__.py",),
    "ray": ("engines/",),
    "pyspark": ("engines/items.py",),
    **dict.fromkeys(("unittest", "pyarrow", "multiprocessing", "pickle", "experiments", "tests", "torch", "faiss", "onnx"), ()),
}
OPTIONAL = (
    "sklearn", "httptools", "threadpoolctl", "pyarrow", "torch", "prometheus_client", "flatbuffers", "uvicorn", "orjson",
    "uvloop", "fsspec", "confluent_kafka", "ray", "pyspark",
)  # fmt: skip
LAYERS = (
    # the model: what stands at the door, and the blocks
    "types", "checks", "schema", "trees", "features", "catalogue", "layers", "scores", "registry", "heads",
    "config", "blocks", "presets", "user", "item", "interaction", "model",
    # raw data to features, devices, folders
    "output", "encoding", "sharding", "store", "checkpoint",
    # training
    "metrics", "data", "readers", "train",
    # production
    "index", "serving", "export", "connectors", "service",
    # the whole road
    "run", "refreshing", "engines", "cli", "__main__", "__init__",
)  # fmt: skip
"""Files and folders of the package from the ground up; a module may import those before its own."""
FACE = 66
MOST_AT_DOOR = 19  # files directly in the package
ROOM = 12  # files of a room
CROWDED = {"blocks": 14}
"""Rooms with more files than ROOM: the blocks, one file an approximation."""
MOST_LINES = 21939
MOST_LINES_OF_EXPERIMENTS = 7864
TOP_LEVEL = {*".ci .github .gitignore LICENSE README.md pyproject.toml aif_jax docs experiments tests".split()}


parse = functools.cache(ast.parse)


def names_used(source: str) -> set[str]:
    """Dotted names of modules that a source imports or reaches through an attribute, such as "jax.export.export"."""
    used = set()
    for node in ast.walk(parse(source)):
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


def test_each_dependency_has_one_owner():
    assert [line for path in SOURCES for line in violations(path.relative_to(PACKAGE).as_posix(), path.read_text())] == []
    allowed = [
        ("layers.py", "from flax import linen"), ("checkpoint/storage.py", "from orbax.checkpoint import v1"),
        ("export/save.py", "from jax import export"), ("serving/engine.py", "import asyncio\nasyncio.sleep(0)"),
        ("train/step.py", "template.sharding\nasyncio_free = 1"),
    ]  # fmt: skip
    refused = [
        ("user.py", "import flax.linen as nn"), ("user.py", "from flax import linen"),
        ("index/store.py", "from orbax.checkpoint import v1"), ("train/step.py", "from jax.sharding import Mesh"),
        ("train/step.py", "import jax\ndef f():\n  return jax.export.export(f)"),
        ("train/step.py", "import jax\nmesh = jax.make_mesh((2,), ('x',))"),
        ("index/parts.py", "def f():\n  import threading"), ("index/item_index.py", "import pyarrow as pa"),
        ("index/item_index.py", "import importlib\nimportlib.import_module('pyarrow')"),
    ]  # fmt: skip
    assert [case for case in allowed if violations(*case)] == [case for case in refused if not violations(*case)] == []


def module_of(path: Path) -> str:
    """The dotted name of a source, such as "aif_jax.blocks.bea"; "aif_jax" for the package itself."""
    return ".".join(("aif_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports_of(module: str, source: str, modules: Collection[str], *, local: bool = True) -> set[str]:
    """Modules of the package that a source imports; without `local` only those that its own import runs."""
    tree = parse(source)
    nodes = ast.walk(tree) if local else (node for top in tree.body for node in _run_at_import(top))
    found = set()
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name not in modules and "." in name:
                name = name.rpartition(".")[0]  # a name within a module
            found |= {name} & set(modules)
    return found - {module}


FILES = {module_of(path): path for path in SOURCES}
imports_of_file = functools.cache(lambda name, local=True: imports_of(name, FILES[name].read_text(), FILES, local=local))


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for inner in ast.iter_child_nodes(node):
            yield from _run_at_import(inner)


def layer_of(module: str) -> int:
    """How high a module is; raises for one that no layer has. `export.consume`, which imports nothing, is the ground."""
    if module.startswith("aif_jax.export.consume"):
        return -1
    return LAYERS.index(module.split(".")[1] if "." in module else "__init__")


def upward(module: str, imports: Collection[str]) -> list[str]:
    """Imports of a module that point up."""
    return [f"{module} imports {name}" for name in sorted(imports) if layer_of(name) > layer_of(module)]


def test_every_module_has_a_layer_and_imports_point_down():
    entries = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert entries == set(LAYERS) and len(set(LAYERS)) == len(LAYERS)
    assert {module_of(path) for path in SOURCES if path.name != "__main__.py"} == {"aif_jax", *MODULES}
    assert [up for name in FILES for up in upward(name, imports_of_file(name))] == []


def test_no_circle_of_imports():
    """Of what importing a module runs: before a module of another folder the folder's `__init__` runs."""
    imports = {}
    for name in FILES:
        own = imports_of_file(name, local=False)
        imports[name] = own | ({each.rpartition(".")[0] for each in own} - {name.rpartition(".")[0], name, "aif_jax", ""})
    graphlib.TopologicalSorter(imports).prepare()  # its CycleError names the circle


def test_the_scans_for_rooms_find_what_they_should():
    modules = ["aif_jax", "aif_jax.types", "aif_jax.model", "aif_jax.train", "aif_jax.train.step", "aif_jax.index.store"]
    source = "import jax\nfrom aif_jax import model, types\ndef f():\n  from aif_jax.index.store import Store"
    assert imports_of("aif_jax.train.step", source, modules) == {"aif_jax.model", "aif_jax.types", "aif_jax.index.store"}
    assert imports_of("aif_jax.train.step", source, modules, local=False) == {"aif_jax.model", "aif_jax.types"}
    wrong = [f"aif_jax.train.step imports {name}" for name in ("aif_jax", "aif_jax.index.store")]
    assert upward("aif_jax.train.step", ["aif_jax.model", "aif_jax.train", "aif_jax.index.store", "aif_jax"]) == wrong


def test_components_import_none_of_each_other():
    """Nor does what they import: it is below all of them in LAYERS."""
    components = {"aif_jax.user", "aif_jax.item", "aif_jax.interaction"}
    assert max(map(layer_of, components)) - min(map(layer_of, components)) == 2
    assert [name for name in components if imports_of_file(name) & components] == []
    assert components <= imports_of_file("aif_jax.model")


def functions_of(source: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a source, methods and inner ones too."""
    return [node for node in ast.walk(parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def gaps(scan: Callable[[str], Any], paths: Iterable[Path] = SOURCES) -> dict[str, Any]:
    """What a scan finds in sources, by module; those where it finds nothing are left out."""
    return {module_of(path): found for path in paths if (found := scan(path.read_text()))}


def local_imports(source: str) -> list[str]:
    """Imports within functions, of anything but optional dependencies and private modules, which stand in the one branch that
    needs them, so that a new version of their library cannot break anybody else.
    """
    nodes = {n for function in functions_of(source) for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)}
    modules = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
    return sorted(name for name in modules if name.partition(".")[0] not in OPTIONAL and "._src" not in name)


def test_imports_are_at_the_top_of_a_file():
    assert gaps(local_imports) == {}
    source = "def f():\n  import json\n  from sklearn import svm\n  from aif_jax.model import build"
    assert local_imports(source) == ["aif_jax.model", "json"]


def test_private_modules_of_libraries_are_imported_in_functions_alone():
    def found(source: str) -> list[str]:
        nodes = [node for top in parse(source).body for node in _run_at_import(top)]
        lines = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        return [line for line in lines if "._src" in line or "unittest" in line]

    assert gaps(found) == {}


# the door: `import aif_jax` loads nothing, and the stub that it reads is what type checkers see

DOOR = """
import sys
import aif_jax
loaded = sorted(name for name in sys.modules if name.startswith("aif_jax"))
assert loaded == ["aif_jax"], loaded
aif_jax.build, aif_jax.presets, aif_jax.Config
rooms = sorted({name.split(".")[1] for name in sys.modules if name.startswith("aif_jax.")} & HEAVY)
heavy = sorted({"orbax", "optax", "pyarrow", "uvicorn"} & set(sys.modules))
assert not rooms and not heavy, (rooms, heavy)
for name in aif_jax.__all__:
    getattr(aif_jax, name)
try:
    aif_jax.no_such_name
except AttributeError as error:
    print(error)
"""


def test_the_door_loads_what_is_asked_for_alone(python):
    heavy = {"serving", "service", "neighbours", "export", "index", "train", "checkpoint", "data", "readers", "run", "engines"}
    assert "no_such_name" in python(DOOR.replace("HEAVY", repr(heavy)))


def test_a_config_in_json_knows_the_blocks_without_a_model(python):
    record = {"schema": demo.schema().to_json(), "blocks": [{"block": "Bea", "bridges": 3}]}
    assert "Bea(bridges=3" in python(f"from aif_jax.config import Config; print(Config.from_json({record}))")


def blocks_named(source: str) -> list[str]:
    classes = {name for name in aif_jax.blocks.__all__ if inspect.isclass(getattr(aif_jax.blocks, name))}
    classes -= {"Block", "HeadInputs", "UserView", "ItemView"}
    names = [ast.unparse(n) for n in ast.walk(parse(source)) if isinstance(n, ast.Name | ast.Attribute)]
    return [name for name in names if name.rpartition(".")[2] in classes]


def test_nothing_outside_blocks_names_a_block():
    # the presets list blocks, and one is fitted after training
    paths = [path for path in SOURCES if path.parent.name != "blocks" and path.name not in ("presets.py", "edits.py")]
    assert gaps(blocks_named, paths) == {}
    assert sorted(blocks_named("isinstance(block, blocks.Bea)\nSimTier")) == ["SimTier", "blocks.Bea"]
    assert blocks_named("config.width + config.max_pending + self.bridges\nclass Mine(Block): ...") == []


def test_the_public_face_is_small():
    names = [name for name in aif_jax.__all__ if name != "__version__"]
    assert len(names) <= FACE, f"{len(names)} public names, at most {FACE}"
    assert len(set(names)) == len(names)
    stub = parse((PACKAGE / "__init__.pyi").read_text())
    imported = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported - {"__version__"} == set(names) - {"__version__"}, "the stub imports what its __all__ lacks, or the reverse"


def test_what_stands_at_the_door_is_the_model():
    """A file directly in `aif_jax/` is the model, the run over everything, or the entry; what encodes, stores, moves or serves
    is a room. The model imports none of the rooms and no library for files or fitting.
    """
    door = {path.stem for path in PACKAGE.glob("*.py")}
    assert door == set(LAYERS[: LAYERS.index("output")]) - {"blocks"} | {"run", "__main__", "__init__"}
    assert len(door) <= MOST_AT_DOOR
    owned = {name for name in OWNERS if name in ("scipy", "orbax", "optax", "pyarrow")}
    model = [path for path in SOURCES if path.parent in (PACKAGE, PACKAGE / "blocks") and path.stem not in ("run", "__main__")]
    assert [(path.name, name) for path in model for name in names_used(path.read_text()) if name.split(".")[0] in owned] == []


def test_a_room_can_be_overlooked():
    """Few files in a room: a job that is cut into many files cannot be read. The bounds of crowded rooms only go down."""
    rooms = collections.Counter(path.parent.relative_to(PACKAGE).as_posix() for path in SOURCES)
    assert {room: count for room, count in rooms.items() if room != "." and count > CROWDED.get(room, ROOM)} == {}
    assert {room: bound for room, bound in CROWDED.items() if rooms[room] < bound} == {}, "lower the bound"


def test_package_and_experiments_do_not_grow():
    """One number each caps the lines. It goes down when code does; only a new ability raises it.

    What a script needs that another one has too goes into `common`, `drawn`, `services` or `study/`.
    """
    for folder, most in (("aif_jax", MOST_LINES), ("experiments", MOST_LINES_OF_EXPERIMENTS)):
        total = sum(len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py"))
        assert total <= most, f"{folder}: {total} lines, at most {most}"


def missing_names(source: str) -> list[str]:
    """What code takes by `from aif_jax... import` and is not there."""
    nodes = [n for n in ast.walk(parse(source)) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("aif_jax")]
    names = [(node.module, name.name) for node in nodes for name in node.names]
    return [f"{m}.{n}" for m, n in names if not hasattr(importlib.import_module(m), n) and f"{m}.{n}" not in MODULES]


def test_experiments_and_tests_import_names_that_exist():
    """Most of them run in other lanes, so a renamed function would be missed here."""
    paths = [path for folder in ("experiments", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {path.name: names for path in paths if (names := missing_names(path.read_text()))} == {}
    assert missing_names("from aif_jax.train import training\nfrom aif_jax import none\nimport json") == ["aif_jax.none"]


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


def undocumented(kind: type) -> list[str]:
    """Public methods and properties of a class without a docstring, which they may inherit."""
    members = {name: member for name, member in vars(kind).items() if name[0] != "_"}
    functions = {name: getattr(member, "fget", getattr(member, "__func__", member)) for name, member in members.items()}
    return [name for name in members if inspect.isfunction(functions[name]) and not inspect.getdoc(members[name])]


def test_every_public_method_is_documented():
    """That modules, classes and functions are is a rule of ruff, as that none takes more than twelve arguments."""
    kinds = {kind for name in MODULES for kind in vars(importlib.import_module(name)).values() if inspect.isclass(kind)}
    public = [kind for kind in kinds if kind.__module__ in MODULES and kind.__name__[0] != "_"]
    assert len(public) > 100 and {kind.__name__: gaps for kind in public if (gaps := undocumented(kind))} == {}

    class Documented:
        def method(self): ...

        @property
        def quantity(self): ...

    assert undocumented(Documented) == ["method", "quantity"]


def test_top_level_entries():
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
            assert "collect_ignore" not in source, path
            assert "pytest_ignore_collect" not in source, path
        has_tests = re.search(r"^\s*(async )?def test_", source, re.M)
        assert not has_tests or path.name.startswith("test_"), f"{path}: pytest would not collect its tests"


def test_core_dependencies_have_lower_bounds_alone_and_types_are_shipped():
    """The lane "lowest" of .ci/run turns each bound into the version that it installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in project["dependencies"]), project["dependencies"]
    names = {line.split(">=")[0] for line in project["dependencies"]}
    others = {"numpy", "safetensors", "scipy", "lazy-loader", "cyclopts", "tqdm"}
    assert names == {"jax", "flax", "optax", "orbax-checkpoint"} | others
    assert (PACKAGE / "py.typed").is_file() and re.fullmatch(r"\d+\.\d+\.\d+", aif_jax.__version__)


def test_a_name_means_one_class():
    classes = [node.name for path in SOURCES for node in ast.walk(parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    assert [name for name, count in collections.Counter(classes).items() if count > 1 and name[0] != "_"] == []
