"""RecBole's SASRec with its full softmax (loss CE) and its `Trainer`, as the package ships them. It reads item ids alone.

Scores are the logarithms of its softmax, so that those of a user's requests have one level.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer

from experiments.peers.feeds.batches import Budget, Samples
from experiments.peers.lists import Lists
from experiments.peers.scores import Scorer

BATCH = 256
LENGTH = 20  # last events: a transformer over 50 is 2.5 times as slow
SETTINGS: dict[str, Any] = {
    "n_layers": 2,
    "n_heads": 2,
    "hidden_size": 64,
    "inner_size": 128,
    "hidden_dropout_prob": 0.2,
    "attn_dropout_prob": 0.2,
    "loss_type": "CE",
}


class Catalogue:
    """What the model asks of a RecBole data set: how many items there are."""

    def __init__(self, size: int):
        self.size = size

    def num(self, field: str) -> int:
        """Rows of a field's table; the model has one for items alone."""
        return self.size


class Loader:
    """Batches of histories and next items until the budget is spent."""

    def __init__(self, samples: Samples, budget: Budget, fields: tuple[str, str, str]):
        self.samples, self.budget, self.fields = samples, budget, fields

    def __iter__(self) -> Iterator[Interaction]:
        sequence, length, item = self.fields
        for places in self.samples.order(BATCH, np.arange(len(self.samples.items)), self.budget):
            batch = oldest_first(self.samples.histories[places, :LENGTH])
            target = torch.from_numpy(self.samples.items[places].astype(np.int64))
            yield Interaction({sequence: batch[0], length: batch[1], item: target})


def oldest_first(histories: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Histories as RecBole has them: oldest first, padding at the end; and their lengths, at least 1."""
    length = (histories > 0).sum(1)
    at = length[:, None] - 1 - np.arange(histories.shape[1])
    turned = np.where(at >= 0, np.take_along_axis(histories, np.maximum(at, 0), 1), 0)
    return torch.from_numpy(turned.astype(np.int64)), torch.from_numpy(np.maximum(length, 1).astype(np.int64))


def scores(name: str, lists: Lists, *, learning_rate: float, budget: Budget, seed: int) -> tuple[Scorer, dict[str, Any]]:
    """Trains the model; what scores the catalogue, and what the score file says of it."""
    torch.manual_seed(seed)
    samples = Samples(lists, negatives=0, seed=seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # its logs go to the working folder
        given = {
            **SETTINGS,
            "MAX_ITEM_LIST_LENGTH": LENGTH,
            "learning_rate": learning_rate,
            "epochs": 1,
            "train_neg_sample_args": None,
            "use_gpu": False,
            "checkpoint_dir": folder,
            "data_path": folder,
            "show_progress": False,
        }
        config = Config(model="SASRec", dataset="lists", config_dict=given)
        model = SASRec(config, Catalogue(len(lists.count)))
        trainer = Trainer(config, model)
        fields = (model.ITEM_SEQ, model.ITEM_SEQ_LEN, model.POS_ITEM_ID)
        trainer.fit(Loader(samples, budget, fields), saved=False, verbose=False)
    model.eval()
    histories = lists.recent(LENGTH)

    def scorer(places: np.ndarray) -> np.ndarray:
        sequence, length = oldest_first(histories[places])
        with torch.no_grad():
            logits = model.full_sort_predict(Interaction({model.ITEM_SEQ: sequence, model.ITEM_SEQ_LEN: length}))
            return torch.log_softmax(logits, dim=1).numpy()

    return scorer, {"logits": True, "settings": SETTINGS | {"batch": BATCH, "length": LENGTH}}
