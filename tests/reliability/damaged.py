"""Files and folders of every format, damaged at random, and what reading them then gives; run in a child process.

`main` prints each case before it reads, so that the last line tells of a crash in native code, and at the end what became of
all. To see case 17 of a run again: `damaged.main(format, folder, seed, cases=1, first=17)`.
"""

import csv
import dataclasses
import faulthandler
import hashlib
import io
import json
import re
import resource
import shutil
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet

import aif_jax as aif
from aif_jax import checkpoint, export
from aif_jax.checkpoint import CheckpointError
from aif_jax.export import ExportError
from aif_jax.export.consume import verify
from tests import writer_world
from tests.demo import same
from tests.reliability import victims

MEMORY = 24 << 30  # of address space: what wants more fails with MemoryError, which no format documents
SECONDS = 120  # for one read; then the process ends with a traceback


@dataclasses.dataclass(frozen=True)
class Format:
    """How artefacts of a format are made and read."""

    make: Callable[[Path, int], None]  # writes a good one into a folder; of two numbers, two that differ
    read: Callable[[Path], Any]  # all that it holds, as nested dicts, lists, arrays and plain values
    refused: tuple[type[Exception], ...]  # the documented errors
    right: Callable[[Path, Any], bool] | None = None  # whether a content is right for a damaged folder; None: the good one is


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(folder: Path, other: Path, rng: np.random.Generator) -> str:
    """Damages a copy of an artefact at random; says how. `other` is another good artefact of the format."""
    files = files_of(folder)
    kinds: dict[str, list[Path]] = {}
    for path in files:  # a folder may have one record and a hundred files of arrays: every kind of file gets its share
        kinds.setdefault(re.sub(r"[0-9a-f]{32}|\d+", "", str(path.relative_to(folder))), []).append(path)
    alike = list(kinds.values())[rng.integers(len(kinds))]
    file = alike[rng.integers(len(alike))]
    data, name = file.read_bytes(), file.relative_to(folder)
    kind = rng.choice([
        "flip", "flip", "flip", "flip", "flips", "overwrite", "cut", "cut", "extend", "empty", "remove", "exchange", "other",
        "zeros", "edit", "edit", "edit",
    ])  # fmt: skip
    if kind in ("flip", "flips", "overwrite", "zeros", "cut", "edit") and not data:
        kind = "extend"
    if kind == "other" and len(files) == 1:  # all of another artefact is no damage
        kind = "empty"
    place, changed = int(rng.integers(max(1, len(data)))), bytearray(data)
    if kind == "remove":
        file.unlink()
        return f"remove {name}"
    if kind in ("flip", "flips"):
        places = [place, *rng.integers(len(data), size=7).tolist()][: 1 if kind == "flip" else 8]
        for each in places:
            changed[each] ^= 1 << int(rng.integers(8))
        made, detail = changed, f"bytes {places}"
    elif kind in ("overwrite", "zeros"):
        stop = min(len(data), place + int(rng.integers(1, 200)))
        changed[place:stop] = bytes(stop - place) if kind == "zeros" else rng.bytes(stop - place)
        made, detail = changed, f"bytes {place} to {stop}"
    elif kind == "edit":
        made, detail = _edited(data, rng)
    elif kind == "cut":
        made, detail = data[:place], f"to {place} bytes"
    elif kind == "extend":
        made, detail = data + rng.bytes(int(rng.integers(1, 50))), "at its end"
    elif kind == "empty":
        made, detail = b"", ""
    elif kind == "exchange":
        second = files[rng.integers(len(files))]
        made, detail = second.read_bytes(), f"with {second.relative_to(folder)}"
        second.write_bytes(data)
    else:
        twins = files_of(other)
        twin = other / name if (other / name) in twins else twins[rng.integers(len(twins))]
        made, detail = twin.read_bytes(), f"put the other artefact's {twin.relative_to(other)} in its place"
    file.write_bytes(made)
    return f"{kind} {name} {detail}"


def _edited(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Contents with one value changed as a person would: of JSON one leaf, of other files one digit, so that all else fits."""
    try:
        value = json.loads(data)
    except ValueError:
        places = [place for place, byte in enumerate(data) if byte in b"0123456789"]
        if not places:
            return data[:-1], "its last byte cut"
        place, edited = places[rng.integers(len(places))], bytearray(data)
        edited[place] = b"0123456789"[(edited[place] - 48 + int(rng.integers(1, 10))) % 10]
        return bytes(edited), f"the digit at {place}"
    leaves: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key, part in list(inner.items() if isinstance(inner, dict) else enumerate(inner)):
            if isinstance(part, dict | list) and part:
                walk(part)
            elif not isinstance(part, dict | list) and len(str(part)) != 64:  # digests are there for the flips
                leaves.append((inner, key))

    walk(value if isinstance(value, dict | list) else [value])
    if not leaves:
        return data[:-1], "its last byte cut"
    inner, key = leaves[rng.integers(len(leaves))]
    old = inner[key]
    new = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else f"{old}x" if old else "x"
    inner[key] = new
    return json.dumps(value).encode(), f"{key}: {old!r} to {new!r}"


def _make_index(folder: Path, number: int) -> None:
    ids = np.arange(40) * 3 + number
    writer_world.build(ids, ids + 10, capacity=64).save(folder / "snapshot", positions={0: 7 + number, 3: 9})


def _read_index(folder: Path) -> Any:
    path = folder / "snapshot"
    index = aif.ItemIndex.load(path, writer_world.TRAINED)
    ids, columns = index.stored()
    manifest = aif.index.verify(path)
    return {
        "ids": ids, "columns": jax.tree.map(np.asarray, columns), "version": index.version, "positions": manifest.positions,
        "batch": manifest.batch_size,
    }  # fmt: skip


def _data(number: int = 0) -> aif.Dataset:
    """Data with every kind of vocabulary."""
    columns = aif.Columns(
        action="event", actions=("view", "buy"), user_attributes=("city",), user_floats=("age",), user_id=True,
        item_attributes=("brand",), item_bags=("tags",), bag_length=3, item_floats=("price",), side=("bid",),
    )  # fmt: skip
    return aif.read(
        {"user": ["ann", "bob", "zoë"], "item": [7, 8, 10**12], "time": [1_600_000_000] * 3, "event": ["buy", "view", "view"]},
        items={
            "item": [7, 8, 10**12], "category": ["é", "b", "b"], "brand": [1, 2, None], "tags": ["a|b", "", "c"],
            "price": [1.0, 2.0, 4.5 + number], "bid": [0.5, 1.0, 2.0],
        },
        users={"user": ["ann", "bob", "zoë"], "city": ["Oslo", "Rom", None], "age": [20.0, 30.5, 41.0]},
        columns=columns,
    )  # fmt: skip


def encoder(number: int = 0) -> aif.Encoder:
    made = _data(number).encoder
    assert made is not None
    return made.with_length(4)


def _make_checkpoint(folder: Path, number: int) -> None:
    data, made = _data(number), encoder(number)
    model = aif.build(writer_world.MODEL.config.replace(schema=made.schema))
    params = model.init(jax.random.key(number), data.catalogue)
    with checkpoint.Checkpoints(folder) as run:
        given: dict[str, Any] = {"position": {"epoch": number}, "metrics": {"gauc": 0.5 + number / 8}}
        run.save_async(5 + number, params, model.config, encoder=made, **given)
    (folder / str(5 + number)).rename(folder / "one")


def _read_checkpoint(folder: Path) -> Any:
    loaded = checkpoint.load(folder / "one")
    return {
        "params": jax.tree.map(np.asarray, loaded.params), "config": loaded.config.to_json(), "version": loaded.version,
        "encoder": None if loaded.encoder is None else loaded.encoder.to_record(), "step": loaded.step,
        "position": loaded.position, "metrics": loaded.metrics,
    }  # fmt: skip


def _make_run(folder: Path, number: int) -> None:
    victims.run(folder / "run", number, seed=number)


def _read_run(folder: Path) -> Any:
    run = aif.Run.load(folder / "run")
    return {
        "params": jax.tree.map(np.asarray, run.params), "settings": run.settings.to_json(), "metrics": run.metrics,
        "encoder": run.encoder.version if run.encoder else None, "config": run.config.to_json(),
    }  # fmt: skip


def _make_export(folder: Path, number: int) -> None:
    data, made = _data(number), encoder(number)
    model = aif.build(aif.presets.two_tower(made.schema, width=4, short_length=4, sequence=False))
    trained = aif.Trained(model, model.init(jax.random.key(number), data.catalogue), made)
    index = aif.ItemIndex.build(trained, data.catalogue, batch_size=16, progress=False)
    export.save(folder / "model", trained, index, platforms=("cpu",))


_loaded: dict[str, Any] = {}


def _read_export(folder: Path) -> Any:
    """What the loader holds; it runs only what differs from what has run already."""
    loaded = export.load(folder / "model")
    manifest = (folder / "model" / "manifest.json").read_bytes()
    functions = loaded.functions.items()
    content: dict[str, Any] = {
        "params": {f"{name}/{path}": np.asarray(leaf) for name, f in functions for path, leaf in f.params.items()},
        "functions": {name: hashlib.sha256(f.exported.serialize()).hexdigest() for name, f in functions},
        "version": loaded.version, "encoding": loaded.encoding, "config": loaded.config,
        "ids": loaded.index.ids, "table": {name: np.asarray(leaf) for name, leaf in loaded.index.table.items()},
        "rows": loaded.encode("item", [7, 9, 10**12]), "known": loaded.index.lookup([7, 9, 10**12])[1],
    }  # fmt: skip
    key = hashlib.sha256(manifest + repr(sorted(content["functions"].items())).encode()).hexdigest()
    if key not in _loaded:
        _loaded[key] = verify(folder / "model")["max_abs_diff"]
    return content | {"difference": _loaded[key] < 1e-5}


ACTIONS = ("view", "buy")
COLUMNS = aif.Columns(action="event", actions=ACTIONS, user_attributes=("city",), item_floats=("price",), scale=False)
COLUMN_NAMES = {"events": ("user", "item", "time", "event"), "items": ("item", "category", "price"), "users": ("user", "city")}


def _tables(number: int) -> dict[str, pa.Table]:
    n = np.arange(60)
    actions, time = np.array(["view", "buy"])[n % 2], 1_600_000_000 + n * 37 + number
    m, u = np.arange(11), np.arange(7)
    tables = {
        "events": {"user": 10 + n % 7, "item": 100 + n * n % 11, "time": time, "event": actions},
        "items": {"item": 100 + m, "category": np.array(["tea", "cup", "pot"])[m % 3], "price": m / 4 + number},
        "users": {"user": 10 + u, "city": np.array(["Oslo", "Rom"])[u % 2]},
    }
    return {name: pa.table({key: pa.array(values) for key, values in table.items()}) for name, table in tables.items()}


def _make_csv(folder: Path, number: int) -> None:
    for name, table in _tables(number).items():
        rows = [table.column_names, *zip(*(column.to_pylist() for column in table.columns), strict=True)]
        (folder / f"{name}.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


def _make_parquet(folder: Path, number: int) -> None:
    for name, table in _tables(number).items():
        pa.parquet.write_table(table, folder / f"{name}.parquet", compression="none" if number else "snappy")


def _rows_of(data: aif.Dataset) -> Any:
    """Raw values of a data set: what the files said."""
    log, catalogue = data.log, data.catalogue
    users, items = data.users.raw.tolist(), data.items.raw.tolist()
    categories, cities = (data.encoder.vocabularies[name].raw.tolist() for name in ("category", "city"))

    def known(raw: list, row: int) -> Any:
        return raw[row - 1] if row else None

    actions = [None, *ACTIONS]
    events = zip(log.user.tolist(), log.item.tolist(), log.time.tolist(), log.action.tolist(), strict=True)
    return {
        "events": sorted((known(users, u), known(items, i), t, actions[a]) for u, i, t, a in events),
        "items": [
            (items[n - 1], known(categories, int(catalogue.items.ids["category"][n])), float(catalogue.items.floats[n, 0]))
            for n in range(1, len(items) + 1)
        ],
        "users": [(users[n - 1], known(cities, int(data.user_ids["city"][n]))) for n in range(1, len(users) + 1)],
    }  # fmt: skip


def _read_tables(folder: Path) -> Any:
    paths = {name: next(iter(folder.glob(f"{name}.*")), folder / f"{name}.csv") for name in COLUMN_NAMES}
    return _rows_of(aif.read(paths["events"], items=paths["items"], users=paths["users"], columns=COLUMNS))


UNSURE, WRONG = object(), object()


def _plain_tables(folder: Path) -> Any:
    """What the files say by Python or pyarrow; UNSURE for unusual text, WRONG for a row that is no fit for its header."""
    tables: dict[str, list[tuple]] = {}
    for name, wanted in COLUMN_NAMES.items():
        path = next(iter(folder.glob(f"{name}.*")))
        if path.suffix == ".parquet":
            table = pa.parquet.read_table(path, columns=list(wanted))
            tables[name] = list(zip(*(table.column(column).to_pylist() for column in wanted), strict=True))
            continue
        raw = path.read_bytes()
        if not re.fullmatch(rb"[\x20\x21\x23-\x7e\n]*", raw):
            return UNSURE
        rows = list(csv.reader(io.StringIO(raw.decode())))
        head = rows[0]
        if any(head.count(column) != 1 for column in wanted) or any(len(row) != len(head) for row in rows):
            return WRONG
        tables[name] = [tuple(row[head.index(column)] for column in wanted) for row in rows[1:]]

    def canonical(value: Any) -> int:
        if isinstance(value, str) and not re.fullmatch(r"0|[1-9]\d*", value):
            raise ValueError(value)
        return int(value)

    try:
        events = sorted((canonical(u), canonical(i), canonical(t), str(a)) for u, i, t, a in tables["events"])
        items = sorted((canonical(i), str(c), float(np.float32(p))) for i, c, p in tables["items"])
        users = sorted((canonical(u), None if c in ("", None) else str(c)) for u, c in tables["users"])
    except (ValueError, TypeError):
        return UNSURE
    return {"events": events, "items": items, "users": users}


def _right_tables(folder: Path, content: Any) -> bool:
    plainly = _plain_tables(folder)
    if plainly in (UNSURE, WRONG):
        return plainly is UNSURE
    events = [(*row[:3], row[3] if row[3] in ACTIONS else None) for row in plainly["events"]]  # None: not listed
    users = [[row for row in rows["users"] if row[1] is not None] for rows in (content, plainly)]  # None: has no record
    same_events = sorted(map(repr, content["events"])) == sorted(map(repr, events))
    return same_events and content["items"] == plainly["items"] and users[0] == users[1]


FORMATS = {
    "index": Format(_make_index, _read_index, (FileNotFoundError, CheckpointError, aif.VersionMismatch)),
    "checkpoint": Format(_make_checkpoint, _read_checkpoint, (FileNotFoundError, CheckpointError)),
    "run": Format(_make_run, _read_run, (FileNotFoundError, ValueError)),
    "export": Format(_make_export, _read_export, (ExportError,)),
    "csv": Format(_make_csv, _read_tables, (FileNotFoundError, ValueError), _right_tables),
    "parquet": Format(_make_parquet, _read_tables, (FileNotFoundError, ValueError), _right_tables),
}


def main(name: str, root: str, seed: int, cases: int, first: int = 0) -> None:
    """Damages and reads `cases` copies; AssertionError names those that are neither right nor refused."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    form, folder = FORMATS[name], Path(root)
    good, other = folder / "good", folder / "other"
    for number, path in enumerate((good, other)):
        if not path.exists():
            path.mkdir(parents=True)
            form.make(path, number)
    content, second = form.read(good), form.read(other)
    assert not same(content, second), "the two artefacts are equal: a wrong one would not show"
    if form.right is not None:
        assert form.right(good, content) and not form.right(good, second)
        assert _plain_tables(good) is not UNSURE
    tally: Counter = Counter()
    failures: list[str] = []
    for case in range(first, first + cases):
        rng = np.random.default_rng((seed, case, zlib.crc32(name.encode())))
        copy = folder / "case"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        what = damage(copy, other, rng)
        print(f"{name} case {case}: {what}", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            got = form.read(copy)
        except form.refused as error:
            assert (str(copy) if name == "checkpoint" else "") in str(error) != "", "an error without words or place"
            tally["refused"] += 1
        except Exception as error:
            where = "".join(traceback.format_exception(error)[-3:])
            failures.append(f"case {case}: {what}: {type(error).__name__} is not documented:\n{where}")
        else:
            if not (same(got, content) if form.right is None else form.right(copy, got)):
                failures.append(f"case {case}: {what}: read without an error, and wrong")
            tally["unsure" if (form.right is not None and _plain_tables(copy) is UNSURE) else "right"] += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        if len(failures) == 10:
            break
    if failures:
        raise AssertionError(f"{name}, {len(failures)} wrong:\n" + "\n".join(failures))
    print(json.dumps(tally))
