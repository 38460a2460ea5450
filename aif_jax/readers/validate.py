"""From the distinct values of all tables to vocabularies, and from codes to their rows.

Parquet says whether ids are integers or text. In CSV they are integers where one column of the vocabulary begins with nothing
else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aif_jax.encoding.columns import Columns, File
from aif_jax.encoding.columns import Kind as ColumnKind
from aif_jax.encoding.encoder import vocabulary_names
from aif_jax.encoding.vocabulary import Kind, Vocabulary, string_array
from aif_jax.readers.sources import Problems, Source, pyarrow
from aif_jax.readers.tables import Codes, Scan, is_whole, scan

SEPARATORS = (",", ";", "|", "\t")  # what bags as text are usually joined by
EXAMPLES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values:
    """What the distinct values of a categorical column tell; they are not kept."""

    kind: ColumnKind
    count: int  # distinct values
    missing: int  # rows without one
    alikes: int  # values that are the same as another but for blanks around them and, but for ids, upper case
    alike: tuple[tuple[str, str], ...]  # some of them
    separator: tuple[str, int, str] | None  # of bags with one value at most: what many values hold, how many, an example


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """Events, items and users, read once; rows int32 [n] or [n, bag length], 0 where a value is missing or unknown."""

    scans: Mapping[File, Scan]
    rows: Mapping[File, Mapping[str, np.ndarray]]
    vocabularies: Mapping[str, Vocabulary]
    values: Mapping[tuple[File, str], Values]


def read_tables(
    sources: Mapping[File, Source | None],
    columns: Columns,
    problems: Problems,
    *,
    known: Mapping[str, Vocabulary] | None = None,
) -> Tables:
    """Reads every table once, in the order of `sources`: the last one with a vocabulary's ids says which are known.

    `problems` receives what is wrong with values, and ids that an items or users table has twice.
    """
    scans: dict[File, Scan] = {
        name: scan(source, columns.of(name, computed=False), problems, columns=columns, name=name)
        for name, source in sources.items()
        if source is not None
    }
    members: dict[str, list[tuple[File, str]]] = {}
    values: dict[tuple[File, str], Values] = {}
    for name in scans:
        for column, vocabulary in columns.vocabularies(name).items():
            members.setdefault(vocabulary, []).append((name, column))
            values[name, column] = _values(scans[name].codes[column], columns.of(name, computed=False)[column], columns)
    rows: dict[File, dict[str, np.ndarray]] = {name: {} for name in scans}
    known = dict(known or {})
    if "action" in members and columns.actions:
        _settle_actions(scans["events"], columns, rows["events"], problems)
        del members["action"]
    for vocabulary, places in members.items():
        tables = [(scans[name], column) for name, column in places]
        known[vocabulary], settled = validate(vocabulary, tables, columns, problems, given=known.get(vocabulary))
        for (name, _), of_table in zip(places, settled, strict=True):
            rows[name][vocabulary] = of_table
    vocabularies = {name: known.get(name, Vocabulary([])) for name in vocabulary_names(columns)}
    tables = Tables(scans=scans, rows=rows, vocabularies=vocabularies, values=values)
    _note_repeated_ids(tables, columns, problems)
    return tables


def validate(
    name: str, members: list[tuple[Scan, str]], columns: Columns, problems: Problems, *, given: Vocabulary | None = None
) -> tuple[Vocabulary, list[np.ndarray]]:
    """The vocabulary of some columns (`given`, or that of the last member with values) and int32 rows of each in it."""
    held = [table.codes.pop(column) for table, column in members]
    kind = given.kind if given is not None else None
    kind = kind or _kind(held, is_text=any(column in columns.text for _, column in members))
    values = [_as_kind(codes, kind) for codes in held]
    vocabulary = given
    if vocabulary is None:
        vocabulary = Vocabulary(next((ids for ids, _ in reversed(values) if len(ids)), []))
    rows = []
    for (table, column), codes, (ids, fits) in zip(members, held, values, strict=True):
        place = np.append(fits, False)  # the last one is code -1, no value
        of_code = np.zeros(len(place), np.int32)
        of_code[place] = vocabulary.encode(ids)
        rows.append(of_code[codes.codes])
        if len(fits) and not fits.any():
            others = [other.label for other, _ in members if other is not table]
            like = f"like the {name}s of {others[0]}" if given is None else f"like the vocabulary {name!r} given"
            expected, got = ("text", "integers") if kind == "strings" else ("integers", "text")
            problems.add("wrong type", table.label, None, column, f"{expected} {like}", got)
        elif codes.codes.ndim == 1:
            _note_values(table, column, codes, place, ids, problems)
            expected = f"one of the {len(vocabulary.raw)} known"
            unknown = f"unknown {name if name in ('user', 'item', 'action') else 'category'}"
            strange = table.is_good(column) & (codes.codes >= 0) & (rows[-1] == 0)
            table.note(problems, unknown, strange, column, expected, lambda at, codes=codes: _shown(codes, at))
    return vocabulary, rows


def raw_values(codes: Codes, kind: Kind | None) -> np.ndarray:
    """The values of a column without missing ones, [n] int64 or StringDType; 0 or "" for those of another kind."""
    ids, fits = _as_kind(codes, kind or _kind([codes]))
    values = ids if isinstance(ids, np.ndarray) else string_array(ids)
    place = np.zeros(len(fits) + 1, np.int64)
    place[:-1][fits] = np.arange(1, len(values) + 1)
    return np.concatenate([np.zeros(1, values.dtype), values])[place[codes.codes]]


def distinct_values(codes: Codes, kind: Kind | None, *, is_text: bool = False) -> tuple[np.ndarray | list[str], np.ndarray]:
    """The distinct values of a column that are of a kind (None: the column's own), and their codes, int64 [distinct]."""
    ids, fits = _as_kind(codes, kind or _kind([codes], is_text=is_text))
    return ids, np.flatnonzero(fits)


def _values(codes: Codes, kind: ColumnKind, columns: Columns) -> Values:
    first = codes.codes if codes.codes.ndim == 1 else codes.codes[:, 0]
    distinct, alikes, alike, separator = codes.distinct, 0, (), None
    if len(distinct) and not codes.is_integer:
        alikes, alike = _alike(distinct, fold=kind != "id")
        if kind == "bag" and (codes.codes[:, 1:] < 0).all():
            separator = _separator(distinct, columns.bag_separator)
    missing = int(np.count_nonzero(first < 0))
    return Values(kind=kind, count=len(distinct), missing=missing, alikes=alikes, alike=alike, separator=separator)


def _alike(distinct: Any, *, fold: bool) -> tuple[int, tuple[tuple[str, str], ...]]:
    """How many distinct texts are those of another but for blanks around them and, with `fold`, upper case; some pairs."""
    compute = pyarrow("pyarrow.compute")
    plain = compute.utf8_trim_whitespace(distinct)
    coded = (compute.utf8_lower(plain) if fold else plain).dictionary_encode()
    count = len(distinct) - len(coded.dictionary)
    if not count:
        return 0, ()
    group = coded.indices.to_numpy()
    order = np.argsort(group, kind="stable")
    second = np.flatnonzero(group[order][1:] == group[order][:-1])[:EXAMPLES]
    return count, tuple((distinct[int(order[i])].as_py(), distinct[int(order[i + 1])].as_py()) for i in second)


def _separator(distinct: Any, given: str) -> tuple[str, int, str] | None:
    """The separator that most values of bags hold, where two of them and a tenth do."""
    compute, most = pyarrow("pyarrow.compute"), None
    for separator in SEPARATORS:
        held = compute.match_substring(distinct, separator).to_numpy(zero_copy_only=False)
        count = int(np.count_nonzero(held))
        if separator != given and count >= max(2, len(distinct) / 10, 1 + (most[1] if most else 0)):
            most = separator, count, distinct[int(np.argmax(held))].as_py()
    return most


def _kind(members: list[Codes], *, is_text: bool = False) -> Kind:
    """Whether a vocabulary is of integers or of text."""
    typed = {codes.is_integer for codes in members if not codes.is_text and len(codes.distinct)}
    if is_text:
        return "strings"
    if typed:
        return "integers" if True in typed else "strings"
    whole = [codes.looks_whole for codes in members if len(codes.distinct)]
    return "integers" if any(whole) or not whole else "strings"


def _as_kind(codes: Codes, kind: Kind) -> tuple[np.ndarray | list[str], np.ndarray]:
    """The distinct values that are of a kind, and which of all those are, bool [distinct]."""
    arrow, distinct = pyarrow(), codes.distinct
    if codes.is_integer:
        fits = np.full(len(distinct), kind == "integers")
        return (distinct.to_numpy() if kind == "integers" else []), fits
    if kind == "strings":
        return distinct.to_pylist(), np.ones(len(distinct), bool)
    fits = is_whole(distinct)
    return distinct.filter(arrow.array(fits)).cast(arrow.int64()).to_numpy(), fits


def _note_values(
    table: Scan, column: str, codes: Codes, fits: np.ndarray, ids: np.ndarray | list[str], problems: Problems
) -> None:
    """Notes text among integers and negative ids, and marks them as no good."""
    negative = np.zeros(len(fits), bool)
    if isinstance(ids, np.ndarray) and table.kinds[column] == "id":
        negative[fits] = ids < 0
    strange = ~fits
    strange[-1] = False
    for kind, wrong, expected in (
        ("wrong type", strange, "a whole number, like the others (Columns.text keeps a column text)"),
        ("negative id", negative, "0 or more"),
    ):
        if wrong.any():
            here = wrong[codes.codes]
            table.note(problems, kind, here, column, expected, lambda at: _shown(codes, at))
            table.bad[column].append((0, here))


def _note_repeated_ids(tables: Tables, columns: Columns, problems: Problems) -> None:
    """Notes items and users that are in an earlier row of their table too."""
    keys: list[tuple[File, str, str]] = [("items", "item", columns.item_id), ("users", "user", columns.user_record_id)]
    for name, which, column in keys:
        if name not in tables.scans:
            continue
        table, ids, vocabulary = tables.scans[name], tables.rows[name][which], tables.vocabularies[which]
        first = np.zeros(len(vocabulary), np.int64)
        first[ids[::-1]] = np.arange(len(ids))[::-1]  # the first row of each id is written last
        again = (ids > 0) & (first[ids] != np.arange(len(ids)))

        def got(at: np.ndarray, table=table, ids=ids, known=vocabulary, first=first) -> Iterator[str]:
            return (f"{known.decode(i)!r}, which is in {table.place(int(first[i]))} too" for i in ids[at])

        table.note(problems, f"duplicate {which}", again, column, "every id once", got)


def _settle_actions(table: Scan, columns: Columns, rows: dict[str, np.ndarray], problems: Problems) -> None:
    """Rows of `Columns.actions`, which may name integers as text."""
    column = str(columns.action)
    codes = table.codes.pop(column)
    numbers = {str(value): number for number, value in enumerate(columns.actions, start=1)}
    of_code = np.array([*(numbers.get(str(value), 0) for value in codes.distinct.to_pylist()), 0], np.int32)
    rows["action"] = of_code[codes.codes]
    strange = table.is_good(column) & (codes.codes >= 0) & (rows["action"] == 0)
    expected = f"one of {', '.join(map(repr, columns.actions))}"
    table.note(problems, "unknown action", strange, column, expected, lambda at: _shown(codes, at))


def _shown(codes: Codes, at: np.ndarray) -> Any:
    """Values of some rows for a message, one after another; text is quoted."""
    whole = is_whole(codes.distinct)
    for code in codes.codes[at]:
        value = codes.distinct[int(code)].as_py()
        yield str(value) if isinstance(value, int) or (codes.is_text and whole[code]) else repr(value)
