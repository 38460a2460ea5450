"""The network of `presets.aif` in plain PyTorch: what training speed and serving are compared with.

`TorchAIF` is written the way a PyTorch user would write it for pointwise training: every pair compared directly. `TorchServing`
is the same network split as our serving splits it. Both start from the JAX parameters; the scripts check that logits agree.
Needs the extra "benchmarks".
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
from aif_jax import ItemRow, interaction
from aif_jax.blocks import Bea, DotProduct, LinearMemory, MatchingStatistics
from aif_jax.layers import AGE_BUCKETS
from aif_jax.train import predict

READ = {Bea: "read", LinearMemory: "deviation"}
"""What a block with a dot product reads of the history."""
KNOWN = (MatchingStatistics, Bea, LinearMemory, DotProduct)


class TorchAIF(nn.Module):
    """Logits [B] of one candidate each.

    Args:
      params: of the JAX model.
      config: with blocks among KNOWN, such as `presets.aif`.
      sparse: embedding tables with sparse gradients, for SparseAdam.
    """

    def __init__(self, params: dict[str, Any], config: aif.Config, *, sparse: tuple[str, ...] = ()):
        super().__init__()
        if not all(isinstance(block, KNOWN) for block in config.blocks):
            raise ValueError(f"TorchAIF: expected blocks of {[kind.__name__ for kind in KNOWN]}, got {config.blocks}")
        self.config, self.sparse = config, sparse
        trained = {name: group for name, group in params.items() if name != "fitted"}
        leaves = jax.tree_util.tree_leaves_with_path(trained)
        self.weights = nn.ParameterDict(
            {_key(jax.tree_util.keystr(path, simple=True, separator="/")): nn.Parameter(_tensor(leaf)) for path, leaf in leaves}
        )
        self._fields = _tensors(params["fitted"]["fields"])

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B] of a batch from `to_torch`."""
        config, users, items = self.config, batch["users"], batch["items"]
        history = users["history"]
        short, long = ({name: part[:, :n] for name, part in history.items()} for n in (config.short_length, config.long_length))
        vector, embedded = self._item_vector(items), self._behaviours(long)
        sequence = self._behaviours(short)
        sequence = self._dense("user/sequence", sequence + self._get("user/position") if config.sequence else sequence)
        user = self._user_vector(users, sequence, short["mask"])
        inputs: dict[str, dict[str, Tensor]] = {"tower": {"user": user, "item": vector, "product": user * vector}}
        logit = torch.zeros(len(vector))
        root = math.sqrt(config.width)
        for block in config.blocks:
            path = f"blocks/{block.name}"
            if isinstance(block, Bea):
                bridges = self._get(f"{path}/bridges")
                weights = torch.softmax(self._dense(f"{path}/query", vector) @ bridges.T / root, -1)
                values = _attention(bridges.expand(len(vector), -1, -1), sequence, sequence, short["mask"])
                inputs[block.name] = {"read": (weights[:, None, :] @ values)[:, 0]}
            elif isinstance(block, LinearMemory):
                read, mean = self._memory(block, path, embedded, long["mask"], vector)
                inputs[block.name] = {"mean": mean, "deviation": read}
            elif isinstance(block, MatchingStatistics):
                inputs[block.name] = {"statistics": self._matching(block, long, items["ids"])}
            elif isinstance(block, DotProduct):
                logit = logit + (vector * (user / root + self._get(f"{path}/popularity"))).sum(-1)
            if getattr(block, "dot_product", False):
                logit = logit + (inputs[block.name][READ[type(block)]] * vector).sum(-1) / root
        names = [(part, name) for part, widths in interaction.widths(config).items() for name in widths]
        kernel = torch.cat([self._get(f"head/first/kernels/{part}/{name}") for part, name in names])
        hidden = torch.cat([inputs[part][name] for part, name in names], -1) @ kernel + self._get("head/first/bias")
        return self._mlp("head/rest", F.relu(hidden))[:, 0] + logit

    def _memory(self, block: LinearMemory, path: str, values: Tensor, mask: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """What the candidate reads of the long history, and the history's mean, [B, D] each."""
        count = mask.sum(1, keepdim=True)
        keys = self._dense(f"{path}/key", values)
        if block.keys == "softmax":
            keys = keys.masked_fill(~mask[..., None], -1e30).softmax(1) * count[..., None]
        agreement = (keys @ self._dense(f"{path}/query", vector)[:, :, None])[..., 0] * mask
        read = (agreement[:, None, :] @ values)[:, 0] / (math.sqrt(block.width) * count.clamp(min=1))
        return read, _masked_mean(values, mask)

    def _matching(self, block: MatchingStatistics, history: dict, wanted: dict[str, Tensor]) -> Tensor:
        """How often, how recently and by which actions the user met each of the candidate's values."""
        mask, actions, found = history["mask"], self.config.schema.actions, []
        place, events = torch.arange(mask.shape[1]), mask.sum(1).clamp(min=1)
        by_action = F.one_hot(history["action"].clamp(0, actions - 1), actions).float()
        for field in block.fields:
            value = wanted[field]
            equal = (self._field(field, history["item"]) == value[:, None]) & mask & (value > 0)[:, None]
            number, recent = equal.sum(1), (equal & (place < block.recent_events)).sum(1)
            last = torch.where(equal, place, mask.shape[1] - 1).min(1).values
            days = history["age"].gather(1, last[:, None])[:, 0].clamp(min=0) / 86400
            counts = (equal.float()[:, None] @ by_action)[:, 0]
            found.append(_statistics(number, recent, counts, last, days, events) * (number > 0)[:, None])
        return torch.cat(found, -1)

    def _user_vector(self, users: dict, sequence: Tensor, mask: Tensor) -> Tensor:
        config = self.config
        profile = [self._attribute(attribute, users["ids"]) for attribute in config.schema.user_attributes]
        if config.schema.user_floats:
            profile.append(users["floats"])
        constant = None if profile else self._get("user/profile_constant").expand(len(mask), -1)
        projected = self._dense("user/profile", torch.cat(profile, -1)) if constant is None else constant
        if not config.sequence:
            return self._mlp("user/tower", torch.cat([projected, _masked_mean(sequence, mask)], -1))
        attended = sequence + _attention(sequence, sequence, sequence, mask)
        attended = F.layer_norm(attended, (config.width,), self._get("user/norm/scale"), self._get("user/norm/bias"), 1e-6)
        pooled = _masked_mean(attended + self._mlp("user/feed_forward", attended), mask)
        crossed = _attention(projected[:, None, :], sequence, sequence, mask)[:, 0]
        return self._mlp("user/tower", torch.cat([projected, pooled, crossed], -1))

    def _item_vector(self, items: dict) -> Tensor:
        inputs = [self._attribute(attribute, items["ids"]) for attribute in self.config.schema.item_attributes]
        if self.config.schema.item_floats:
            inputs.append(items["floats"])
        if self.config.reads_content:
            inputs.append(self._dense("item/content", items["content"]))
        return self._mlp("item/tower", torch.cat(inputs, -1))

    def _behaviours(self, history: dict) -> Tensor:
        total = F.embedding(history["action"], self._get("embedding/behaviour.action"))
        total = total + F.embedding(self._age_bucket(history["age"]), self._get("embedding/behaviour.age"))
        for field in self.config.schema.behaviour_fields:
            total = total + self._rows(field, self._field(field, history["item"]))
        return total * history["mask"][..., None]

    def _age_bucket(self, age: Tensor) -> Tensor:
        """floor(log2(1 + age)) at most AGE_BUCKETS - 1."""
        return (torch.frexp(1 + age).exponent - 1).clamp(0, AGE_BUCKETS - 1).long()

    def _field(self, field: str, item: Tensor) -> Tensor:
        return item if field == "item" else self._fields[field][item]

    def _attribute(self, attribute: aif.Attribute, ids: dict) -> Tensor:
        rows = self._rows(attribute.table_name, ids[attribute.name])
        return rows if attribute.length == 1 else _masked_mean(rows, ids[attribute.name] != 0)

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._get(f"embedding/{table}"), sparse=table in self.sparse)

    def _dense(self, path: str, x: Tensor) -> Tensor:
        return x @ self._get(f"{path}/kernel") + self._get(f"{path}/bias")

    def _mlp(self, path: str, x: Tensor) -> Tensor:
        depth = sum(name.startswith(_key(path) + "/") and name.endswith("/kernel") for name in self.weights)
        for i in range(depth):
            x = self._dense(f"{path}/layer_{i}", F.relu(x) if i else x)
        return x

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Adam of everything, SparseAdam of sparse tables."""
        rows = [self._get(f"embedding/{name}") for name in self.sparse]
        rest = [weight for weight in self.weights.values() if not any(weight is row for row in rows)]
        made: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=learning_rate)]
        return made + ([torch.optim.SparseAdam(rows, lr=learning_rate)] if rows else [])

    def _get(self, path: str) -> Tensor:
        return self.weights[_key(path)]


class TorchServing(TorchAIF):
    """The same network, one user at a time, split as serving splits it: `state` before the candidates are there, `best` after.

    Blocks that are linear in what the user brings take in the head's kernels before the candidates, as ours do.

    Args:
      rows: of the whole catalogue, as `ItemIndex` holds them: a gather of two tables takes the place of the item function.
    """

    def __init__(self, params: dict[str, Any], config: aif.Config, rows: ItemRow):
        super().__init__(params, config)
        if not [type(block) for block in config.blocks] == [MatchingStatistics, Bea, LinearMemory, DotProduct]:
            raise ValueError(f"TorchServing: expected the blocks of presets.aif, got {config.blocks}")
        self.matching, self.bea, self.memory, self.dot = config.blocks
        floats = [np.asarray(part) for part in (rows.vector, rows.blocks[self.bea.name])]
        self.widths = [part.shape[1] for part in floats]
        self.floats = nn.Parameter(_tensor(np.concatenate(floats, 1)))
        self.values = nn.Buffer(_tensor(rows.blocks[self.matching.name]))

    def state(self, item: Tensor, action: Tensor, age: Tensor, mask: Tensor, floats: Tensor, *ids: Tensor) -> list[Tensor]:
        """What `best` reads of a user: features of one user, ids in the order of the schema's user attributes."""
        config, long_length, short_length = self.config, self.config.long_length, self.config.short_length
        history = {"item": item.long(), "action": action.long(), "age": age, "mask": mask}
        long = {name: part[:long_length] for name, part in history.items()}
        embedded = self._behaviours(long)
        sequence, short = embedded[:short_length], mask[:short_length]
        sequence = self._dense("user/sequence", sequence + self._get("user/position") if config.sequence else sequence)
        named = {a.name: value.long()[None] for a, value in zip(config.schema.user_attributes, ids, strict=True)}
        user = self._user_vector({"ids": named, "floats": floats[None]}, sequence[None], short[None])[0]
        bridges = self._get(f"blocks/{self.bea.name}/bridges")
        read = _attention(bridges[None], sequence[None], sequence[None], short[None])[0]
        keys = self._dense(f"blocks/{self.memory.name}/key", embedded)
        count = long["mask"].sum()
        weights = keys.masked_fill(~long["mask"][:, None], -1e30).softmax(0) * long["mask"][:, None]
        moments = weights.T @ embedded * (count / count.clamp(min=1) / math.sqrt(self.memory.width))
        mean = embedded.sum(0) / count.clamp(min=1)
        return [user, read, moments, mean, *self._met(long)]

    def _few(self, field: str) -> bool:
        """Whether a field has no more values than a history has places: its half is then a table of them."""
        return self.config.schema.item_attribute(field).size <= self.config.long_length

    def _met(self, history: dict[str, Tensor]) -> list[Tensor]:
        """By field the sorted values [L] and the statistics where a run of equal ones begins [L, W], or those of all [V, W]."""
        mask, actions, length = history["mask"], self.config.schema.actions, history["mask"].shape[0]
        place, events = torch.arange(length), mask.sum().clamp(min=1)
        counted = torch.cat([torch.stack([mask, mask & (place < self.matching.recent_events)], 1).float(),
                             F.one_hot(history["action"].clamp(0, actions - 1), actions) * mask[:, None]], 1)  # fmt: skip
        days, found = history["age"].clamp(min=0) / 86400, []
        for field in self.matching.fields:
            value = self._field(field, history["item"])
            size = self.config.schema.item_attribute(field).size
            key = torch.sort(torch.where(mask & (value > 0), value, size) * length + place).values
            group, order = key // length, key % length
            before = torch.cat([torch.zeros(1, counted.shape[1]), counted[order].cumsum(0)])
            counts = before[self._search(group, group, right=True)] - before[:-1]
            statistics = _statistics(counts[:, 0], counts[:, 1], counts[:, 2:], order, days[order], events)
            found += [self._at(group, statistics, torch.arange(size))] if self._few(field) else [group, statistics]
        return found

    def _at(self, group: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
        """The rows of runs that begin with the wanted values; zeros for one that is not there."""
        start = self._search(group, wanted).clamp(max=group.shape[0] - 1)
        return rows[start] * ((group[start] == wanted) & (wanted > 0))[:, None]

    def best(self, rows: Tensor, user: Tensor, read: Tensor, moments: Tensor, mean: Tensor, *more: Any) -> list[Tensor]:
        """Logits and positions [k] of the best candidates; rows [C] of the catalogue, a user's state, and k."""
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
        if self.bea.dot_product:
            logit = logit + (weights * (item @ (read.T / root))).sum(1)
        if self.memory.dot_product:
            logit = logit + ((item @ linear + constant) * item).sum(1) / root
        found = torch.topk(self._mlp("head/rest", F.relu(first))[:, 0] + logit, k)
        return [found.values, found.indices]

    def _search(self, ascending: Tensor, wanted: Tensor, *, right: bool = False) -> Tensor:
        return torch.searchsorted(ascending, wanted.contiguous(), right=right)


class ForOnnx(TorchServing):
    """The same without the two operators that ONNX does not have."""

    def _age_bucket(self, age: Tensor) -> Tensor:
        return (1 + age[..., None] >= 2.0 ** torch.arange(1, AGE_BUCKETS)).sum(-1)

    def _search(self, ascending: Tensor, wanted: Tensor, *, right: bool = False) -> Tensor:
        """A binary search by gathers."""
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


def expect_same(network: TorchAIF, tensors: dict[str, Any], model: aif.PreRanker, params: dict[str, Any], batch: Any) -> None:
    """Raises SystemExit where the logits of a batch differ by over 1e-4: another network."""
    with torch.no_grad():
        theirs = network(tensors).numpy()
    (ours,) = (scores[:, 0] for scores in predict(model, params, [batch]))
    difference = float(np.abs(ours - theirs).max())
    if not difference < 1e-4:
        raise SystemExit(f"expected the same network twice, got logits that differ by {difference:.1e}: nothing is timed")


def to_torch(batch: Any) -> dict[str, Any]:
    """A pointwise `Batch` as PyTorch tensors."""
    users, items = batch.users, jax.tree.map(lambda leaf: leaf[:, 0], batch.items)
    return {
        "users": {"ids": _tensors(users.ids), "floats": _tensor(users.floats), "history": _tensors(vars(users.history))},
        "items": {
            "ids": _tensors(items.ids),
            "floats": _tensor(items.floats),
            "content": None if items.content is None else _tensor(items.content),
        },
        "labels": _tensor(batch.labels[:, 0]),
    }


def _statistics(number: Tensor, recent: Tensor, by_action: Tensor, last: Tensor, days: Tensor, events: Tensor) -> Tensor:
    """What `MatchingStatistics` tells of a value, from its counts, the place of its last event and the days since."""
    first = [torch.ones(len(number)), torch.log1p(number), number / events, 1 / (1 + last), torch.log1p(days),
             torch.log1p(recent)]  # fmt: skip
    return torch.cat([torch.stack(first, -1), torch.log1p(by_action)], -1)


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    scores = query @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
    weights = torch.softmax(scores.masked_fill(~mask[:, None, :], -1e30), -1) * mask[:, None, :]
    return weights @ values


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _tensor(array: Any) -> Tensor:
    """Integers as int64, the type of PyTorch's indices."""
    values = np.asarray(array)
    return torch.tensor(values.astype(np.int64) if values.dtype.kind in "iu" else values)


def _tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: _tensor(array) for name, array in arrays.items()}


def _key(path: str) -> str:
    """A parameter's path as a name that PyTorch takes."""
    return path.replace(".", "|")
