"""Which ids of newer events get a row: `encoding.capacity` on files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.capacity import Capacity, Turnover, add_counts, assign
from aif_jax.encoding.columns import File
from aif_jax.encoding.columns import Kind as ColumnKind
from aif_jax.encoding.encoder import Encoder, schema_of
from aif_jax.encoding.vocabulary import IdCounts, Vocabulary
from aif_jax.readers.sources import Problems, Source
from aif_jax.readers.tables import Scan, distinct_values, scan


def admit(
    encoder: Encoder,
    events: Source,
    *,
    capacity: Mapping[str, Capacity],
    items: Source | None = None,
    users: Source | None = None,
    now: int | None = None,
    fresh: bool = False,
) -> tuple[Encoder, dict[str, Turnover]]:
    """The encoder after the ids of newer events came and those not seen for long went.

    A user or an item is seen by its events, a value of an attribute by the events of the items or users that have it. An item
    of the items file without an event is not seen: it is encoded with row 0, and with its other features. What an id without a
    row gets is what an unknown one gets, see `Encoder`.

    Events of a user without a row are left out of training (`read(unknown="skip")`), so give users a rule only where the model
    embeds their ids, with enough rows.

    The version of the encoder changes if a row changes its meaning, not if counts alone do. Each event must be given once: the
    counts travel with the encoder, in checkpoints and exports, and add up. `carry_over` gives a trained model the new encoder.

    Args:
      encoder: before.
      events: newer than those that the encoder has counted; in memory are 20 bytes an event, as in `read`.
      capacity: the rule by name of a vocabulary: "user", "item", "category", an attribute. Others stay as they are, without
        newer ids.
      items: whole catalogue, for rules of item attributes.
      users: the same for users.
      now: seconds since 1970 from which `Capacity.evict_after` counts; None takes the last event's.
      fresh: hand out rows from the beginning, for a new model; ids without an event in `events` have none.

    Returns:
      The encoder, and by vocabulary how many ids came and went.

    Raises:
      ImportError, FileNotFoundError, ValueError: as `read`; a name that is no vocabulary, no events, no file with an attribute.

    Example:
      >>> import aif_jax as aif
      >>> events = {"user": ["ann", "bob"], "item": [7, 7], "time": [10, 20]}
      >>> data = aif.read(events, items={"item": [7, 8], "category": ["tea", "cup"]}, columns=aif.Columns())
      >>> encoder, turnover = admit(data.encoder, events, capacity={"item": Capacity(rows=10, admit_after=2)}, fresh=True)
      >>> encoder.vocabularies["item"], turnover["item"].free
      (Vocabulary(1 ids + unknown, 9 free rows), 9)
    """
    columns, known = encoder.columns, encoder.vocabularies
    unknown = sorted(set(capacity) - (set(known) - {"action"}))
    expect(not unknown, "capacity", f"names among {sorted(set(known) - {'action'})}", unknown)
    problems = Problems()
    kinds: dict[str, ColumnKind] = {columns.user: "id", columns.item: "id", columns.time: "time"}
    table = scan(events, kinds, problems, columns=columns, name="events")
    problems.expect_none()
    seconds = table.seconds(columns.time)
    expect(len(seconds) or now is not None, "events", "at least one event, or now", "none; give newer events")
    ones, named = np.ones(len(seconds), np.int64), {"user": columns.user, "item": columns.item}
    seen = {name: _counted(table, column, known[name], seconds, ones) for name, column in named.items()}
    wanted = set(capacity) - {"user", "item"}
    seen |= _of_attributes("items", items, columns.item_id, seen["item"], encoder, wanted)
    seen |= _of_attributes("users", users, columns.user_record_id, seen["user"], encoder, wanted)
    vocabularies, turnover = dict(known), {}
    for name, rule in capacity.items():
        before, part = Vocabulary([]) if fresh else known[name], seen[name]
        counts = add_counts(before.counts, part.ids.raw if len(part.ids.raw) else [], part.last, part.count)
        last = int(seconds.max()) if now is None else now
        vocabularies[name], turnover[name] = assign(before, counts, rule, now=last)
    schema = schema_of(columns, vocabularies, content=encoder.schema.content)
    return dataclasses.replace(encoder, schema=schema, vocabularies=vocabularies), turnover


def _of_attributes(
    file: File, source: Source | None, key: str, seen: IdCounts, encoder: Encoder, wanted: set[str]
) -> dict[str, IdCounts]:
    """Counts of the values of attributes: the events of the items or users that have them."""
    columns = encoder.columns
    named = {column: name for column, name in columns.vocabularies(file).items() if name in wanted}
    if not named:
        return {}
    expect(source is not None, f"admit {file}", f"a file, for the capacity of {sorted(named.values())}", None)
    problems, kinds = Problems(), columns.of(file)
    table = scan(source, {name: kinds[name] for name in (key, *named)}, problems, columns=columns, name=file)
    problems.expect_none()
    ids, codes = distinct_values(table.codes[key], seen.ids.kind, is_text=key in columns.text)
    place = np.zeros(len(table.codes[key].distinct) + 1, np.int64)
    place[codes] = seen.ids.encode(ids)
    at = place[table.codes[key].codes] - 1
    there = at >= 0
    last, count = np.zeros((2, len(at)), np.int64)
    last[there], count[there] = seen.last[at[there]], seen.count[at[there]]
    return {name: _counted(table, column, encoder.vocabularies[name], last, count) for column, name in named.items()}


def _counted(table: Scan, column: str, like: Vocabulary, last: np.ndarray, count: np.ndarray) -> IdCounts:
    """Counts of the values of a column, from the time and the number of events int64 [n] of each row; of none no count."""
    codes = table.codes[column]
    values = codes.codes.reshape(len(count), -1)
    row, place = np.nonzero((values >= 0) & (count > 0)[:, None])
    code = values[row, place]
    total, latest = np.zeros((2, len(codes.distinct)), np.int64)
    latest[:] = np.iinfo(np.int64).min
    np.add.at(total, code, count[row])
    np.maximum.at(latest, code, last[row])
    ids, of_kind = distinct_values(codes, like.kind, is_text=column in table.columns.text)
    strange = total.astype(bool)
    strange[of_kind] = False
    expect(
        not strange.any(),
        f"column {column!r}",
        f"{like.kind} like the vocabulary",
        f"{int(strange.sum())} values that are none",
    )
    some = np.flatnonzero(total[of_kind])
    chosen = ids[some] if isinstance(ids, np.ndarray) else [ids[at] for at in some]
    return add_counts(None, chosen, latest[of_kind][some], total[of_kind][some])
