"""`follow`: micro-batches of a stream move rows of the served model, and each that passes the gate is published as a delta.

    stream -> micro-batch -> train rows -> gate -> delta -> deltas of the store          every ten minutes
    files  -> refresh     -> export of the store, on which the next chain stands         every day

Towers, head and everything that is fitted stay as the last full refresh published them. Each export begins a new chain.

*Exactly once.* A micro-batch is one sealed folder: where it ends in the stream, its events, which of them were trained on, the
state of rows and optimizer, the verdict, and the delta. A process that is killed before the seal reads the same messages again;
one that is killed after it goes on behind them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import checkpoint, output
from aif_jax.checks import ArgumentError, expect
from aif_jax.config import Config
from aif_jax.connectors.follow import Follower, StreamEntry, tables_of
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.connectors.streams import UpdateStream
from aif_jax.data.candidates import SampleKey, SourceFn
from aif_jax.data.cascade import RECORD, join_samples
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import COLUMNS, EventLog
from aif_jax.data.pipeline import Pipeline
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.raw import column_of, plain
from aif_jax.encoding.times import STAMP_ZERO, shown
from aif_jax.encoding.vocabulary import as_ids
from aif_jax.export import Delta, MovedRows
from aif_jax.export.contents import open as open_model
from aif_jax.features import item_layout
from aif_jax.readers import read
from aif_jax.readers.read import read_samples
from aif_jax.readers.sources import Source
from aif_jax.readers.tables import Content
from aif_jax.refreshing.admission import Admission, NewItems, with_items
from aif_jax.refreshing.frozen import moving_tables, read_rows, rows_optimizer, rows_state, rows_step, with_fitted
from aif_jax.refreshing.gate import GateConfig, Requests, judge, measure
from aif_jax.refreshing.job import Job, begin
from aif_jax.refreshing.run import MODEL, USERS, publish, training_record
from aif_jax.service.models import DELTAS
from aif_jax.store import sealed
from aif_jax.store.folders import URL, local, remove_folder, remove_unfinished
from aif_jax.store.trained import Trained
from aif_jax.train.fit import expect_labels
from aif_jax.train.optimizers import ids_of
from aif_jax.train.tasks import TASKS, Goals, Task
from aif_jax.trees import leaves_by_path
from aif_jax.user_table import Written
from aif_jax.user_table.table import check_future

FORMAT = "aif_jax.follow/1"
MOST_DELTAS = 1008  # of a chain, a week of ten minutes each: a service that starts reads them all
STATE, DELTA = "state", "delta"  # folders in that of a micro-batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Followed:
    """What a call of `follow` came to: sums over its chains, whose micro-batches of earlier calls count too.

    Attributes:
      published, refused: micro-batches that were published, and that the gate refused.
      trained: samples of those that were published.
      waiting: samples that came and are not trained on yet: the newest, which the gate judged by, and what fills no batch.
      version: version at the end of the chain.
      admitted: items that got a row.
    """

    published: int
    refused: int
    trained: int
    waiting: int
    version: str
    admitted: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FollowSettings:
    """How micro-batches are trained and judged; fields as the arguments of `follow`."""

    tables: tuple[str, ...] | None = None
    held_out: float = 0.1
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    requests: int = 2000
    k: int | None = None
    gate: GateConfig = GateConfig()  # noqa: RUF009 frozen

    def __post_init__(self):
        expect(0 < self.held_out < 0.5, "held_out", "a share above 0, below 0.5", self.held_out)
        for name in ("batch_size", "requests"):
            expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


def follow(
    stream: UpdateStream | str | Path,
    events: Source | Dataset,
    *,
    out: str | Path,
    items: Source | None = None,
    users: Source | None = None,
    work: str | Path | None = None,
    content: Content | None = None,
    task: Task | None = None,
    admit_after: int | None = None,
    every: float = 600.0,
    batches: int | None = None,
    max_messages: int = 1000,
    tables: tuple[str, ...] | None = None,
    held_out: float = 0.1,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    requests: int = 2000,
    k: int | None = None,
    gate: GateConfig = GateConfig(),  # noqa: B008 frozen
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] | None = time.time,
    progress: bool = True,
) -> Followed:
    """Follows a stream of events: trains rows of the served model on micro-batches, and publishes each as a delta.

    The chain builds on the current export of the store. Events of the stream before the end of that
    model's training are not trained on; each later one that is a sample is, exactly once, whenever the process is killed.
    When the store has another export, a new chain begins on that one, from the start of what the stream keeps.

    A micro-batch needs a whole batch to train on, and as many users to judge by as the gate wants; until then events wait. The
    newest samples are for the gate, and trained on by the next micro-batch. One that the gate refuses is left out of the chain,
    its events stay in the histories, and the next one goes on from the last published version.

    Histories, and so published rows of users, have every event of the files and every one that came by the stream, once: an
    event of the stream with the user, item, action and second of one in the files is that one.

    Args:
      stream: raw events by column, see `connectors.encode`; open it with `connectors.open_stream`. Or the service's own log,
        for the tasks `Impressions` and `Cascaded`: a folder in which each run of `jobs.join_outcomes`, with the encoder of
        the served model, writes its folder of samples.
      events: files or tables of `read`, or a `Dataset` of the model's encoder: histories. With rows of users in the export it
        goes as far as they do: the files that `refresh` read, or newer ones. Samples bring the histories that were served, so
        with these the files are for the rows of users alone.
      out: snapshot store of exports; the deltas go to the store OUT/deltas, see `aif-jax serve OUT --mirror DIR`.
      items, users: files or tables of `read`; None with a `Dataset`. Index rows are made from these items.
      work: local folder of the sealed micro-batches; default: OUT.follow next to a local `out`.
      content: see `read`.
      task: see `fit`; None takes that of the served model.
      admit_after: events, of files and stream, after which a new item gets a free row of an item vocabulary of fixed size
        (`readers.admit`), by the delta of the next micro-batch; None: new items stay unknown until a full refresh, as they do
        without a free row. The items file is read again for its features; an item that it lacks waits.
      every: seconds between two micro-batches.
      batches: end after so many micro-batches; None: go on until stopped.
      max_messages: messages that are read at once.
      tables: embedding tables to train; None: item ids and user attributes. A changed row of another table, such as a
        category's, publishes all its items again.
      held_out: share of the waiting samples that the gate judges on.
      batch_size, learning_rate, seed: settings of the training, Adam on the rows that a batch reads.
      requests: at most so many of the held-out samples are evaluated.
      k: k of HR@k and the overlap over the catalogue; None judges by lists of candidates alone, which takes less time.
      gate: bounds, see `GateConfig`.
      stop: asked between two reads; True ends the call.
      clock: seconds since 1970. A message with an event more than the encoder's `max_skew` (60 s) later than its own time is
        rejected; one with an event so much later than this clock, whose time no broker confirms, ends the call. None takes any
        time.
      progress: whether to show a line for each micro-batch.

    Raises:
      WriterConflict: another process follows there.
      FileNotFoundError: no export in the store.
      StreamError: messages that were not read yet are gone.
      ClockError: events later than `clock`; the messages are read again by the next call.
      ValueError: an export that does not say until when it was trained, data or settings that do not fit, a chain of 1,008
        deltas; rows of users in the export, and files that end before them.
    """
    where, needed = str(out), f"a local folder for the micro-batches of {out}"
    expect(work is not None or not URL.match(where), "work", needed, work, error=ArgumentError)
    expect(every >= 0, "every", "0 seconds or more", every)
    folder = local(work if work is not None else f"{where.rstrip('/')}.follow", "work")
    settings = FollowSettings(
        tables=tables, held_out=held_out, batch_size=batch_size, learning_rate=learning_rate, seed=seed, requests=requests,
        k=k, gate=gate,
    )  # fmt: skip
    store = SnapshotStore(where)
    places = () if URL.match(where) else (local(where) / DELTAS,)
    done: list[Followed] = []
    say = output.say if progress else lambda line: None
    while True:
        root = store.current()
        if root is None:
            raise FileNotFoundError(
                f"{store.url}: expected a store with an export to build on, got none; start with aif-jax refresh"
            )
        arguments = {"root": root, "out": store.url, "task": repr(task), "tables": tables}
        arguments |= {} if admit_after is None else {"admit_after": admit_after}
        arguments |= {"samples": str(local(stream, "samples"))} if isinstance(stream, str | Path) else {}
        with output.hidden(not progress), begin(folder, arguments, places=places, say=say) as job:
            chain = Chain(job, store, root, functools.partial(
                _history, events, items, users, content=content, progress=progress, admit_after=admit_after, say=say,
            ), task=task, settings=settings, clock=clock, stream=stream)  # fmt: skip
            began = chain.number
            feed = chain.arrivals
            if isinstance(feed, Arrivals):
                feed = Follower(stream, feed, max_batch=max_messages)  # type: ignore[arg-type]  # no folder
            moved = chain.run(feed, every=every, batches=batches, stop=stop)
            batches = None if batches is None else batches - (chain.number - began)
            done.append(chain.summary())
        if not moved:
            names = ("published", "refused", "trained", "admitted")
            counts = {name: sum(getattr(each, name) for each in done) for name in names}
            return dataclasses.replace(done[-1], **counts)
        say(f"refresh: the store has another export than {root}: a new chain begins")


class Arrivals:
    """Events of the stream under the encoder of the export, in the order in which they came; a `Target` of a `Follower`.

    Events of unknown users are left out, and of those from before the chain the ones that the files have. With an admission,
    "item" has codes, as in the log of the files.
    """

    def __init__(
        self, encoder: Encoder, until: int, log: EventLog, clock: Callable[[], float] | None, admission: Admission | None
    ):
        self.encoder, self.until, self._log, self._clock, self._admission = encoder, until, log, clock, admission
        self._parts = [{name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}]
        self._used = np.zeros(0, bool)
        self.positions: dict[int, int] = {}
        self.saved: dict[int, int] = {}

    def apply(self, entries: Sequence[StreamEntry], *, position: int, partition: int) -> None:
        """As `Target.apply`."""
        parts = [self._encoded(table, written) for table, _, written in tables_of(entries)]
        for part in parts:  # all are encoded before one is added
            self.add(part)
        self.positions[partition] = position

    def __len__(self) -> int:
        return sum(len(part["user"]) for part in self._parts)

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Adds encoded events."""
        self._parts.append(columns)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """User, item, action and time in seconds of each event."""
        if len(self._parts) > 1:
            self._parts = [{name: np.concatenate([part[name] for part in self._parts]) for name in COLUMNS}]
        return self._parts[0]

    @property
    def used(self) -> np.ndarray:
        """bool [n] which were trained on or refused; to be written too."""
        if more := len(self) - len(self._used):
            self._used = np.concatenate([self._used, np.zeros(more, bool)])
        return self._used

    def resume(self, positions: Mapping[str, int]) -> None:
        """Goes on behind the positions of a sealed micro-batch, whose events were added."""
        self.positions = {int(partition): at for partition, at in positions.items()}
        self.saved = dict(self.positions)

    def tick(self) -> None:
        """Nothing to save: a micro-batch does."""

    def _encoded(self, table: Any, written: Written) -> dict[str, np.ndarray]:
        made, order = self.encoder.events(table)
        stamped = np.asarray(made.time)
        if self._clock is not None:
            confirmed = Written(*(leaf[order] for leaf in written))
            check_future(stamped, confirmed, clock=self._clock, skew=self.encoder.max_skew)
        name = self.encoder.columns.user
        user = self.encoder.vocabularies["user"].encode(as_ids(plain(column_of(table, name)), name))[order]
        item = made.item
        if self._admission is not None:
            item = self._admission.encode(self.encoder.item_ids(table, self.encoder.columns.item))[order]
        columns = {"user": user, "item": item, "action": made.action, "time": stamped.astype(np.int64) + STAMP_ZERO}
        columns = {each: np.asarray(column).astype(COLUMNS[each]) for each, column in columns.items()}
        counts, early = user > 0, columns["time"] < self.until
        counts[early] &= ~_among(self._log, {each: column[early] for each, column in columns.items()})
        return {each: column[counts] for each, column in columns.items()}


def _among(log: EventLog, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [n] which events a log has."""
    user, time = columns["user"], columns["time"]
    start, end = log.history_end_at(user, time), log.history_end_at(user, time + 1)  # events of that second
    found = np.zeros(len(user), bool)
    for more in range(int((end - start).max(initial=0))):
        at = np.minimum(start + more, end - 1)
        same = (log.item[at] == columns["item"]) & (log.action[at] == columns["action"])
        found |= (start + more < end) & same
    return found


class SampleRuns:
    """The service's own log as a stream: the runs of `jobs.join_outcomes` in a folder, with features as they were served.

    Their samples come in the order in which the runs came. It is what a `Follower` and its target are to a stream.

    A run that is there is whole, so a position is its number of samples by name. Samples without a history, and those from
    before `until`, count as used. Runs whose samples are all used are not read again.

    Raises what `read_samples` raises; ValueError for samples without a label that the task needs.
    """

    def __init__(self, folder: str | Path, data: Dataset, task: Task, objectives: tuple[str, ...], until: int):
        self.folder, self.until, self._data, self._task = local(folder, "samples"), until, data, task
        self._objectives = objectives
        self.positions: dict[str, int] = {}
        self.used = np.zeros(0, bool)

    def __len__(self) -> int:
        return len(self.used)

    def step(self, seconds: float) -> int:
        """Takes runs that are new, or waits; returns the number of their samples."""
        names = sorted(file.parent.name for file in self.folder.glob(f"[!.]*/{RECORD}"))
        before = len(self)
        for name in names:
            if name not in self.positions:
                self._add(name)
        if len(self) == before:
            time.sleep(seconds)
        return len(self) - before

    def flush(self) -> None:
        """Nothing to commit: folders stay."""

    def resume(self, positions: Mapping[str, int]) -> None:
        """Goes on behind the runs of a sealed micro-batch."""
        for name, count in positions.items():
            if name not in self.positions:
                self._add(name, count)

    def dataset(self) -> tuple[Dataset, np.ndarray]:
        """The runs with samples that wait, and the number of the sample at each position of their log, -1 for none."""
        names, starts = list(self.positions), np.cumsum([0, *self.positions.values()])
        some = [at for at, name in enumerate(names) if not self.used[starts[at] : starts[at + 1]].all()]
        if not some:
            return self._data, np.full(len(self._data.log), -1)
        folders = [self.folder / names[at] for at in some]
        data, (_, arrays) = read_samples(folders, self._data), join_samples(folders)
        serial = np.full(len(data.log), -1)
        serial[arrays["positions"]] = starts[some][arrays["run"]] + arrays["sample"]
        return data, serial

    def _add(self, name: str, count: int | None = None) -> None:
        data = read_samples(self.folder / name, self._data)
        expect_labels(self._task, data, self._objectives)
        usable = self._task.positions(data, min_history=1, since=self.until, before=None)
        used = ~np.isin(data.cascade.positions, usable)  # type: ignore[union-attr]
        self.positions[name], self.used = len(used) if count is None else count, np.append(self.used, used)


class Chain:
    """The micro-batches on one export, as far as a job has sealed them; what is sealed and not published is published."""

    def __init__(
        self, job: Job, store: SnapshotStore, root: str, history: Callable[[Trained], History], *, task: Task | None,
        settings: FollowSettings, clock: Callable[[], float] | None, stream: UpdateStream | str | Path,
    ):  # fmt: skip
        record = job.step("current", functools.partial(_keep, store, root))
        trained = checkpoint.load(job.path("current") / MODEL).trained()
        known = dict(record["task"])
        task = TASKS[known.pop("name")](**known) if task is None else task
        data, log, admission = history(trained)
        objectives, until = trained.config.objectives, record["until"]
        wanted, name = "requests" if isinstance(stream, str | Path) else "events", type(task).__name__
        expect(task.samples == wanted, "follow task", f"one whose samples are {wanted}", name)
        if record["users"] and data.log.time.max(initial=-1) < record["newest"]:
            expected = f"files with the events in the rows of users of {root}, the last at {shown(record['newest'])}"
            got = f"none after {shown(data.log.time.max(initial=0))}; give the files that refresh read, or newer ones"
            raise ValueError(f"follow events: expected {expected}, got {got}")
        if isinstance(stream, str | Path):
            expect(admission is None, "admit_after", "None with samples, which have no raw ids", "a number; leave it out")
            expect(settings.k is None, "k", f"None for {name}, which ranks lists", settings.k)
            self.arrivals: Arrivals | SampleRuns = SampleRuns(stream, data, task, objectives, until)
        else:
            expect_labels(task, data, objectives)
            self.arrivals = Arrivals(trained.need_encoder("follow"), until, log, clock, admission)
        self.job, self.store, self.root, self.task, self.settings = job, store, root, task, settings
        self.trained = trained  # of the last published version
        self.data = data  # catalogue and users under its encoder
        self.log, self.admission = log, admission  # events of the files, with codes of items where there is an admission
        self.with_users: bool = record["users"]
        self.tables, optimizer = moving_tables(trained.config.schema, settings.tables), rows_optimizer(settings.learning_rate)
        self.state = rows_state(trained.params, self.tables, optimizer)
        self.step = rows_step(trained.model, optimizer, loss=task.loss or Goals.of(objectives), tables=self.tables)
        self.number = self.deltas = self.refused = self.samples = self.admitted = 0  # `number` of the last micro-batch
        self.sealed_arrivals = self.published_arrivals = 0  # events in it, and in the users' rows of the published version
        self._resume()

    def run(self, feed: Follower | SampleRuns, *, every: float, batches: int | None, stop: Callable[[], bool]) -> bool:
        """Follows until `stop`, or `batches` micro-batches more; True where the store has another export."""
        due, last, tried = time.monotonic() + every, None if batches is None else self.number + batches, -1
        while not stop() and (last is None or self.number < last):
            feed.step(min(0.2, max(0.01, every)))
            if time.monotonic() < due:
                continue
            due = time.monotonic() + every
            if self.store.current() != self.root:
                return True
            if len(self.arrivals) > tried and self.micro_batch():
                feed.flush()
            tried = len(self.arrivals)
        return False

    def summary(self) -> Followed:
        """What this chain has."""
        waiting = len(self._waiting(*self._current()[2:]))
        return Followed(
            published=self.deltas, refused=self.refused, trained=self.samples, waiting=waiting, version=self.trained.version,
            admitted=self.admitted,
        )  # fmt: skip

    def micro_batch(self) -> bool:
        """Trains, judges, seals and publishes what waits; False where too little does."""
        base, new, data, serial = self._current(admit=True)
        train, held = self._split(data, self._waiting(data, serial))
        if not len(train) or self._users_to_judge_by(data, held) < self.settings.gate.users:
            return False
        if self.deltas >= MOST_DELTAS:
            raise ValueError(f"follow: expected a chain of at most {MOST_DELTAS} deltas, got one more; run a full refresh")
        number = self.number + 1
        record = self.job.step(name_of(number), functools.partial(self._make, base, new, data, serial, train, held))
        self._take_over(number, record)
        return True

    def _make(
        self, base: Trained, new: NewItems | None, data: Dataset, serial: np.ndarray, train: np.ndarray, held: np.ndarray,
        partial: Path,
    ) -> dict[str, Any]:  # fmt: skip
        """The micro-batch in its folder."""
        before = jax.tree.map(jnp.copy, self.state)
        if new is not None:
            self.state = with_fitted(self.state, base.params)
        rows = self._train(base.config, data, train)
        reasons, metrics, delta = self._judge(data, held, rows, new)
        status = "refused" if reasons else "published" if rows else "nothing moved"
        if delta is not None and not reasons:
            delta.save(partial / DELTA)
        state = self.state = self.state if status == "published" else before
        arrays = {
            "tables": state.trained["embedding"], "step": state.step,
            "optimizer": {str(place): leaf for place, leaf in enumerate(jax.tree.leaves(state.opt_state))},
        }  # fmt: skip
        sealed.write(partial / STATE, arrays, {}, format=FORMAT)
        parts: dict[str, Any] = {"used": serial[train]}
        if isinstance(self.arrivals, Arrivals):
            parts["arrived"] = {name: column[self.sealed_arrivals :] for name, column in self.arrivals.columns.items()}
        if self.admission is not None:
            parts["others"] = self.admission.to_arrays(parts["arrived"]["item"])
        if new is not None and status == "published":
            parts["features"] = leaves_by_path(new.features, separator=".")
        sealed.write(partial / "events", parts, {}, format=FORMAT)
        moved = ", ".join(f"{len(each.at):,} rows of {name}" for name, each in rows.items()) or "none"
        line = f"{status}: {len(train):,} samples until {shown(data.log.time[train].max())}; moved: {moved}"
        line += f"; {len(new.items.ids.raw):,} new items" if new is not None else ""
        return {
            "line": line + "".join(f"; {reason}" for reason in reasons), "status": status, "reasons": reasons,
            "metrics": metrics, "samples": len(train), "requests": len(held), "positions": dict(self.arrivals.positions),
            "items": 0 if delta is None else len(delta.items.key), "base": self.trained.version,
        }  # fmt: skip

    def _train(self, config: Config, data: Dataset, positions: np.ndarray) -> dict[str, MovedRows]:
        """Trains on samples; the rows that moved since the last published version."""
        read = {name: [np.zeros(1, np.int32)] for name in self.tables}
        feed = Pipeline(
            dataset=data, positions=np.sort(positions), candidates=self._source(data, positions), config=config,
            batch_size=self.settings.batch_size, seed=self.settings.seed + self.number,
        )  # fmt: skip
        for fed in feed.batches():
            if fed.problem is not None and fed.problem != "empty":
                raise ValueError(f"follow: expected batches of whole records, got one with {fed.problem}{fed.origin}")
            if fed.batch is None:
                continue
            for name, rows in read.items():
                rows.append(np.unique(ids_of(name, self.state.fitted, fed.batch.users, fed.batch.items, config=config)))
            users = dataclasses.replace(fed.batch.users, encoding="")  # of which no compiled function depends
            self.state, _ = self.step(self.state, dataclasses.replace(fed.batch, users=users))
        moved = {}
        for name, parts in read.items():
            at = np.unique(np.concatenate(parts)).astype(np.int32)
            tables = self.state.trained["embedding"], self.trained.params["embedding"]
            new, old = (read_rows(each[name], at) for each in tables)
            differ = (new.view(np.uint32) != old.view(np.uint32)).any(axis=1)
            if differ.any():
                moved[name] = MovedRows(at[differ], new[differ])
        return moved

    def _judge(
        self, data: Dataset, held: np.ndarray, rows: dict[str, MovedRows], new: NewItems | None
    ) -> tuple[list[str], dict[str, Any], Delta | None]:
        """The gate's reasons and metrics, and the delta that it judged."""
        if not rows:
            return [], {}, None
        if not all(np.isfinite(each.values).all() for each in rows.values()):
            return ["newest: a row that moved is not finite; bound: none"], {}, None
        histories, also = self.data, np.zeros(0, np.int64)  # samples add nothing to the histories of the files
        if isinstance(self.arrivals, Arrivals):
            histories, also = data, np.unique(self.arrivals.columns["user"][self.published_arrivals :])
        delta = Delta.make(
            self.trained, rows, data.catalogue, number=self.deltas + 1, admitted=new and new.items, also=also,
            events=histories if self.with_users else None,
        )  # fmt: skip
        asked = Requests(
            data=data, positions=held, candidates=self._source(data, held, held_out=True), k=self.settings.k,
            calibration_negatives=self.task.calibration_negatives, repeats=data.repeats,
        )  # fmt: skip
        measured = measure(delta.trained(self.trained), asked), measure(self.trained, asked)
        verdict = judge({"newest": measured}, self.settings.gate)
        return list(verdict.reasons), verdict.plain_metrics()["newest"], delta

    def _source(self, data: Dataset, positions: np.ndarray, *, held_out: bool = False) -> SourceFn:
        times = data.log.time[positions]
        before = int(times.min() if held_out else times.max() + 1)
        return self.task.source(data, before=before, held_out=held_out, repeats=data.repeats)

    def _current(self, *, admit: bool = False) -> tuple[Trained, NewItems | None, Dataset, np.ndarray]:
        """Everything that came: the model with the items that are admitted now, these, the data, and `_dataset`'s numbers."""
        if isinstance(self.arrivals, SampleRuns):
            return self.trained, None, *self.arrivals.dataset()
        columns, serial = self._events(self.arrivals.columns)
        new = None
        if admit and self.admission is not None:
            new = self.admission.new_items(columns["item"], columns["time"], self.trained)
        base, data = self._with(new)
        return base, new, *self._dataset(data, columns, serial)

    def _events(self, came: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The events of the files and of the stream by column, and the number of each in the stream, -1 for none."""
        log = self.log
        columns = {name: np.concatenate([getattr(log, name), came[name]]) for name in COLUMNS}
        serial = np.concatenate([np.full(len(log), -1), np.arange(len(came["user"]))])
        order = np.lexsort((serial, columns["action"], columns["item"], columns["time"], columns["user"]))
        columns, serial = {name: column[order] for name, column in columns.items()}, serial[order]
        # of equal events those of the files come first: each of them is the one of the stream that has its place
        differs = np.any([np.diff(column) != 0 for column in columns.values()], axis=0)
        first = np.maximum.accumulate(np.where(np.append(True, differs)[: len(serial)], np.arange(len(serial)), 0))
        filed = np.bincount(first, serial < 0, minlength=len(serial)).astype(np.int64)[first]
        place = np.arange(len(serial)) - first - filed  # among those of the stream
        twice = (place >= 0) & (place < filed)
        serial[(first + place)[twice]] = serial[twice]
        return {name: column[~twice] for name, column in columns.items()}, serial[~twice]

    def _dataset(self, data: Dataset, columns: dict[str, np.ndarray], serial: np.ndarray) -> tuple[Dataset, np.ndarray]:
        """The events as the log of `data`, and the number of each of its positions in the stream."""
        if self.admission is not None:  # those of one moment are ordered by the row of the item
            columns = columns | {"item": self.admission.rows(data.encoder)[columns["item"]]}  # type: ignore[arg-type]
            order = np.lexsort((serial, columns["action"], columns["item"], columns["time"], columns["user"]))
            columns, serial = {name: column[order] for name, column in columns.items()}, serial[order]
        whole = EventLog.from_arrays(*(columns[name] for name in COLUMNS), users=self.log.users)
        return dataclasses.replace(data, log=whole), serial

    def _with(self, new: NewItems | None) -> tuple[Trained, Dataset]:
        """Model and data with the rows of new items."""
        if new is None:
            return self.trained, self.data
        base, data = new.items.trained(self.trained), self.data
        encoder = base.need_encoder("follow")
        log = EventLog.from_arrays(*(np.zeros(0, np.int64) for _ in COLUMNS), users=self.log.users)
        made = dataclasses.replace(
            data, schema=encoder.schema, catalogue=with_items(data.catalogue, encoder, new), items=encoder.vocabularies["item"],
            encoder=encoder, log=log,
        )  # fmt: skip
        return base, made

    def _waiting(self, data: Dataset, serial: np.ndarray) -> np.ndarray:
        """Positions of samples of the stream that are not used yet, by time."""
        if (serial < 0).all():
            return np.zeros(0, np.int64)
        positions = self.task.positions(data, min_history=1, since=self.arrivals.until, before=None)
        own = serial[positions]
        positions = positions[(own >= 0) & ~self.arrivals.used[own]]
        return positions[np.lexsort((serial[positions], data.log.time[positions]))]

    def _split(self, data: Dataset, waiting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples to train on, whole batches of the oldest, and of the newest at most `requests` for the gate."""
        held = int(np.ceil(self.settings.held_out * len(waiting)))
        size, newest = self.settings.batch_size, waiting[len(waiting) - held :]
        if held > self.settings.requests:
            newest = np.sort(np.random.default_rng(0).choice(newest, self.settings.requests, replace=False))
        return waiting[: (len(waiting) - held) // size * size], newest

    def _users_to_judge_by(self, data: Dataset, held: np.ndarray) -> int:
        """Users who have candidates of both labels, as the gate counts them."""
        if not len(held):
            return 0
        lists, users = self._source(data, held, held_out=True)(held, SampleKey(0, 0, 0)), data.log.user[held]
        labels = next(iter(lists.labels.values())) if isinstance(lists.labels, dict) else lists.labels
        positive, negative = ((lists.rows > 0) & of_label for of_label in (labels > 0, labels <= 0))
        return len(np.intersect1d(users[positive.any(axis=1)], users[negative.any(axis=1)]))

    def _resume(self) -> None:
        while (record := self.job.sealed(name_of(self.number + 1))) is not None:
            number = self.number + 1
            events = sealed.read(self.job.path(name_of(number)) / "events", format=FORMAT)
            if self.admission is not None:
                item = self.admission.from_arrays(events["arrived"]["item"], events["others"])
                events["arrived"] = {**events["arrived"], "item": item}
            if isinstance(self.arrivals, Arrivals):
                self.arrivals.add(events["arrived"])
            self.job.say(f"refresh: {name_of(number)}: {record['line']} (done before)")
            self._take_over(number, record)
        if self.number:
            trees = sealed.read(self.job.path(name_of(self.number)) / STATE, format=FORMAT)
            leaves = [jnp.array(trees["optimizer"][str(place)]) for place in range(len(trees["optimizer"]))]
            optimizer = jax.tree.unflatten(jax.tree.structure(self.state.opt_state), leaves)
            tables = {name: jnp.array(table) for name, table in trees["tables"].items()}
            self.state = dataclasses.replace(
                self.state, trained={"embedding": tables}, opt_state=optimizer, step=jnp.array(trees["step"])
            )
            if self.admitted:
                self.state = with_fitted(self.state, self.trained.params)

    def _take_over(self, number: int, record: Mapping[str, Any]) -> None:
        """Counts a sealed micro-batch whose events are among the arrivals, and publishes its delta unless that is done."""
        folder = self.job.path(name_of(number))
        self.arrivals.resume(record["positions"])
        self.number, self.sealed_arrivals = number, len(self.arrivals)
        events = sealed.read(folder / "events", format=FORMAT)
        self.arrivals.used[events["used"]] = True
        self.refused += record["status"] == "refused"
        before = self.job.path(name_of(number - 1))
        remove_unfinished(before)  # of a process that was killed in the next line
        if (before / STATE).is_dir():
            remove_folder(before / STATE)  # only the last one is read
        if record["status"] != "published":
            return
        self.deltas += 1
        self.samples += record["samples"]
        self.published_arrivals = self.sealed_arrivals
        delta = Delta.load(folder / DELTA)
        if delta.admitted is not None:
            layout = item_layout(self.trained.config.schema)
            leaves = [events["features"][name] for name in leaves_by_path(layout, separator=".")]
            features = jax.tree.unflatten(jax.tree.structure(layout), leaves)
            self.data = self._with(NewItems(delta.admitted, features))[1]
            self.admitted += len(delta.admitted.ids.raw)
        self.trained = delta.trained(self.trained)
        deltas = self.store.below(DELTAS, keep=MOST_DELTAS)
        self.job.step(f"publish {number:06d}", functools.partial(publish, deltas, folder / DELTA))


def name_of(number: int) -> str:
    """The step of a micro-batch."""
    return f"batch {number:06d}"


def _keep(store: SnapshotStore, root: str, partial: Path) -> dict[str, Any]:
    """The model of the export that the chain builds on, and until when it was trained."""
    fetched = store.fetch(partial / "fetched", root)
    trained, with_users = open_model(fetched), (fetched / USERS).is_dir()
    record = training_record(trained, fetched)
    if record["until"] is None:
        expected = "an export that says until when it was trained, as those of refresh and of a run do"
        raise ValueError(f"{store.url}: {root}: expected {expected}, got one that does not; run a full refresh with --since")
    trained.need_encoder("follow")
    checkpoint.save(partial / MODEL, trained)
    remove_folder(partial / "fetched")
    line = f"{root}, version {trained.version[:12]}, trained until {shown(record['until'])}"
    return {"line": line, "users": with_users, **{name: record[name] for name in ("until", "newest", "task")}}


History: TypeAlias = tuple[Dataset, EventLog, Admission | None]


def _history(
    events: Source | Dataset, items: Source | None, users: Source | None, trained: Trained, *, content: Content | None,
    progress: bool, admit_after: int | None, say: Callable[[str], None],
) -> History:  # fmt: skip
    """The data under the encoder of the model, the log of the files, and how items that it lacks get a row."""
    encoder = trained.need_encoder("follow")
    if admit_after is not None:
        given = None if isinstance(events, Dataset) else items
        admission = Admission(encoder, given, content, admit_after, say)
        return *admission.read(events, users, progress=progress), admission
    if isinstance(events, Dataset):
        expect(events.encoding == encoder.version, "follow data", f"a Dataset of encoding {encoder.version}", events.encoding)
        return events, events.log, None
    if items is None:
        raise ValueError("follow items: expected the items file that belongs to events, got None")
    data = read(events, items=items, users=users, encoder=encoder, content=content, unknown="skip", progress=progress)
    return data, data.log, None
