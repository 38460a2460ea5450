"""The first reading of one's own files: their distinct values, and what is wrong with single ones. Source: ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from aif_jax.data.columns import Columns
from aif_jax.data.problems import Problems
from aif_jax.data.schema import Vocabulary
from aif_jax.data.tables import PER_SECOND, Block, Coded, Kind, blocks

PathLike: TypeAlias = str | os.PathLike[str]
PLAUSIBLE = (100_000_000, 4_102_444_800)  # 1973 to 2100 in seconds: what a present-day time can be
MERGE_AT = 1 << 20  # distinct values of blocks that are put together


def survey_all(
    events: PathLike,
    items: PathLike | None,
    users: PathLike | None,
    columns: Columns,
    given: Mapping[str, Vocabulary] | None,
    problems: Problems,
) -> dict[str, Vocabulary]:
    """Reads every file once: notes what is wrong with single values, and gives all vocabularies that can be made."""
    known: dict[str, Vocabulary] = {}
    # users and items files last: where they are there, they say who is known
    for path, kinds in ((events, columns.of_events()), (items, columns.of_items()), (users, columns.of_users())):
        if path is None:
            continue
        for column, vocabulary in survey(path, kinds, problems, columns=columns).items():
            name = columns.vocabulary_of(column)
            if name in known and not same_kind(known[name].raw, vocabulary.raw):
                expected, got = kind_names(known[name].raw, vocabulary.raw)
                if not any((integers(v.raw) >= 0).any() for v in (known[name], vocabulary) if v.raw.dtype.kind == "U"):
                    problems.add("wrong type", path, None, column, f"{expected} like the {name}s of {events}", got)
                else:  # integers with some text among them: `check.relations` names its rows
                    numbers = integers(vocabulary.raw)
                    vocabulary = Vocabulary(numbers[numbers >= 0])
            known[name] = vocabulary
    named = ("user", "item", "category", *columns.item_attributes, *columns.item_bags, *columns.user_attributes)
    empty = {name: Vocabulary(np.zeros(0, np.int64)) for name in named}
    if columns.action is not None and not columns.actions:
        empty["action"] = Vocabulary(np.zeros(0, np.int64))
    for name, vocabulary in (given or {}).items():
        if name in known and not same_kind(known[name].raw, vocabulary.raw):
            expected, got = kind_names(vocabulary.raw, known[name].raw)
            problems.add("wrong type", events, None, name, f"{expected} like the vocabulary {name!r} given", got)
    return empty | {name: v for name, v in known.items() if name in empty} | dict(given or {})


def survey(path: PathLike, kinds: Mapping[str, Kind], problems: Problems, *, columns: Columns) -> dict[str, Vocabulary]:
    """Reads a whole file once: notes its problems, and gives the distinct values of every categorical column.

    Args:
      path: file or folder.
      kinds: the columns to look at.
      problems: receives what is wrong with single values.
      columns: for units and separators.
    """
    distinct: dict[str, list[np.ndarray]] = {}
    widths: dict[str, int] = {}
    for block in blocks(path, kinds, problems, reading=columns.reading):
        for name, values in block.columns.items():
            if isinstance(values, Coded):
                _add_distinct(distinct, name, values, block, problems)
            elif kinds[name] == "vector" and block.good[name].any():
                width = widths.setdefault(name, values.shape[1])
                if values.shape[1] != width:
                    rows = block.rows[block.good[name]]
                    problems.add(
                        "wrong length", block.file, rows, name, f"{width} numbers like the rows before", str(values.shape[1])
                    )
            elif kinds[name] == "time":
                _look_at_times(values, block, name, problems, columns)
    return {name: Vocabulary(np.concatenate(parts)) for name, parts in distinct.items()}


def encode(coded: Coded, vocabulary: Vocabulary) -> np.ndarray:
    """int32 rows of a block's values; 0 where there is none or the vocabulary lacks it."""
    raw = coded.values if same_kind(coded.values, vocabulary.raw) else integers(coded.values)
    rows = vocabulary.encode(raw) if same_kind(raw, vocabulary.raw) else np.zeros(len(raw), np.int32)
    return np.append(rows, np.int32(0))[coded.codes]  # code -1 is the last one


def encode_actions(coded: Coded, columns: Columns, known: Mapping[str, Vocabulary]) -> np.ndarray:
    """int32 [n] actions 1, 2, ...; 0 where it is none of those listed."""
    if not columns.actions:
        return encode(coded, known["action"])
    numbers = {str(value): number for number, value in enumerate(columns.actions, start=1)}
    rows = np.array([*(numbers.get(str(value), 0) for value in coded.values.tolist()), 0], np.int32)
    return rows[coded.codes]


def same_kind(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether both are text or both are integers; no values at all go with anything."""
    return not one.size or not other.size or one.dtype.kind == other.dtype.kind


def integers(raw: np.ndarray) -> np.ndarray:
    """int64: the values that are whole numbers, -1 for others; integers as they are."""
    if raw.dtype.kind != "U":
        return raw
    return np.array(
        [int(value) if value.isascii() and value.isdigit() and len(value) <= 18 else -1 for value in raw.tolist()], np.int64
    )


def kind_names(*arrays: np.ndarray) -> list[str]:
    """What each array holds, in words."""
    return ["text" if array.dtype.kind == "U" else "integers" for array in arrays]


def _add_distinct(distinct: dict[str, list[np.ndarray]], name: str, coded: Coded, block: Block, problems: Problems) -> None:
    if not coded.values.size:
        return
    parts = distinct.setdefault(name, [coded.values[:0]])
    if not same_kind(parts[0], coded.values):
        expected, got = kind_names(parts[0], coded.values)
        problems.add("wrong type", block.file, None, name, f"{expected} as in the files before", got)
        return
    parts.append(coded.values)
    if sum(map(len, parts[1:])) > MERGE_AT:
        parts[:] = [np.unique(np.concatenate(parts))]


def _look_at_times(seconds: np.ndarray, block: Block, name: str, problems: Problems, columns: Columns) -> None:
    unit = columns.time_unit
    raw = seconds * PER_SECOND[unit]
    low, high = PLAUSIBLE
    late = block.good[name] & (seconds > high)
    early = block.good[name] & (unit != "s") & (seconds < low) & (raw > low) & (raw < high)
    for wrong, expected in ((late, f"times before 2100 in {unit!r}"), (early, f"times after 1973 in {unit!r}")):
        got = (f"{value}, which looks like {_likely_unit(int(value))!r}" for value in raw[wrong])
        problems.add("time unit", block.file, block.rows[wrong], name, expected, got)


def _likely_unit(value: int) -> str:
    return next((unit for unit, per_second in PER_SECOND.items() if value // per_second <= PLAUSIBLE[1]), "ns")
