"""FuxiCTR's DSSM and DIN with its `BaseModel.fit`. The package's wheel has the framework, not these models: their files are
`model_zoo/NAME/src/NAME.py` of a checkout of FuxiCTR, whose folder `model_zoo` the environment variable FUXICTR_ZOO names.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap

from experiments.peers.feeds.batches import Budget, Samples, item_features, sizes, tensors, user_features
from experiments.peers.lists import Lists
from experiments.peers.scores import Scorer

WIDTH = {"DSSM": 32, "DIN": 16}
TOWER = [128, 64]  # of DSSM, and DIN's MLP
DIN_LENGTH = 20  # last events: DIN's attention is an MLP over every pair of candidate and event
BATCH = 2048  # rows
NEGATIVES = 4
MONITORED = 0.01  # of the positives: held out, for the package's choice of the best weights and its early stopping
EVALUATED = 50  # steps between two looks at them
LABEL = "label"


class Loader:
    """Batches of positives and their negatives, flat: `{feature: tensor}` with labels."""

    def __init__(self, samples: Samples, places: np.ndarray, budget: Budget | None, length: int):
        self.samples, self.places, self.budget, self.length = samples, places, budget, length

    def __len__(self) -> int:
        """Batches of one time round; the package prints it."""
        return -(-len(self.places) // self.size)

    @property
    def size(self) -> int:
        """Positives in a batch."""
        return BATCH // (1 + self.samples.negatives)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Without end until the budget is spent, then on to the package's next look; without a budget one time round."""
        if self.budget is None:
            for start in range(0, len(self.places), self.size):
                yield self.batch(self.places[start : start + self.size])
            return
        for places in self.samples.order(self.size, self.places, self.budget, rounded=EVALUATED):
            yield self.batch(places)

    def batch(self, places: np.ndarray) -> dict[str, torch.Tensor]:
        """Features and labels of some positives and their negatives."""
        rows, lists = self.samples.lists_at(places), self.samples.lists
        user = user_features(lists, self.samples.histories[places, : self.length])
        labels = np.zeros(rows.shape, np.float32)
        labels[:, 0] = 1
        made = {name: np.repeat(values, rows.shape[1], axis=0) for name, values in user.items()}
        return tensors(made | item_features(lists, rows.reshape(-1)) | {LABEL: labels.reshape(-1)})


def scores(
    name: str, lists: Lists, *, learning_rate: float, budget: Budget, seed: int
) -> tuple[Scorer | np.ndarray, dict[str, Any]]:
    """Trains "fuxictr-dssm" or "fuxictr-din".

    Returns:
      What scores the catalogue, of DIN the scores [R, C] of the candidates alone; and what the score file says of the model.

    Raises:
      FileNotFoundError: FUXICTR_ZOO does not name a folder with the model's file.
    """
    torch.manual_seed(seed)
    zoo = name.removeprefix("fuxictr-").upper()
    samples = Samples(lists, negatives=NEGATIVES, seed=seed)
    length = DIN_LENGTH if zoo == "DIN" else samples.histories.shape[1]
    if zoo == "DIN":
        target, sequence = zip(*((field, history_of(field)) for field in sizes(lists)), strict=True)
        given: dict[str, Any] = dict(dnn_hidden_units=TOWER, din_target_field=[target], din_sequence_field=[sequence])
    else:
        given = dict(user_tower_units=TOWER, item_tower_units=TOWER)
    shuffled = samples.rng.permutation(len(samples.items))
    monitored = max(1, int(MONITORED * len(shuffled)))
    with tempfile.TemporaryDirectory() as folder:
        model = class_of(zoo)(
            feature_map(lists, folder, pooled=zoo == "DSSM", width=WIDTH[zoo]),
            learning_rate=learning_rate,
            embedding_dim=WIDTH[zoo],
            optimizer="adam",
            loss="binary_crossentropy",
            metrics=["AUC"],
            monitor="AUC",
            eval_steps=EVALUATED,
            early_stop_patience=10_000,  # the budget ends the training; the best weights are kept
            model_root=folder,
            verbose=0,
            **given,
        )
        Path(model.model_dir).mkdir(parents=True, exist_ok=True)
        held = Loader(samples, shuffled[:monitored], None, length)
        model.fit(Loader(samples, shuffled[monitored:], budget, length), epochs=1, validation_data=held)
    model.eval()
    about = {"logits": True, "settings": {"negatives": NEGATIVES, "width": WIDTH[zoo], "tower": TOWER, "length": length}}
    requests = user_features(lists, lists.recent(length))
    if zoo == "DIN":
        return candidate_logits(model, lists, requests), about
    users = tower(model, "user", requests)
    rows = tower(model, "item", item_features(lists, np.arange(len(lists.count), dtype=np.int32)))
    first = lists.candidates[:, 0]
    expect_equal(model, requests, item_features(lists, first), (users * rows[first]).sum(1))
    return lambda places: users[places] @ rows.T, about


def candidate_logits(model: Any, lists: Lists, requests: dict[str, np.ndarray], size: int = 20) -> np.ndarray:
    """The logits [R, C] of every request's candidates, from the model's probabilities."""
    made = []
    with torch.no_grad():
        for start in range(0, len(lists.candidates), size):
            items = lists.candidates[start : start + size]
            users = {name: np.repeat(values[start : start + size], items.shape[1], 0) for name, values in requests.items()}
            found = model.forward(tensors(users | item_features(lists, items.reshape(-1))))["y_pred"]
            made.append(torch.logit(found.double(), eps=1e-7).numpy().reshape(items.shape))
    return np.concatenate(made)


def class_of(zoo: str) -> Any:
    """A model's class from its file."""
    named, file = os.environ.get("FUXICTR_ZOO", ""), Path(zoo, "src", f"{zoo}.py")
    path = Path(named) / file
    if not named or not path.is_file():
        raise FileNotFoundError(
            f"FUXICTR_ZOO: expected the folder model_zoo of a checkout of FuxiCTR with {file}, got {named!r}"
        )
    spec = importlib.util.spec_from_file_location(f"fuxictr_zoo_{zoo.lower()}", path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, zoo)


def history_of(field: str) -> str:
    """The name of a field's feature in the history."""
    return "history" if field == "item" else f"history_{field}"


def feature_map(lists: Lists, folder: str, *, pooled: bool, width: int) -> FeatureMap:
    """The features of `batches` in FuxiCTR's words; those of a history share the item's tables, `pooled` or as they are."""
    made = FeatureMap("lists", folder)
    made.labels = [LABEL]
    made.default_emb_dim = width
    encoder = {"feature_encoder": "layers.MaskedAveragePooling()"} if pooled else {}
    features: dict[str, dict[str, Any]] = {}
    for name, size in sizes(lists).items():
        features[name] = {"type": "categorical", "source": "item", "vocab_size": size, "padding_idx": 0}
    for name, size in sizes(lists).items():
        sequence = {"type": "sequence", "source": "user", "vocab_size": size, "padding_idx": 0}
        features[history_of(name)] = sequence | {"share_embedding": name} | encoder
    if lists.content is not None:
        for name, source in (("content", "item"), ("history_content", "user")):
            features[name] = {"type": "embedding", "source": source, "pretrain_dim": lists.content.shape[1]}
    made.features = OrderedDict(features)
    made.num_fields = len(features)
    return made


def tower(model: Any, source: str, features: dict[str, np.ndarray], size: int = 1024) -> np.ndarray:
    """The output of one tower for all rows, as the model's `forward` computes it before the dot product."""
    made = []
    with torch.no_grad():
        for start in range(0, len(next(iter(features.values()))), size):
            batch = tensors({name: values[start : start + size] for name, values in features.items()})
            embedded = model.embedding_layer(batch)
            joined = model.embedding_layer.dict2tensor(embedded, feature_source=source).flatten(start_dim=1)
            made.append((model.user_tower if source == "user" else model.item_tower)(joined).numpy())
    return np.concatenate(made)


def expect_equal(model: Any, users: dict[str, np.ndarray], items: dict[str, np.ndarray], logits: np.ndarray) -> None:
    """Raises unless the model's `forward` gives the probabilities of these logits [R], those of `tower`."""
    with torch.no_grad():
        got = model.forward(tensors(users | items))["y_pred"].numpy()[:, 0]
    largest = float(np.abs(got - 1 / (1 + np.exp(-logits.astype(np.float64)))).max())
    if largest > 1e-4:
        raise RuntimeError(f"fuxictr-dssm: expected the towers to give what the model's forward gives, got {largest} apart")
