"""The request log and what followed, clicks and conversions that come later, as training samples.

The samples take the features of the log as they were served. Both sides are cut by a hash of the request's id into parts that
fit memory, joined part by part, cut again by a hash of the user, and written in the order of an event log. So memory holds one
part; parts grow from `MOST_PARTS` of them on, some 8 million requests. Disk holds the samples twice while the job runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.data.cascade import RECORD, STAGES, features_from, names_of
from aif_jax.data.events import ArrayWriter
from aif_jax.encoding.capacity import new_rows
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.columns import Kind as ColumnKind
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.hashing import hash_ids
from aif_jax.encoding.raw import plain
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.readers.sources import Problems, Source, pyarrow
from aif_jax.readers.tables import Codes, Scan, blocks
from aif_jax.service.log import log_files, logged_arrays
from aif_jax.store.folders import new_folder

logger = logging.getLogger(__name__)
PART_BYTES = 16 << 20  # of the requests of a part, as Parquet counts them, and PART_ROWS of its outcomes
PART_ROWS = 1 << 14
MOST_PARTS = 512
ROWS = 1024  # requests that are decoded at a time
EXPOSED, PRE_RANKED, RETRIEVED = (STAGES.index(name) for name in ("exposed", "pre_ranked", "retrieved"))
OPEN, EARLIER, NO_FEATURES, OTHER_ENCODING, OTHER_IDS, DUPLICATE, NOT_SHOWN, SAME_SECOND = (
    "an outcome may still come", "of an earlier run", "without features", "of another encoder",
    "with ids of another kind", "with the id of another",
    "with nothing shown that has a row", "of a user with another one in the same second",
)  # fmt: skip
REASONS = ("", OPEN, EARLIER, NO_FEATURES, OTHER_ENCODING, OTHER_IDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinSummary:
    """What a join found.

    Attributes:
      requests: records of the log.
      samples: requests that became samples.
      left_out: other requests, by reason.
      without_outcome: samples on which nothing followed: all that was shown is a negative.
      outcomes: outcomes in the samples, by name.
      late: outcomes after their window, by name: the sample says that they did not happen.
      ignored: other rows of the outcomes, by reason.
    """

    requests: int
    samples: int
    left_out: dict[str, int]
    without_outcome: int
    outcomes: dict[str, int]
    late: dict[str, int]
    ignored: dict[str, int]

    def __str__(self) -> str:
        def listed(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "none"

        return (
            f"{self.samples:,} samples of {self.requests:,} requests, {self.without_outcome:,} without an outcome; left out:"
            f" {listed(self.left_out)}; outcomes: {listed(self.outcomes)}; after their window: {listed(self.late)};"
            f" ignored: {listed(self.ignored)}"
        )


def join_outcomes(
    log: str | Path,
    outcomes: Source,
    out: str | Path,
    *,
    encoder: Encoder,
    windows: Mapping[str, int],
    to: Encoder | None = None,
    shown: str | None = None,
    candidates: int = 256,
    since: int | None = None,
    until: int | None = None,
    request: str = "request",
    item: str = "item",
    time: str = "time",
    outcome: str = "outcome",
) -> JoinSummary:
    """Joins a request log with outcomes by request id and item, into samples for `Impressions` and `Cascaded`.

    A request becomes a sample when the longest window after it is over. A later run, with the `until` of this one as its
    `since`, finds the others, each once. A candidate without an outcome in its window is a negative if it was shown; if not,
    its labels are unknown. `readers.read.read_samples` gives the samples as a `Dataset`.

    Args:
      log: file or folder that `service.log.RequestLog` wrote.
      outcomes: Parquet, CSV or TSV, a folder of them, or columns in memory, in any order: a row for each outcome.
      out: new folder.
      encoder: encoder of the model that served; requests of others are left out.
      windows: outcome to the seconds after the request in which it counts, in the order of actions 2, 3, ... such as
        {"click": 1800, "conversion": 86400}.
      to: encoder of the model to train, derived from `encoder` (`readers.admit`): rows of the served features are renamed,
        those of ids that are gone to 0. Candidates are encoded with it. None takes `encoder`.
      shown: name of the outcome that says an item was shown; None counts what a ranking returned, or all that was scored.
      candidates: M, of a request at most; the furthest stages are kept, then the log's order.
      since: second up to which the outcomes were complete in an earlier run: its requests are left out. None for all.
      until: second up to which the outcomes are complete; None takes that of the last one.
      request, item, time, outcome: names of the columns; times in `Columns.time_unit` of the encoder.

    Returns:
      Counts of everything that was joined and of everything that was not.

    Raises:
      ImportError, FileNotFoundError, ValueError: as `read`; no log, no sample at all, an encoder `to` of other columns.
      FileExistsError: something is at `out`.
    """
    target = encoder if to is None else to
    same = target.columns == encoder.columns and target.scales == encoder.scales
    same = same and target.vocabularies.get("action") == encoder.vocabularies.get("action")
    expect(same, "to", "an encoder of the same columns, actions and scales", "another; derive it from the served one")
    good = windows and all(name.isidentifier() and seconds > 0 for name, seconds in windows.items()) and shown not in windows
    expect(good, "windows", "seconds above 0 by outcome, without the one of `shown`", dict(windows))
    expect(candidates >= 1, "candidates", "at least 1", candidates)
    files = log_files(log)
    with new_folder(out) as folder:
        work = folder.with_name(f"{folder.name}.parts")
        work.mkdir()
        job = _Join(encoder, target, dict(windows), shown, candidates, work, _parts(files))
        last = job.cut_outcomes(outcomes, {request: "id", item: "id", time: "time", outcome: "category"})
        job.cut_requests(files, since=since, until=last if until is None else until)
        with Partitions(work / "samples", job.parts) as samples:
            for part in range(job.parts):
                job.join(part, samples)
        with contextlib.ExitStack() as stack:
            job.write(ArrayWriter(folder, stack))
        summary = job.summary()
        record = {"encoding": target.version, "outcomes": list(windows), "windows": dict(windows), "arrays": job.arrays}
        record |= {"versions": list(job.versions)}
        (folder / RECORD).write_text(json.dumps(record | {"summary": dataclasses.asdict(summary)}, indent=2), encoding="utf-8")
    logger.info("%s: %s", out, summary)
    return summary


class _Join:
    """The state of one join: counts, and the parts on disk."""

    def __init__(
        self, encoder: Encoder, target: Encoder, windows: dict[str, int], shown: str | None, most: int, work: Path, parts: int
    ):
        self.encoder, self.target, self.shown, self.most, self.work, self.parts = encoder, target, shown, most, work, parts
        self.items, self.labels, self.longest = target.vocabularies["item"], list(windows), max(windows.values())
        windows = windows if shown is None else windows | {shown: self.longest}
        self.names, self.windows = list(windows), np.array(list(windows.values()), np.int64)
        self.left_out, self.outcomes, self.late, self.ignored = Counter(), Counter(), Counter(), Counter()
        self.requests = self.samples = self.without_outcome = 0
        self.arrays: list[str] = []
        self.versions: dict[str, int] = {}  # that served, by their number in the samples

    def summary(self) -> JoinSummary:
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(JoinSummary)}
        counts: Any = {k: {w: n for w, n in v.items() if n} if isinstance(v, Counter) else v for k, v in found.items()}
        return JoinSummary(**counts)

    def cut_outcomes(self, source: Source, kinds: Mapping[str, ColumnKind]) -> int:
        """Writes the outcomes of known items into parts; the second of the last one."""
        request, item, time, outcome = kinds
        text = (request, outcome, item) if self.items.kind == "strings" else (request, outcome)
        columns, problems, last = Columns(time_unit=self.encoder.columns.time_unit, text=text), Problems(), 0
        codes = {name: code for code, name in enumerate(self.names)}
        with Partitions(self.work / "outcomes", self.parts) as parts:
            for block in blocks(source, kinds, problems, columns=columns, name="outcomes"):
                table = Scan(block.file, kinds, columns)
                table.add(block, problems)
                problems.expect_none()
                seconds = table.ticks(time).seconds
                last = max(last, int(seconds.max(initial=0)))
                rows = _rows(table.codes[item], self.items, f"outcomes, column {item!r}")
                named = table.codes[outcome].values("strings").tolist()
                kind = np.array([codes.get(name, -1) for name in named], np.int8)
                self.ignored["of another name"] += int(np.count_nonzero(kind < 0))
                self.ignored["of an item without a row"] += int(np.count_nonzero((kind >= 0) & (rows == 0)))
                some = np.flatnonzero((kind >= 0) & (rows > 0))
                ids = table.codes[request].values("strings")[some].tolist()
                parts.add(ids, {"row": rows[some], "time": seconds[some], "kind": kind[some]})
            problems.expect_none()
        return last

    def cut_requests(self, files: Sequence[Path], *, since: int | None, until: int) -> None:
        """Writes the requests into parts; of those that cannot be samples the id and the reason alone."""
        texts = self.items.kind == "strings"
        named = ("candidate_texts", "id_texts") if texts else ("candidates", "ids")
        columns = ["id", "time", "method", "version", "user", "encoding", "features", "logits", *named]
        arrow, compute = pyarrow(), pyarrow("pyarrow.compute")
        closed, before = until - self.longest, -1 if since is None else since - self.longest
        with Partitions(self.work / "requests", self.parts) as parts:
            for batch in _batches(files, columns):
                self.requests += batch.num_rows
                ids, seconds = batch["id"].to_pylist(), np.floor(batch["time"].to_numpy()).astype(np.int64)
                lists = [batch[name] for name in named]
                lengths = [compute.fill_null(compute.list_value_length(each), 0).to_numpy() for each in lists]
                reason = np.zeros(batch.num_rows, np.int8)
                reason[lengths[0] == 0] = REASONS.index(OTHER_IDS)
                other = compute.equal(batch["encoding"], self.encoder.version).to_numpy(zero_copy_only=False)
                reason[~other] = REASONS.index(OTHER_ENCODING)
                reason[batch["features"].is_null().to_numpy(zero_copy_only=False)] = REASONS.index(NO_FEATURES)
                reason[seconds > closed] = REASONS.index(OPEN)
                reason[seconds <= before] = REASONS.index(EARLIER)
                encoded = [self.items.encode(_values(each)) for each in lists]
                rows, returned = (_lists(*pair) for pair in zip(encoded, lengths, strict=True))
                users = zip(batch["user"].to_pylist(), ids, strict=True)
                users = [f"{user} {name}" if user == "null" else user for user, name in users]
                features = compute.if_else(arrow.array(reason == 0), batch["features"], arrow.scalar(None, arrow.binary()))
                version = [self.versions.setdefault(name, len(self.versions)) for name in batch["version"].to_pylist()]
                parts.add(ids, {
                    "time": seconds, "reason": reason, "user": _key(users), "version": np.array(version, np.int32),
                    "features": features, "rows": rows, "returned": returned, "logits": batch["logits"],
                    "scored": compute.equal(batch["method"], "score"),
                })  # fmt: skip

    def join(self, part: int, samples: Partitions) -> None:
        """Joins one part, and writes its samples into the parts of their users."""
        requests, outcomes = (_table(self.work / name, part) for name in ("requests", "outcomes"))
        if requests is None:
            self.ignored["without a request"] += 0 if outcomes is None else outcomes.num_rows
            return
        ids, seconds, reason = requests["id"].to_pylist(), plain(requests["time"]), plain(requests["reason"])
        good, place = reason == 0, {}
        for at in sorted(range(len(ids)), key=lambda at: (seconds[at], at)):
            if place.setdefault(ids[at], at) != at:
                good[at] = False
                self.left_out[DUPLICATE] += 1
        first = np.zeros(len(ids), bool)
        first[list(place.values())] = True
        self.left_out.update(Counter(REASONS[code] for code in reason[first & (reason > 0)].tolist()))
        pairs, at = np.unique(_pairs(requests["rows"]), return_index=True)
        pairs, at = (each[(pairs & 0xFFFFFFFF) > 0] for each in (pairs, at))  # of unknown items there is no sample
        owner = pairs >> 32
        returned = _pairs(requests["returned"])
        stage = np.where(np.isin(pairs, returned), PRE_RANKED, RETRIEVED).astype(np.int8)
        logit = _logits(requests, pairs, returned)
        stage[plain(requests["scored"])[owner] & ~np.isnan(logit)] = PRE_RANKED
        done = np.zeros((len(pairs), len(self.names)), bool)
        if outcomes is not None:
            self._mark(done, pairs, place, good, seconds, outcomes)
        exposed: np.ndarray = np.any(done, axis=1)
        if self.shown is None:
            exposed |= stage == PRE_RANKED
        stage[exposed] = EXPOSED
        some = np.zeros(len(ids), bool)
        some[owner[exposed]] = True
        self.left_out[NOT_SHOWN] += int(np.count_nonzero(good & ~some))
        good &= some
        order = np.lexsort((at, stage, owner))
        order = order[good[owner[order]]]
        within = np.arange(len(order)) - np.searchsorted(owner[order], owner[order]) < self.most
        self.ignored["of an item beyond `candidates`"] += int(np.count_nonzero(done[order[~within]]))
        order = order[within]
        owner, labels = owner[order], np.where(exposed[order, None], done[order], np.nan).astype(np.float32)
        lengths = np.bincount(owner, minlength=len(ids))[good]
        chosen = np.flatnonzero(good)
        users = plain(requests["user"])[chosen]
        samples.add_to(((users >> 30) * self.parts) >> 32, {
            "id": requests["id"].take(chosen), "user": users, "time": seconds[chosen],
            "version": requests["version"].take(chosen),
            "features": requests["features"].take(chosen),
            "rows": _lists((pairs[order] & 0xFFFFFFFF).astype(np.int32), lengths),
            "stage": _lists(stage[order], lengths), "logit": _lists(logit[order], lengths),
            "labels": _lists(labels.ravel(), lengths * labels.shape[1]),
        })  # fmt: skip

    def _mark(
        self, done: np.ndarray, pairs: np.ndarray, place: dict[str, int], good: np.ndarray, seconds: np.ndarray, outcomes: Any
    ) -> None:
        """Sets what followed on each candidate in time, and counts everything else."""
        at = np.array([place.get(name, -1) for name in outcomes["id"].to_pylist()], np.int64)
        kind, row, time = (plain(outcomes[name]) for name in ("kind", "row", "time"))
        pair = (at << 32) | row
        found = np.minimum(np.searchsorted(pairs, pair), max(len(pairs) - 1, 0))
        delay = time - seconds[at]
        left = np.ones(len(at), bool)
        reasons = {
            "without a request": at < 0, "of a request that was left out": ~good[at],
            "of an item that was no candidate": pairs[found] != pair if len(pairs) else left,
            "before the request": delay < -self.encoder.max_skew,
        }  # fmt: skip
        for reason, wrong in reasons.items():
            self.ignored[reason] += int(np.count_nonzero(left & wrong))
            left &= ~wrong
        late = left & (delay > self.windows[kind])
        self.late.update(Counter(self.names[code] for code in kind[late].tolist()))
        left &= ~late
        done[found[left], kind[left]] = True
        self.ignored["more than once"] += int(np.count_nonzero(left)) - int(np.count_nonzero(done))

    def write(self, arrays: ArrayWriter) -> None:
        """Writes the samples in the order of users and times."""
        events, users = 0, 0
        maps = _renaming(self.encoder, self.target)
        arrays.add("offsets", np.zeros(2, np.int64))  # the unknown user has no event
        for part in range(self.parts):
            table = _table(self.work / "samples", part)
            if table is None:
                continue
            ids, user, time = table["id"].to_pylist(), plain(table["user"]), plain(table["time"])
            order = np.array(sorted(range(len(ids)), key=lambda at: (user[at], time[at], ids[at])))
            same = np.append(False, (np.diff(user[order]) == 0) & (np.diff(time[order]) == 0))
            self.left_out[SAME_SECOND] += int(np.count_nonzero(same))
            self.ignored["of a request that was left out"] += int(np.nansum(_values(table["labels"].take(order[same]))))
            order = order[~same]
            table, user, time = table.take(order), user[order], time[order]
            for start in range(0, len(order), ROWS):
                for name, array in self._features(table["features"].slice(start, ROWS).to_pylist(), maps).items():
                    arrays.add(f"features.{name}", array)
            arrays.add("version", plain(table["version"]))
            lengths = plain(pyarrow("pyarrow.compute").list_value_length(table["rows"]))
            owner = np.repeat(np.arange(len(order)), lengths)
            slot = owner, np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            flat = {name: _values(table[name]) for name in ("rows", "stage", "logit", "labels")}
            labels = flat["labels"].reshape(len(owner), len(self.names))
            self.outcomes.update({name: int(np.nansum(labels[:, at])) for at, name in enumerate(self.names)})
            labels = labels[:, : len(self.labels)]
            columns = {"rows": (flat["rows"], 0), "stage": (flat["stage"], 0), "labels.served": (flat["logit"], np.nan)}
            columns |= {f"labels.{name}": (labels[:, place], np.nan) for place, name in enumerate(self.labels)}
            for name, (values, fill) in columns.items():
                whole = np.full((len(order), self.most), fill, values.dtype)
                whole[slot] = values
                arrays.add(name, whole)
            exposed = flat["stage"] == EXPOSED
            reached = (np.nan_to_num(labels) * np.arange(2, labels.shape[1] + 2)).max(axis=1, initial=1)[exposed]
            shown = np.bincount(owner[exposed], minlength=len(order))
            keys, number = np.unique(user, return_inverse=True)
            ends = np.cumsum(np.bincount(number, weights=shown)).astype(np.int64)
            of_log = {"user": np.repeat((users + 1 + number).astype(np.int32), shown), "item": flat["rows"][exposed],
                      "action": reached.astype(np.int32), "time": np.repeat(time, shown), "offsets": events + ends,
                      "positions": events + np.cumsum(shown) - shown, "users": keys}  # fmt: skip
            for name, array in of_log.items():
                arrays.add(name, array)
            followed = np.bincount(owner, weights=(labels > 0).any(axis=1), minlength=len(order)) > 0
            self.without_outcome += int(np.count_nonzero(~followed))
            events, users, self.samples = events + int(shown.sum()), users + len(keys), self.samples + len(order)
        expect(self.samples > 0, "join_outcomes", "at least one request that can be a sample", self.summary())
        self.arrays = arrays.finish()

    def _features(self, records: list[bytes], maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Features of some requests by dotted name, with the encoder's places of history and the target's rows."""
        length, stacked = self.encoder.length, {}
        for at, record in enumerate(records):
            for name, array in logged_arrays(record).items():
                if name not in stacked:
                    shape = (length,) if name.startswith("history.") else array.shape
                    stacked[name] = np.zeros((len(records), *shape), array.dtype)
                place = (at, slice(len(array))) if name.startswith("history.") else at
                stacked[name][place] = array[:length] if name.startswith("history.") else array
        features = features_from(stacked, self.encoder.schema, encoding=self.encoder.version, name="request log, features")
        named = names_of(features)
        for name, rows in maps.items():
            for path in (f"ids.{name}", *(["history.item"] if name == "item" else [])):
                if path in named:
                    named[path] = rows[named[path]]
        return named


class Partitions:
    """Writes rows of columns into parts on disk, one Arrow file each, made when its first row comes."""

    def __init__(self, folder: Path, count: int):
        self._folder, self._count, self._writers = folder, count, {}

    def __enter__(self) -> Partitions:
        self._folder.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def add(self, ids: list[str], columns: Mapping[str, Any]) -> None:
        """Adds rows to the part of each request id."""
        if ids:
            self.add_to(hash_ids(ids, self._count + 1) - 1, {"id": pyarrow().array(ids, pyarrow().string())} | dict(columns))

    def add_to(self, part: np.ndarray, columns: Mapping[str, Any]) -> None:
        """Adds rows to the parts [n]."""
        if not len(part):
            return
        arrow = pyarrow()
        arrays = {name: arrow.array(value) if isinstance(value, np.ndarray) else value for name, value in columns.items()}
        table = arrow.table(arrays)
        for number in np.unique(part).tolist():
            rows = table.take(np.flatnonzero(part == number))
            if number not in self._writers:
                self._writers[number] = arrow.ipc.new_stream(str(self._folder / f"{number:03d}"), table.schema)
            self._writers[number].write_table(rows)


def _parts(files: Sequence[Path]) -> int:
    """How many parts the requests are cut into, by their size before compression."""
    size, rows = 0, 0
    for file in files:
        try:
            metadata = pyarrow("pyarrow.parquet").read_metadata(file)
        except pyarrow().ArrowException as error:
            raise ValueError(f"{file}: expected a request log: {error}") from error
        size += sum(metadata.row_group(at).total_byte_size for at in range(metadata.num_row_groups))
        rows += metadata.num_rows
    return min(MOST_PARTS, 1 + max(size // PART_BYTES, rows // PART_ROWS))


def _batches(files: Sequence[Path], columns: Sequence[str]) -> Iterator[Any]:
    """Tables of some rows of a request log."""
    for file in files:
        try:
            source = pyarrow("pyarrow.parquet").ParquetFile(file)
            missing = sorted(set(columns) - set(source.schema_arrow.names))
            expect(not missing, str(file), "the columns of a request log", f"none of {missing}")
            yield from (pyarrow().table(batch).combine_chunks() for batch in source.iter_batches(ROWS, columns=list(columns)))
        except pyarrow().ArrowException as error:
            raise ValueError(f"{file}: expected a request log: {error}") from error


def _table(folder: Path, part: int) -> Any:
    """One part, None where it has no row."""
    file = folder / f"{part:03d}"
    if not file.exists():
        return None
    with pyarrow().OSFile(str(file)) as source:
        table = pyarrow().ipc.open_stream(source).read_all().combine_chunks()
    file.unlink()
    return table


def _rows(codes: Codes, vocabulary: Vocabulary, name: str) -> np.ndarray:
    """int32 rows of a column's ids; ValueError for ids of another kind."""
    ids, of_kind = codes.distinct_ids(vocabulary.kind)
    strange = len(codes.distinct) - len(of_kind)
    expect(not strange, name, f"{vocabulary.kind} like the vocabulary", f"{strange} ids of another kind")
    rows = np.zeros(len(codes.distinct) + 1, np.int32)
    rows[of_kind] = vocabulary.encode(ids)
    return rows[codes.codes]


def _values(lists: Any) -> Any:
    """The values of all lists, one after another; strings as a list."""
    flat = lists.combine_chunks() if hasattr(lists, "combine_chunks") else lists
    flat = flat.flatten()
    return flat.to_pylist() if str(flat.type) == "string" else flat.to_numpy(zero_copy_only=False)


def _lists(values: np.ndarray, lengths: np.ndarray) -> Any:
    """An Arrow column of lists of these lengths."""
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return pyarrow().ListArray.from_arrays(offsets, pyarrow().array(values))


def _pairs(lists: Any) -> np.ndarray:
    """int64 (place << 32 | row) of every value of a column of lists of rows."""
    lengths = plain(pyarrow("pyarrow.compute").list_value_length(lists))
    return (np.repeat(np.arange(len(lengths)), lengths) << 32) | _values(lists)


def _key(users: list[str]) -> np.ndarray:
    """int64 [n] in [0, 2^62): what a user is grouped by."""
    halves = (hash_ids(users, 2**31, seed=seed).astype(np.int64) - 1 for seed in (0, 1))
    return (next(halves) << 31) | next(halves)


def _logits(requests: Any, pairs: np.ndarray, returned: np.ndarray) -> np.ndarray:
    """float32 [pairs] logits of the first objective as they were served, NaN where the log has none."""
    lengths = plain(pyarrow("pyarrow.compute").list_value_length(requests["logits"]))
    values, scored = _values(requests["logits"]), plain(requests["scored"])
    made = np.full(len(pairs), np.nan, np.float32)
    start = np.cumsum(lengths) - lengths
    for of_scores, listed in ((True, _pairs(requests["rows"])), (False, returned)):
        owner = listed >> 32
        items = np.bincount(owner, minlength=len(lengths))
        each = lengths // np.maximum(items, 1)  # objectives
        place = np.arange(len(listed)) - np.repeat(np.cumsum(items) - items, items)
        good = (scored[owner] == of_scores) & (each[owner] > 0)
        listed, source = listed[good], (start[owner] + place * each[owner])[good]
        first, which = np.unique(listed, return_index=True)
        found = np.searchsorted(pairs, first)
        inside = found < len(pairs)
        found, which, first = found[inside], which[inside], first[inside]
        same = pairs[found] == first
        made[found[same]] = values[source[which[same]]]
    return np.where(np.isfinite(made), made, np.float32(np.nan))  # an item that the index lacked, or that was excluded


def _renaming(before: Encoder, after: Encoder) -> dict[str, np.ndarray]:
    """The row in `after` of each row in `before`, 0 for what is gone, by vocabulary that changed."""
    pairs = {name: (vocabulary, after.vocabularies[name]) for name, vocabulary in before.vocabularies.items()}
    return {name: np.maximum(new_rows(*pair), 0).astype(np.int32) for name, pair in pairs.items() if pair[0] != pair[1]}
