"""Settings of a refresh."""

import dataclasses
from typing import Any, Literal

from aif_jax.checks import Fields, expect_types
from aif_jax.encoding.times import Moment
from aif_jax.export.writer import PLATFORMS
from aif_jax.refreshing.gate import GateConfig
from aif_jax.train.settings import FitConfig

OF_FIT = ("replay", "epochs", "batch_size", "learning_rate", "requests", "k")
"""Fields that are those of `FitConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshConfig(Fields):
    """Settings of a refresh. Dates and numbers of moments are as in `FitConfig`.

    Attributes:
      unknown: what to do with actions that the served model does not know, and with users and items of the events that neither
        it nor the file of users or items knows, see `read`.
      since: the moment from which events are new, a date or number; None: the end of the validation slice of the served
        model's run, or of the training of its refresh.
      forget: days without an event after which an item, a user, or an attribute value that came with them alone loses its row
        and is unknown to the new model; None: all keep theirs. Before the events reach back that far, nothing is forgotten. An
        item or user that is new gets a row with its first event.
      replay: earlier samples to train on too, as a share of the new ones, drawn at random.
      held_out: share of the new samples that the gate judges on, and again as many for a calibration.
      epochs: see `FitConfig`. One is enough, because the parameters are trained already.
      batch_size: see `FitConfig`.
      learning_rate: see `FitConfig`, a tenth of its default, because the parameters are trained already.
      seed: see `FitConfig`; None: that of the served model's training, so that tables fitted at random stay as they were.
      requests: at most so many of the held-out samples are evaluated, drawn at random. To notice a loss of 1 GAUC point on half
        of the days the gate needs 130 to 340, of different users.
      k: k of HR@k, for tasks that rank the catalogue.
      fixed: (first moment, first moment after) of an earlier period that both models are judged on too. No refresh trains on it
        from now on, replayed or not. None: the period that the served model's refresh used, or of a run its validation slice;
        if the events hold fewer than `GateConfig.users` users of it, the newest hours that the served model's gate judged on.
      gate: bounds of the gate.
      platforms: what the export is compiled for, see `export.save`.
      keep: exports that stay in the store.

    Raises ValueError: names the field, what was expected and what came.
    """

    unknown: Literal["skip", "error"] = "skip"
    since: Moment | None = None
    forget: float | None = None
    replay: float = 0.1
    held_out: float = 0.1
    epochs: int = 1
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int | None = None
    requests: int = 2000
    k: int = 100
    fixed: tuple[Moment, Moment] | None = None
    gate: GateConfig = GateConfig()
    platforms: tuple[str, ...] = PLATFORMS
    keep: int = 3

    def __post_init__(self):
        expect_types(self)
        self.expect(0 < self.held_out < 0.5, "held_out", "a share above 0, below 0.5")
        self.expect(self.forget is None or self.forget > 0, "forget", "days above 0")
        self.expect(self.keep >= 1, "keep", "at least 1")
        self.training(since=0, seed=self.seed or 0)

    def training(self, **others: Any) -> FitConfig:
        """Return the config of the training, with other fields of it; ValueError for values that `fit` refuses."""
        return FitConfig(**{name: getattr(self, name) for name in OF_FIT}, keep_best=None, **others)
