"""The settings of a training run: `FitConfig`, which a caller gives, and the record that every checkpoint of a run carries."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from aif_jax.checkpoint import CheckpointError
from aif_jax.checks import Fields, expect, expect_types
from aif_jax.encoding.times import Moment
from aif_jax.registry import from_plain
from aif_jax.train.tasks import TASKS, NextItem, Task

LOWER_IS_BETTER = ("log_loss", "calibration_error")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig(Fields):
    """Settings of a training run. The defaults of `epochs`, `learning_rate` and `weight_decay` are those of all results.

    Attributes:
      epochs: how often every sample comes.
      batch_size: samples a step.
      learning_rate: learning rate of AdamW, after a warm-up and under a cosine decay.
      weight_decay: weight decay of AdamW.
      sparse: names of the tables that get sparse updates, see `make_step`; None: those of 20,000 rows or more.
      buckets: shorter lengths of the history, such as 128, 256, 512, 1024 for one of 2,048: samples of like length share a
        batch, which costs less padding, see `Pipeline`. Each length compiles once more; without any, all are padded to one;
        None: chosen from the histories and the number of steps (`data.lengths.choose_lengths`), or as the run had them.
      id_dropout: share of candidates that are trained without their item id, see `Pipeline` and `Run.with_unseen_items`.
      seed: seed of parameters, order and candidates.
      min_history: strictly earlier events that the user of a sample must have.
      validation: a share of the task's samples in the order of time, whatever `min_history` leaves of them, or the moment
        when the slice begins: an ISO date such as "2022-05-06", a `datetime`, or an integer in `Columns.time_unit`.
      test: likewise, the last slice, which is for `Run.evaluate`.
      since: train on samples from this moment on, a date or number as for `validation`; shares are of these.
        Histories and popularity still hold what was before; None: all samples.
      replay: how many samples from before `since`, drawn at random, are trained on too: a share of those after it.
      without: (first moment, first moment after) of samples that are never trained on, replayed or not, such as a period to
        judge on; dates or numbers as for `since`; None: trains on all.
      requests: samples of the validation slice that are evaluated, at most.
      k: k of HR@k and NDCG@k in the catalogue; None: it is not ranked.
      evaluate_every: steps between evaluations, each with a checkpoint, where a killed run resumes; None: once an epoch.
      keep_best: figure of the validation slice by which the best checkpoint is returned, such as "gauc" or, with a teacher or a
        cascade that has the label "ranker", "ranker_recall"; None: the last one is.

    Raises:
      ValueError: names the field, what was expected and what came.
    """

    epochs: int = 3
    batch_size: int = 256
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    sparse: tuple[str, ...] | None = None
    buckets: tuple[int, ...] | None = None
    id_dropout: float = 0.0
    seed: int = 0
    min_history: int = 1
    validation: Moment = 0.1
    test: Moment = 0.1
    since: Moment | None = None
    replay: float = 0.0
    without: tuple[Moment, Moment] | None = None
    requests: int = 2000
    k: int | None = 100
    evaluate_every: int | None = None
    keep_best: None | str = "gauc"

    def __post_init__(self):
        expect_types(self)
        for field in ("epochs", "batch_size", "requests", "k", "evaluate_every"):
            value = getattr(self, field)
            self.expect(value is None or value >= 1, field, "at least 1")
        for field in ("learning_rate", "weight_decay"):
            self.expect(0 <= getattr(self, field) < float("inf"), field, "a finite number of at least 0")  # NaN is none
        self.expect(0 <= self.replay < float("inf"), "replay", "a share of at least 0")
        self.expect(not self.replay or self.since is not None, "replay", "0 without since")
        self.expect(self.buckets is None or min(self.buckets, default=1) >= 1, "buckets", "lengths of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings(FitConfig):
    """A `FitConfig` with what model, data and task decided: the record of a run, which every checkpoint of it carries.

    Attributes:
      first_validation, first_test, since, without: moments in seconds.
      newest: the latest event of the data, in seconds; -1 for none.
      repeats: whether users come back to items, as the data has it, see `Dataset`.
      loss, optimizer, teacher, start: names or digests of the arguments of `fit`; None for none.
    """

    task: Task = NextItem()
    first_validation: int
    first_test: int
    newest: int = -1
    repeats: bool
    validation: None = None  # type: ignore[assignment]
    test: None = None  # type: ignore[assignment]
    since: int | None = None
    without: tuple[int, int] | None = None
    buckets: tuple[int, ...] = ()
    loss: str
    optimizer: str
    teacher: str | None = None
    start: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.without is not None:
            expect(self.without[0] < self.without[1], "fit without", "two moments, the first earlier", self.without)
        if self.keep_best is not None:
            best = repr(self.keep_best)
            expect(self.validates, "FitConfig.keep_best", "None without a validation slice", best)
            expect(self.keep_best in self.figures, "FitConfig.keep_best", f"one of {list(self.figures)}", best)

    @property
    def validates(self) -> bool:
        """Whether there is a validation slice."""
        return self.first_test > self.first_validation

    @property
    def figures(self) -> tuple[str, ...]:
        """Figures of the validation slice by which a checkpoint can be the best."""
        catalogue = () if self.k is None else (f"hr@{self.k}", f"ndcg@{self.k}")
        return ("auc", "gauc", "gauc_mean", "log_loss", "calibration_error", "ranker_recall", *catalogue)

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values; `from_json` reads it back."""
        values = dataclasses.asdict(self)
        values["task"] = {"name": type(self.task).__name__, **values["task"]}
        return json.loads(json.dumps(values))

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "settings") -> Self:
        """Return the settings that `to_json` wrote; CheckpointError for another record."""
        try:
            task = dict(value["task"])
            return from_plain(cls, {**value, "task": TASKS[task.pop("name")](**task)}, "settings")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: expected the record of a run, got another: {error!r}; restore it") from error

    def span(self, split: str) -> dict[str, Any]:
        """Return the first second of a slice, "train", "validation" or "test", and the first after it; None for no bound."""
        moments = self.since, self.first_validation, self.first_test, None
        expect(split in SPLITS, "split", f"one of {list(SPLITS)}", repr(split))
        place = SPLITS.index(split)
        return {"since": moments[place], "before": moments[place + 1]}
