"""Your own files as a `Dataset`: say which column is what, and read. Every file is read once.

Distinct values become vocabularies, of users and items those of their file. Parquet says whether ids are integers or text; in
CSV they are integers if the first values of any column of the vocabulary are all integers. Text "7" is read as 7 where
another column of the vocabulary, or the encoder, has integers.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import expect
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.statistics import ItemStatistics
from aif_jax.encoding.columns import Columns, TableName
from aif_jax.encoding.encoder import Encoder, bulk_of, reencode, scale_of, stacked, vocabulary_names
from aif_jax.encoding.times import FLOOR, PER_SECOND, history_order, iso_text
from aif_jax.encoding.vocabulary import IdKind, Vocabulary
from aif_jax.features import empty_items
from aif_jax.output import hidden
from aif_jax.readers.tables import MISSING_TIME, SKIPPED, Codes, LoadedTable, Problems, Source, Suspicion, batches, read_table
from aif_jax.store.trained import Trained
from aif_jax.trees import take
from aif_jax.types import ItemFeatures

logger = logging.getLogger(__name__)

FAR = 100  # an outlier is outside of the bulk of a column by at least so many times the width of the bulk
GONE = "%s: %d %s that the encoder knows are not in the file, and are read without %s; keep them in it%s"
ALL_TWICE = 0.45  # share of duplicate events that a file read twice explains


def read(
    events: Source,
    *,
    items: Source,
    users: Source | None = None,
    columns: Columns | None = None,
    encoder: Encoder | None = None,
    earlier: Trained | None = None,
    unknown: Literal["error", "skip"] = "error",
    name: str | None = None,
    repeats: bool | None = None,
    progress: bool = True,
) -> Dataset:
    """Read events, items and, where there are any, users.

    Held in memory are 20 bytes an event; reading takes 80 to 110, with item statistics 120 and 35 a half-life. Events need no
    order: they are sorted by user and time, those of one moment by item and action. What is suspicious (`check` has the list),
    such as a file that is there twice, is kept, with a warning, one line each.

    Args:
      events: a Parquet, CSV or TSV file, or a folder of them, or a data frame or table: one row for each interaction.
      items: likewise, one row for each item of the catalogue.
      users: likewise, one row for each user; None if there is no table of users.
      columns: which column is what; left out with `encoder` and `earlier`.
      encoder: encoder of a trained model: rows and scales then mean the same as in its training. For a value that its
        vocabularies lack see `unknown`; its items and users that their files lack have no features, and warnings count them.
      earlier: a trained model to go on with, see `refreshing.warm_start`: its encoder with new ids, of all but actions. Items
        that left the items file keep the features that the model knew (`Trained.items`), with the item statistics of today.
      unknown: for what the encoder lacks, or without one the file of items or users, or `Columns.actions`: "error", or "skip".
        Then lines of the users and items files with an unknown id are left out, and events of an unknown user, which item
        statistics alone count; events of an unknown item stay, with row 0, and are no positives; an unknown category is row 0,
        as in bags anyway; so is an unknown action, whose events are no candidates of `Impressions`. Warnings count these.
      name: name of the data set; default: the name of the events file.
      repeats: whether users come back to items, see `Dataset`; None: as estimated from the events, see the log.

    Returns:
      The data set with its encoder; rows follow the ascending ids.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError: a file is not there.
      ValueError, TypeError: the first problems of the files with file, row, column, expected and got; wrong options.

    Example:
      >>> events = {"user": ["ann", "ann", "bob"], "item": [7, 8, 7], "time": [20, 10, 30]}
      >>> data = read(events, items={"item": [7, 8], "category": ["tea", "cup"]}, columns=Columns())
      >>> data.log.item.tolist(), data.users.raw.tolist()
      ([2, 1, 1], ['ann', 'bob'])
    """
    expect_options(columns, encoder, earlier)
    if earlier is not None:
        expect(encoder is None, "encoder", "none with earlier=, whose encoder it is", encoder)
        encoder = earlier.need_encoder("read earlier")
    expect(unknown in ("error", "skip"), "unknown", "'error' or 'skip'", repr(unknown))
    columns = columns or (encoder and encoder.columns)
    if columns is None:
        raise ValueError("columns: expected Columns, or an encoder that has them, got neither; give columns=")
    named = (*columns.user_attributes, *columns.user_floats)
    expect(users is not None or not named, "users", f"a file, because Columns names user columns {named}", None)
    problems = Problems()
    expect(items is not None, "items", "a path, a mapping of columns or an Arrow table", None, error=TypeError)
    sources: dict[TableName, Source | None] = {"events": events, "items": items, "users": users}
    with hidden(not progress):
        tables = read_tables(sources, columns, problems, encoder=encoder, grow=earlier is not None)
    skipped = SKIPPED if unknown == "skip" else ()
    for table in tables.tables.values():
        for kind in filter(table.noted.get, skipped):
            logger.warning("%s: %d values left out or left unknown: %s", table.label.name, table.noted[kind], kind)
    lists_all = "aif-jax check" if encoder is None else "aif-jax check --checkpoint FOLDER"
    problems.expect_none(*skipped, lists_all="" if earlier is not None else lists_all)  # it would list new ids too
    if encoder is None:
        encoder = Encoder(
            columns=columns,
            vocabularies=tables.vocabularies,
            content=0 if columns.content is None else tables.tables["items"].array(columns.content).shape[1],
            scales={
                f"{which}/{name}": scale_of(table.array(name))
                for which, name, table in tables.float_columns(columns)
                if columns.scale and name in columns.floats[which]
            },
        )
    if earlier is not None:
        encoder = dataclasses.replace(encoder, vocabularies=tables.vocabularies)
    user_ids, user_floats = _users(tables, encoder)
    ordered = events_of(tables, columns)
    log, display_positions = ordered.log, None
    if columns.position is not None:
        display_positions = np.nan_to_num(tables.tables["events"].array(columns.position)[ordered.at]).astype(np.int32)
    catalogue = _catalogue(tables, encoder, earlier)
    if columns.item_statistics:
        counted = ordered.counted or log
        statistics = ItemStatistics(encoder.schema, counted).at(np.arange(len(catalogue)), counted.time.max(initial=FLOOR) + 1)
        catalogue = catalogue.with_statistics(statistics)
    for suspicion in suspicions_of(tables, columns, ordered):
        logger.warning("%s", suspicion)
    data = Dataset(
        name=name or Path(tables.tables["events"].label.name).absolute().name.split(".")[0],
        log=log,
        catalogue=catalogue,
        user_ids=user_ids,
        user_floats=user_floats,
        users=tables.vocabularies["user"],
        items=tables.vocabularies["item"],
        encoder=encoder,
        display_positions=display_positions,
        repeats=repeats,
        counted_log=ordered.counted,
    )
    comes, how = "come" if data.repeats else "do not come", "estimated" if repeats is None else "as given"
    text = "%s: users %s back to items (repeats=%s, %s): %.1f %% of the events repeat an item of their user"
    logger.info(text, data.name, comes, data.repeats, how, 100 * data.repeated)
    return data


def expect_options(columns: Any, encoder: Any, earlier: Any = None) -> None:
    """Raise TypeError, with the way out, for an option of another type, such as a `Run`."""
    for value, kind, out in (
        (columns, Columns, "columns=Columns(**...)"),
        (encoder, Encoder, "encoder=run.encoder"),
        (earlier, Trained, "earlier=run.trained"),
    ):
        name, got = out.partition("=")[0], f"{type(value).__name__}; give {out}"
        expect(value is None or isinstance(value, kind), name, f"{kind.__name__} or None", got, error=TypeError)


def read_items(
    items: Source, encoder: Encoder, *, statistics: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None
) -> Iterator[tuple[np.ndarray, ItemFeatures]]:
    """Read items as features, block by block in bounded memory: for an index of the whole catalogue.

    Yields raw ids [n], int64 or strings, and ItemFeatures [n]; items that the encoder does not know have row 0. Errors as
    `read` with unknown="skip", but for ids that repeat. `statistics` gives item statistics of raw ids [n] by
    column, such as `Dataset.statistic_columns` of a moment; None where they are columns of the items.
    """
    problems, kinds = Problems(), encoder.columns.of("items", statistics=statistics is None)
    for batch in batches(items, list(kinds), problems, name="items"):
        table = LoadedTable(batch.file, kinds, encoder.columns, problems, encoder.content)
        table.add(batch)
        yield _encoded(table, encoder, statistics)
    problems.expect_none()


def encode_items(items: Source, encoder: Encoder, *, problems: Problems | None = None) -> tuple[np.ndarray, ItemFeatures]:
    """Return raw ids [n] and features of a table of raw items that fits in memory; as `read_items`. Fills `problems`."""
    columns, problems = encoder.columns, problems or Problems()
    table = read_table(items, columns.of("items"), problems, columns=columns, name="items", content=encoder.content)
    if not table.count:
        problems.expect_none("no rows")
        return np.zeros(0, np.int64), dataclasses.replace(empty_items(encoder.schema), encoding=encoder.version)
    return _encoded(table, encoder)


def _encoded(
    table: LoadedTable, encoder: Encoder, statistics: Callable[..., Mapping[str, np.ndarray]] | None = None
) -> tuple[np.ndarray, ItemFeatures]:
    """Return raw ids and features of the items of a table, see `read_items`."""
    columns, rows, codes = encoder.columns, {}, table.codes[encoder.columns.item_id]
    ids = codes.values(encoder.vocabularies["item"].kind or _kind([codes], text=columns.item_id in columns.text))
    for column, name in columns.vocabularies("items").items():
        _, (rows[name],) = encode_columns(name, [(table, column)], given=encoder.vocabularies[name])
    table.problems.expect_none(*SKIPPED)
    computed = {} if statistics is None else statistics(ids)
    named = [name for name in (*columns.item_floats, *columns.statistics, *columns.side) if name not in computed]
    floats = {**{name: table.array(name) for name in named}, **computed}
    return ids, encoder.item_features(rows, floats, None if columns.content is None else table.array(columns.content))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """Events, items and users, read once; rows int32 [n] or [n, bag length], 0 where a value is missing or unknown."""

    tables: Mapping[TableName, LoadedTable]
    rows: Mapping[TableName, dict[str, np.ndarray]]  # by file, then by vocabulary
    vocabularies: Mapping[str, Vocabulary]
    item_ids: Codes  # raw ids of the events' items, unknown ones too, which order events of one moment

    def float_columns(self, columns: Columns) -> Iterator[tuple[str, str, LoadedTable]]:
        """Yield ("item" or "user", column, table) of every float column that is there."""
        items, users = self.tables.get("items"), self.tables.get("users")
        for which, table, names in ("item", items, (*columns.item_floats, *columns.side)), ("user", users, columns.user_floats):
            yield from ((which, name, table) for name in names if table is not None)


def read_tables(
    sources: Mapping[TableName, Source | None],
    columns: Columns,
    problems: Problems,
    *,
    encoder: Encoder | None,
    grow: bool = False,
) -> Tables:
    """Read every table once: known ids are those of the file of items or users, else of the events.

    With an `encoder` its ids are the known ones; with `grow` those of both, except for actions.
    """
    content, known, given = (0, columns, {}) if encoder is None else (encoder.content, encoder.columns, encoder.vocabularies)
    expect(columns == known, "columns", f"those of the encoder, {known}, or none", columns)
    tables: dict[TableName, LoadedTable] = {
        name: read_table(source, columns.of(name, statistics=False), problems, columns=columns, name=name, content=content)
        for name in get_args(TableName)
        if (source := sources.get(name)) is not None or name == "events"
    }
    rows: dict[TableName, dict[str, np.ndarray]] = {name: {} for name in tables}
    item_ids = tables["events"].codes[columns.item]  # which `encode_columns` drops
    if columns.actions:
        rows["events"]["action"] = encode_listed("action", tables["events"], str(columns.action), columns.actions)
    vocabularies: dict[str, Vocabulary] = {}
    for vocabulary in vocabulary_names(columns):
        places: list[tuple[TableName, str]] = [
            (table, column) for table in tables for column, of in columns.vocabularies(table).items() if of == vocabulary
        ]
        members, grows = [(tables[table], column) for table, column in places], grow and vocabulary != "action"
        vocabularies[vocabulary], found = encode_columns(vocabulary, members, given=given.get(vocabulary), grow=grows)
        for (table, _), rows_of_table in zip(places, found, strict=True):
            rows[table][vocabulary] = rows_of_table
    if columns.history_actions and "action" in vocabularies:
        listed, chosen = (set(map(str, names)) for names in (vocabularies["action"].raw.tolist(), columns.history_actions))
        for lost in sorted(chosen - listed):
            expected = f"{lost!r} among its values, as Columns.history_actions says"
            problems.add("missing action", tables["events"].label, None, columns.action, expected, f"{sorted(listed)}")
    for file, which, column in (("items", "item", columns.item_id), ("users", "user", columns.user_record_id)):
        if file in tables:
            _note_duplicates(tables[file], column, which, rows[file][which], vocabularies[which])
    if columns.position is not None:
        shown = tables["events"].array(columns.position)
        wrong = ~(np.isnan(shown) | ((shown >= 0) & (shown < 2**24) & (shown == np.floor(shown))))
        expected = "a whole number from 1 to 2^24 - 1, 0 or empty where it is unknown"
        tables["events"].note("position", wrong, columns.position, expected, lambda at: (f"{v:.8g}" for v in shown[at]))
    return Tables(tables=tables, rows=rows, vocabularies=vocabularies, item_ids=item_ids)


def encode_columns(
    name: str, members: list[tuple[LoadedTable, str]], *, given: Vocabulary | None = None, grow: bool = False
) -> tuple[Vocabulary, list[np.ndarray]]:
    """Return the vocabulary of some columns and int32 rows of each in it; their codes are dropped.

    Its ids: those of `given`; without it those of the last of `members` that has any, which is the file of items or users
    where there is one; with `grow`, both.
    """
    held = [table.codes.pop(column) for table, column in members]
    id_kind = (given.kind if given else None) or _kind(held, text=any(name in table.columns.text for table, name in members))
    distinct, vocabulary = [codes.of_kind(id_kind) for codes in held], given
    if vocabulary is None or grow:
        newer = Vocabulary(next((ids for ids, _ in reversed(distinct) if len(ids)), []))
        both = [each.raw for each in (given, newer) if each is not None and len(each.raw)]
        vocabulary = Vocabulary(np.concatenate(both)) if both else newer
    own_file = f"those of the {name}s file" if name in ("user", "item") and len(members) > 1 else "them"
    found, adds = [], "" if name == "action" or given is None or grow else f", read(earlier=) adds {own_file}"
    out = f" (read(unknown='skip') accepts others{adds})"
    # `fits`, `negative`, `row_of` are by code (distinct value); `ids` the values that fit; `[codes.codes]` spreads over rows
    for (table, column), codes, (ids, fits) in zip(members, held, distinct, strict=True):
        row_of, bag = np.zeros(len(fits) + 1, np.int32), table.kinds[column] == "bag"  # the last row is of code -1, no value
        row_of[:-1][fits] = vocabulary.encode(ids)
        rows = row_of[codes.codes]
        found.append(rows.reshape(-1, table.columns.bag_length) if bag else rows)
        if len(fits) and not fits.any():
            others = [other.label.name for other, _ in members if other is not table]
            like = f"like the {name}s of {others[0]}" if given is None else f"like the vocabulary {name!r} given"
            expected, got = ("text", "integers or booleans; make them text") if id_kind == "strings" else ("integers", "text")
            table.problems.add("wrong type", table.label, None, column, f"{expected} {like}", got)
        else:
            negative = np.zeros(len(fits), bool)
            if id_kind == "integers" and table.kinds[column] == "id":
                negative[fits] = np.asarray(ids) < 0
            unknown = f"unknown {name if name in ('user', 'item', 'action') else 'category'}"
            way_out = "the others (Columns.text keeps a column text)"
            like = way_out if given is None else f"the vocabulary {name!r} (text needs a new model, with Columns.text)"
            for wrong, of_code, expected in (
                ("wrong type", ~fits, f"a whole number, like {like}"),
                ("negative id", negative, "0 or more"),
                (unknown, fits & ~negative & (row_of[:-1] == 0) & (not bag), f"one of the {len(vocabulary.raw)} known{out}"),
            ):
                if of_code.any():
                    table.note(wrong, np.append(of_code, False)[codes.codes], column, expected, codes.shown)
    return vocabulary, found


def _kind(members: list[Codes], *, text: bool) -> IdKind:
    """Return the kind of ids: integers if any Arrow type is; in text files alone, if any column begins with integers."""
    members = [codes for codes in members if codes.type is not None]
    typed = [codes.type == "int64" for codes in members if not codes.parsed]
    whole = any(typed) if typed else not members or any(codes.looks_whole for codes in members)
    return "integers" if whole and not text else "strings"


def encode_listed(name: str, table: LoadedTable, column: str, listed: Sequence[Any]) -> np.ndarray:
    """Return int32 [n], 1, 2, ... for the values `listed`, which may name integers as text, else 0; its codes are dropped."""
    codes, numbers = table.codes.pop(column), {str(value): number for number, value in enumerate(listed, start=1)}
    row_of = np.array([*(numbers.get(str(value), 0) for value in codes.distinct.to_pylist()), 0], np.int32)
    boolean = codes.type == "int64" and "true" in map(str.lower, map(str, listed))
    out = " (make booleans text)" if boolean else " (read(unknown='skip') accepts others)" if name == "action" else ""
    rows, expected = row_of[codes.codes], f"one of {', '.join(map(repr, listed))}{out}"
    table.note(f"unknown {name}", (codes.codes >= 0) & (rows == 0), column, expected, codes.shown)
    return rows


def _note_duplicates(table: LoadedTable, column: str, which: str, rows: np.ndarray, vocabulary: Vocabulary) -> None:
    """Note items or users that are in an earlier row of their table too."""
    first = np.zeros(len(vocabulary), np.int64)
    first[rows[::-1]] = np.arange(len(rows))[::-1]  # the first row of each id is written last
    again = (rows > 0) & (first[rows] != np.arange(len(rows)))

    def got(at: np.ndarray) -> Iterator[str]:
        pairs = zip(vocabulary.ids_of(rows[at]).tolist(), first[rows[at]].tolist(), strict=True)
        return (f"{raw!r}, which is in {table.locate(row)} too" for raw, row in pairs)

    table.note(f"duplicate {which}", again, column, "every id once", got)


class Events(NamedTuple):
    """Events of known users with a time, by user and in the order of histories; arrays [n]."""

    log: EventLog  # sorted already, so it has the order of `at` and the others
    at: np.ndarray  # int64, rows of the table
    moment: np.ndarray  # in `Columns.time_unit`
    duplicate: np.ndarray  # bool, whether an event of a known item equals the one before it
    counted: EventLog | None  # what item statistics count, where that is more: events of unknown users too


def events_of(tables: Tables, columns: Columns) -> Events:
    """Return the events of tables that were read."""
    table, rows = tables.tables["events"], tables.rows["events"]
    times = table.array(columns.time)
    good = (times != MISSING_TIME) & (rows["user"] > 0)  # `read` refuses missing times before, `check` goes on
    parts = rows["user"], times, rows["item"], rows.get("action", np.ones(table.count, np.int32))
    user, moment, item, action = parts if good.all() else [part[good] for part in parts]
    per_second, counted = PER_SECOND[columns.time_unit], None
    if columns.item_statistics and not good.all():
        every = [part[times != MISSING_TIME] for part in parts]
        counted = EventLog(np.maximum(every[0], 1), every[2], every[3], every[1] // per_second)  # statistics read no users
    kind = tables.vocabularies["item"].kind or "integers"
    order = history_order(moment, item, action, user=user, ids=lambda tied: tables.item_ids.values(kind)[good][tied])
    user, moment, item, action = (part[order] for part in (user, moment, item, action))
    same = np.logical_and.reduce([part[1:] == part[:-1] for part in (user, moment, item, action)])
    duplicate = np.append(False, same)[: len(user)] & (item > 0)
    log = EventLog(user, item, action, moment // per_second, users=len(tables.vocabularies["user"]))
    return Events(log, np.flatnonzero(good)[order], moment, duplicate, counted)


def suspicions_of(tables: Tables, columns: Columns, events: Events) -> Iterator[Suspicion]:
    """Yield what is suspicious in tables that were read; the table in `check` has all kinds."""
    table, count, user = tables.tables["events"], len(events.at), events.log.user
    file, now = table.label.name, int(time.time())
    if len(again := np.flatnonzero(events.duplicate)):
        heads = np.maximum.accumulate(np.where(events.duplicate, 0, np.arange(count)))
        first = again[np.argsort(events.at[again])[:3]]
        such = ", ".join(f"{table.locate(int(events.at[i]))} (as {table.locate(int(events.at[heads[i]]))})" for i in first)
        twice = "; is a file there twice?" if len(again) >= ALL_TWICE * count else ""
        got = f"the same user, item, action and time as another row: {len(again):,} of {count:,} events, such as {such}{twice}"
        yield Suspicion(kind="duplicate event", file=file, column=None, got=got)
    if future := int(np.count_nonzero(events.log.time > now + 86_400)):
        last = iso_text(events.log.time.max())
        got = f"more than 24 hours after now, {iso_text(now)}: {future:,} of {count:,} events, the last at {last}"
        yield Suspicion(kind="future event", file=file, column=columns.time, got=got)
    same = (user[1:] == user[:-1]) & (events.moment[1:] == events.moment[:-1])
    if columns.time in table.rounded and same.any():
        got = f"finer than Columns.time_unit={columns.time_unit!r}, to which times are rounded down: {int(same.sum()):,} of"
        got = f"{got} {count:,} events have the time of their user's one before, ordered by item; a finer unit may part them"
        yield Suspicion(kind="rounded time", file=file, column=columns.time, got=got)
    for bags in tables.tables.values():
        for column, cut in bags.cut.items():
            got = f"{cut:,} of {bags.count:,} rows have more values than Columns.bag_length={columns.bag_length} keeps"
            yield Suspicion(kind="cut bag", file=bags.label.name, column=column, got=got)
    for _, name, table in tables.float_columns(columns):
        rows = np.flatnonzero(~np.isnan(table.array(name)))
        values = table.array(name)[rows].astype(np.float64)
        low, high = bulk_of(values) if len(values) else (0.0, 0.0)
        reach = FAR * (high - low or max(1.0, abs(low)))
        ends = ("above", high, values > high + reach, np.max), ("below", low, values < low - reach, np.min)
        for side, end, far, worst in ends:
            if far.any():
                got = f"far {side} {end:.6g}: {int(far.sum()):,} of {len(values):,} values, such as {worst(values):.6g}"
                got = f"{got}; the first is in {table.locate(int(rows[np.argmax(far)]))}"
                yield Suspicion(kind="outlier", file=table.label.name, column=name, got=got)


def _by_row(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Return values [n, ...] of the table's rows, put where their vocabulary says, [count, ...]; zeros in row 0."""
    table = np.zeros((count, *values.shape[1:]), values.dtype)
    table[rows] = values
    table[0] = 0
    return table


def _catalogue(tables: Tables, encoder: Encoder, earlier: Trained | None) -> Catalogue:
    """Return the features of all items: from the file, else from the `earlier` model."""
    columns, table, vocabulary = encoder.columns, tables.tables["items"], tables.vocabularies["item"]
    rows, count = dict(tables.rows["items"]), len(vocabulary)
    at = rows["item"]
    floats = {name: _by_row(at, table.array(name), count) for name in (*columns.item_floats, *columns.side)}
    floats |= dict.fromkeys(columns.statistics, np.zeros(count, np.float32))  # from the events, when they are there
    ids = {name: _by_row(at, values, count) for name, values in rows.items()}
    content = None if columns.content is None else _by_row(at, table.array(columns.content), count)
    features: Any = encoder.item_features(ids | {"item": np.arange(count, dtype=np.int32)}, floats, content)
    gone = np.setdiff1d(np.arange(1, count), at)
    features.floats[np.append(0, gone)] = 0  # scaling made -mean/deviation of 0
    if len(gone) and (earlier is None or earlier.items is None):
        lost, way_out = "category, attributes, floats and content", ", or give earlier=, a model that holds them"
        logger.warning(GONE, table.label.name, len(gone), "items", lost, way_out)
    elif earlier is not None and len(gone):
        own = earlier.need_encoder("read earlier")
        known = reencode(take(earlier.items, own.vocabularies["item"].encode(vocabulary.ids_of(gone))), own, encoder)
        for values, others in zip(jax.tree.leaves(features), jax.tree.leaves(known), strict=True):
            values[gone] = others
    return Catalogue(schema=encoder.schema, raw=vocabulary.raw, items=features)


def _users(tables: Tables, encoder: Encoder) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return ids and floats of the users [U]."""
    columns, count = encoder.columns, len(tables.vocabularies["user"])
    ids = {"user": np.arange(count, dtype=np.int32)} if columns.user_id else {}
    if "users" not in tables.tables:
        return ids, np.zeros((count, 0), np.float32)
    table, rows = tables.tables["users"], tables.rows["users"]
    gone = np.setdiff1d(np.arange(1, count), rows["user"])
    if len(gone) and (columns.user_attributes or columns.user_floats):
        logger.warning(GONE, table.label.name, len(gone), "users", "attributes and floats", "")
    ids |= {name: _by_row(rows["user"], rows[name], count) for name in columns.user_attributes}
    floats = stacked([table.array(name) for name in columns.user_floats], table.count)
    return ids, _by_row(rows["user"], encoder.scale_floats("user", floats), count)
