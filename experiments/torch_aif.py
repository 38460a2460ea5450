"""The network of `presets.aif` in plain PyTorch, split as our serving splits it: what `runtimes` compares serving with.

It starts from the JAX parameters; the script checks that logits agree. Needs the extra "benchmarks".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aif_jax as aif
from aif_jax import ItemRow
from aif_jax.blocks import Bea, DotProduct, LinearMemory, MatchingStatistics
from aif_jax.layers import AGE_BUCKETS


class TorchServing(nn.Module):
    """One user at a time: `state` before the candidates are there, `best` after.

    Blocks that are linear in what the user brings take in the head's kernels before the candidates, as ours do. Rows are of the
    whole catalogue, as `ItemIndex` holds them: a gather of two tables takes the place of the item function.
    """

    def __init__(self, params: dict[str, Any], config: aif.Config, rows: ItemRow):
        super().__init__()
        if not [type(block) for block in config.blocks] == [MatchingStatistics, Bea, LinearMemory, DotProduct]:
            raise ValueError(f"TorchServing: expected the blocks of presets.aif, got {config.blocks}")
        self.config = config
        self.matching, self.bea, self.memory, self.dot = config.blocks
        trained = {name: group for name, group in params.items() if name != "fitted"}
        leaves = jax.tree_util.tree_leaves_with_path(trained)
        self.weights = nn.ParameterDict(
            {_key(jax.tree_util.keystr(path, simple=True, separator="/")): nn.Parameter(_tensor(leaf)) for path, leaf in leaves}
        )
        self._fields = {name: _tensor(array) for name, array in params["fitted"]["fields"].items()}
        floats = [np.asarray(part) for part in (rows.vector, rows.blocks[self.bea.name])]
        self.widths = [part.shape[1] for part in floats]
        self.floats = nn.Parameter(_tensor(np.concatenate(floats, 1)))
        self.values = nn.Buffer(_tensor(rows.blocks[self.matching.name]))

    def state(self, item: Tensor, action: Tensor, age: Tensor, mask: Tensor, *ids: Tensor) -> list[Tensor]:
        """Return what `best` reads of a user: features of one user, ids in the order of the schema's user attributes."""
        config, long_length, short_length = self.config, self.config.long_length, self.config.short_length
        history = {"item": item.long(), "action": action.long(), "age": age, "mask": mask}
        long = {name: part[:long_length] for name, part in history.items()}
        embedded = self._behaviours(long)
        sequence, short = embedded[:short_length], mask[:short_length]
        sequence = self._dense("user/sequence", sequence + self._get("user/position"))
        profile = [self._rows(a.name, row.long()) for a, row in zip(config.schema.user_attributes, ids, strict=True)]
        user = self._user_vector(self._dense("user/profile", torch.cat(profile, -1)), sequence, short)
        read = _attention(self._get(f"blocks/{self.bea.name}/bridges"), sequence, short)
        keys = self._dense(f"blocks/{self.memory.name}/key", embedded)
        count = long["mask"].sum()
        weights = keys.masked_fill(~long["mask"][:, None], -1e30).softmax(0) * long["mask"][:, None]
        moments = weights.T @ embedded * (count / count.clamp(min=1) / math.sqrt(self.memory.width))
        mean = embedded.sum(0) / count.clamp(min=1)
        return [user, read, moments, mean, *self._met(long)]

    def _few(self, field: str) -> bool:
        """Return whether a field has no more values than a history has places: its half is then a table of them."""
        return self.config.schema.table_sizes[field] <= self.config.long_length

    def _met(self, history: dict[str, Tensor]) -> list[Tensor]:
        """Return, by field, the sorted values [L] and the statistics where a run of equal ones begins, or those of all."""
        mask, actions, length = history["mask"], self.config.schema.actions, history["mask"].shape[0]
        place, events = torch.arange(length), mask.sum().clamp(min=1)
        counted = torch.cat([torch.stack([mask, mask & (place < self.matching.recent_events)], 1).float(),
                             F.one_hot(history["action"].clamp(0, actions - 1), actions) * mask[:, None]], 1)  # fmt: skip
        days, found = history["age"].clamp(min=0) / 86400, []
        for field in self.matching.fields:
            value = self._field(field, history["item"])
            size = self.config.schema.table_sizes[field]
            key = torch.sort(torch.where(mask & (value > 0), value, size) * length + place).values
            group, order = key // length, key % length
            before = torch.cat([torch.zeros(1, counted.shape[1]), counted[order].cumsum(0)])
            counts = before[self._search(group, group, right=True)] - before[:-1]
            statistics = _statistics(counts[:, 0], counts[:, 1], counts[:, 2:], order, days[order], events)
            found += [self._at(group, statistics, torch.arange(size))] if self._few(field) else [group, statistics]
        return found

    def _at(self, group: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
        """Return the rows of runs that begin with the wanted values; zeros for one that is not there."""
        start = self._search(group, wanted).clamp(max=group.shape[0] - 1)
        return rows[start] * ((group[start] == wanted) & (wanted > 0))[:, None]

    def best(self, rows: Tensor, user: Tensor, read: Tensor, moments: Tensor, mean: Tensor, *more: Any) -> list[Tensor]:
        """Return logits and positions [k] of the best candidates; rows [C] of the catalogue, a user's state, and k."""
        *met, k = more
        floats, wanted = self.floats[rows], self.values[rows]
        item, weights = floats.split(self.widths, 1)
        root = math.sqrt(self.config.width)

        def kernel(block: str, name: str) -> Tensor:
            return self._get(f"head/first/kernels/{block}/{name}")

        path = f"blocks/{self.memory.name}/query"
        linear, constant = self._get(f"{path}/kernel") @ moments, self._get(f"{path}/bias") @ moments
        deviation = kernel(self.memory.name, "deviation")
        once = user @ kernel("tower", "user") + mean @ kernel(self.memory.name, "mean") + constant @ deviation
        inputs = torch.cat([item, weights], 1)
        kernels = torch.cat([
            kernel("tower", "item") + user[:, None] * kernel("tower", "product") + linear @ deviation,
            read @ kernel(self.bea.name, "read"),
        ])  # fmt: skip
        first = inputs @ kernels + (once + self._get("head/first/bias"))
        of_fields, left = kernel(self.matching.name, "statistics").chunk(len(self.matching.fields)), iter(met)
        for f, field in enumerate(self.matching.fields):
            if self._few(field):
                first = first + (next(left) @ of_fields[f])[wanted[:, f]]
            else:
                first = first + self._at(next(left), next(left) @ of_fields[f], wanted[:, f])
        logit = item @ (user / root + self._get(f"blocks/{self.dot.name}/popularity"))
        logit = logit + (weights * (item @ (read.T / root))).sum(1)
        logit = logit + ((item @ linear + constant) * item).sum(1) / root
        found = torch.topk(self._mlp("head/rest", F.relu(first))[:, 0] + logit, k)
        return [found.values, found.indices]

    def _search(self, ascending: Tensor, wanted: Tensor, *, right: bool = False) -> Tensor:
        return torch.searchsorted(ascending, wanted.contiguous(), right=right)

    def _user_vector(self, profile: Tensor, sequence: Tensor, mask: Tensor) -> Tensor:
        attended = sequence + _attention(sequence, sequence, mask)
        norm = self._get("user/norm/scale"), self._get("user/norm/bias")
        attended = F.layer_norm(attended, (self.config.width,), *norm, 1e-6)
        attended = attended + self._mlp("user/feed_forward", attended)
        pooled = (attended * mask[:, None]).sum(0) / mask.sum().clamp(min=1)
        crossed = _attention(profile[None], sequence, mask)[0]
        return self._mlp("user/tower", torch.cat([profile, pooled, crossed], -1))

    def _behaviours(self, history: dict) -> Tensor:
        total = F.embedding(history["action"], self._get("embedding/behaviour.action"))
        total = total + F.embedding(self._age_bucket(history["age"]), self._get("embedding/behaviour.age"))
        for field in self.config.schema.behaviour_fields:
            total = total + self._rows(field, self._field(field, history["item"]))
        return total * history["mask"][..., None]

    def _age_bucket(self, age: Tensor) -> Tensor:
        """Return floor(log2(1 + age)) at most AGE_BUCKETS - 1."""
        return (torch.frexp(1 + age).exponent - 1).clamp(0, AGE_BUCKETS - 1).long()

    def _field(self, field: str, item: Tensor) -> Tensor:
        return item if field == "item" else self._fields[field][item]

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._get(f"embedding/{table}"))

    def _dense(self, path: str, x: Tensor) -> Tensor:
        return x @ self._get(f"{path}/kernel") + self._get(f"{path}/bias")

    def _mlp(self, path: str, x: Tensor) -> Tensor:
        depth = sum(name.startswith(_key(path) + "/") and name.endswith("/kernel") for name in self.weights)
        for i in range(depth):
            x = self._dense(f"{path}/layer_{i}", F.relu(x) if i else x)
        return x

    def _get(self, path: str) -> Tensor:
        return self.weights[_key(path)]


class ForOnnx(TorchServing):
    """The same without the two operators that ONNX does not have."""

    def _age_bucket(self, age: Tensor) -> Tensor:
        return (1 + age[..., None] >= 2.0 ** torch.arange(1, AGE_BUCKETS)).sum(-1)

    def _search(self, ascending: Tensor, wanted: Tensor, *, right: bool = False) -> Tensor:
        """Return a binary search by gathers."""
        length, start = ascending.shape[0], torch.zeros_like(wanted)
        for bit in reversed(range(length.bit_length())):
            further = start + (1 << bit)
            value = ascending[further.clamp(max=length) - 1]
            start = torch.where((further <= length) & ((value <= wanted) if right else (value < wanted)), further, start)
        return start


class Part(nn.Module):
    """One function of a module as a module, which is what `torch.onnx.export` takes."""

    def __init__(self, whole: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.whole, self.function = whole, function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def _statistics(number: Tensor, recent: Tensor, by_action: Tensor, last: Tensor, days: Tensor, events: Tensor) -> Tensor:
    """Return what `MatchingStatistics` tells of a value, from its counts, the place of its last event and the days since."""
    first = [torch.ones(len(number)), torch.log1p(number), number / events, 1 / (1 + last), torch.log1p(days),
             torch.log1p(recent)]  # fmt: skip
    return torch.cat([torch.stack(first, -1), torch.log1p(by_action)], -1)


def _attention(query: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    scores = query @ values.T / math.sqrt(values.shape[-1])
    return torch.softmax(scores.masked_fill(~mask, -1e30), -1) * mask @ values


def _tensor(array: Any) -> Tensor:
    """Return integers as int64, the type of PyTorch's indices."""
    values = np.asarray(array)
    return torch.tensor(values.astype(np.int64) if values.dtype.kind in "iu" else values)


def _key(path: str) -> str:
    """Return a parameter's path as a name that PyTorch takes."""
    return path.replace(".", "|")
