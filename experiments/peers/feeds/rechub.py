"""torch-rechub's DSSM (point-wise) and YoutubeDNN (list-wise), its `MatchTrainer`, as the package ships them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.matching import DSSM, YoutubeDNN
from torch_rechub.trainers import MatchTrainer

from experiments.peers.feeds.batches import Budget, Samples, item_features, sizes, tensors, user_features
from experiments.peers.lists import Lists
from experiments.peers.scores import Scorer

WIDTH = 32
TOWER = [128, 64]
TEMPERATURE = 0.02  # of YoutubeDNN in the package's example
BATCH = 2048  # rows of the point-wise loss
LISTS = 256  # lists of the list-wise loss


class Loader:
    """Batches `({feature: tensor}, labels)` until the budget is spent."""

    def __init__(self, samples: Samples, budget: Budget, *, listwise: bool):
        self.samples, self.budget, self.listwise = samples, budget, listwise

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        each = 1 + self.samples.negatives
        size = LISTS if self.listwise else BATCH // each
        for places in self.samples.order(size, np.arange(len(self.samples.items)), self.budget):
            rows = self.samples.lists_at(places)
            histories = self.samples.histories[places]
            if self.listwise:
                batch = {"history": histories, "item": rows[:, 0], "negatives": rows[:, 1:]}
                yield tensors(batch), torch.zeros(len(rows), dtype=torch.long)
                continue
            lists = self.samples.lists
            user = {name: np.repeat(values, each, axis=0) for name, values in user_features(lists, histories).items()}
            labels = np.zeros(rows.shape, np.float32)
            labels[:, 0] = 1
            yield tensors(user | item_features(lists, rows.reshape(-1))), torch.from_numpy(labels.reshape(-1))


def scores(
    name: str, lists: Lists, *, learning_rate: float, budget: Budget, seed: int, temperature: float | None = None
) -> tuple[Scorer, dict[str, Any]]:
    """Trains "rechub-dssm" or "rechub-youtubednn".

    Returns:
      What scores the catalogue, and what the score file says of the model.

    Raises:
      ValueError: a temperature for the model whose package leaves it out.
    """
    torch.manual_seed(seed)
    listwise = name == "rechub-youtubednn"
    if temperature is not None and not listwise:
        raise ValueError(f"temperature: expected none for {name}, which ignores it, got {temperature}")
    temperature = (temperature or TEMPERATURE) if listwise else 1.0
    samples = Samples(lists, negatives=15 if listwise else 3, seed=seed)
    model = youtube(lists, samples.negatives, temperature) if listwise else dssm(lists)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MatchTrainer(
            model,
            mode=2 if listwise else 0,
            optimizer_params={"lr": learning_rate},
            n_epoch=1,
            model_path=folder,
        )
        trainer.fit(Loader(samples, budget, listwise=listwise))
        items = np.arange(len(lists.count), dtype=np.int32)
        features = {"item": items} if listwise else item_features(lists, items)
        histories = lists.recent(samples.histories.shape[1])
        requests = {"history": histories} if listwise else user_features(lists, histories)
        users = trainer.inference_embedding(model, "user", batches(requests), Path(folder)).numpy()
        rows = trainer.inference_embedding(model, "item", batches(features), Path(folder)).numpy()
    settings = {"negatives": samples.negatives, "width": WIDTH, "tower": TOWER, "temperature": temperature}
    return lambda places: users[places] @ rows.T / temperature, {"logits": True, "settings": settings}


def dssm(lists: Lists) -> DSSM:
    """Mean-pooled histories against items, with the fields and the content of both."""
    table = sizes(lists)
    fields = [name for name in table if name != "item"]
    history = [SequenceFeature("history", table["item"], WIDTH, "mean", shared_with="item", padding_idx=0)]
    history += [SequenceFeature(f"history_{f}", table[f], WIDTH, "mean", shared_with=f, padding_idx=0) for f in fields]
    item = [SparseFeature(name, size, WIDTH, padding_idx=0) for name, size in table.items()]
    if lists.content is not None:
        width = lists.content.shape[1]
        history.append(DenseFeature("history_content", width))
        item.append(DenseFeature("content", width))
    tower = {"dims": TOWER, "activation": "prelu"}  # with the default, relu, no cosine is below 0
    return DSSM(history, item, user_params=tower, item_params=tower)


def youtube(lists: Lists, negatives: int, temperature: float) -> YoutubeDNN:
    """Mean-pooled histories against item ids; the model has no item tower."""
    size, width = len(lists.count), TOWER[-1]
    history = [SequenceFeature("history", size, width, "mean", shared_with="item", padding_idx=0)]
    item = [SparseFeature("item", size, width, padding_idx=0)]
    others = [SequenceFeature("negatives", size, width, "concat", shared_with="item", padding_idx=0)]
    return YoutubeDNN(history, item, others, user_params={"dims": TOWER}, temperature=temperature)


def batches(features: dict[str, np.ndarray], size: int = 1024) -> Iterator[dict[str, torch.Tensor]]:
    """All rows in order."""
    for start in range(0, len(next(iter(features.values()))), size):
        yield tensors({name: values[start : start + size] for name, values in features.items()})
