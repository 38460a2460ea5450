"""The AIF network in plain PyTorch, one candidate a user: the arm that training speed is measured against.

Written the way a PyTorch user would write it for pointwise training: everything direct, nothing folded. It starts from the JAX
parameters, so that both arms are the same network; `experiments/train_step.py` checks that their logits agree.
Needs the extra "benchmarks".
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aif_jax as aif
from aif_jax.layers import AGE_BUCKETS


class TorchAIF(nn.Module):
    """AIF with BEA, SIM, DIN on LSH and exact SimTier; logits [B] of one candidate each.

    Args:
      params: of the JAX model.
      config: architecture "aif", memory ("lsh",) or (), simtier "exact" or "off", one tier group.
      sparse: embedding tables with sparse gradients, for SparseAdam and Adagrad.
    """

    def __init__(self, params: dict[str, Any], config: aif.Config, *, sparse: tuple[str, ...] = ()):
        super().__init__()
        if config.architecture != "aif" or "learned" in config.memory or config.simtier == "codes" or config.tier_groups > 1:
            raise ValueError(f"TorchAIF: expected LSH memory and exact tiers of one group, got {config}")
        self.config, self.sparse = config, sparse
        self.weights = nn.ParameterDict(
            {
                path: nn.Parameter(torch.tensor(np.asarray(leaf)))
                for path, leaf in _flatten(params)
                if not path.startswith("frozen")
            }
        )

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B] of a batch from `to_torch`."""
        config, users, items = self.config, batch["users"], batch["items"]
        width = config.width
        vector = self._item_vector(items)
        short = self._behaviours(users["short"])
        sequence = self._dense("user/sequence", short + self._get("user/position") if config.sequence else short)
        mask = users["short"]["mask"]
        user = self._user_vector(users, sequence, mask)
        blocks = [user, vector, user * vector]
        if config.bridges:
            bridges = self._get("bridge/embeddings")
            weights = torch.softmax(self._dense("item/bridge_query", vector) @ bridges.T / math.sqrt(width), -1)
            values = _attention(bridges.expand(len(vector), -1, -1), sequence, sequence, mask)
            blocks.append((weights[:, None, :] @ values)[:, 0])
        long, long_mask = self._behaviours(users["long"]), users["long"]["mask"]
        count = long_mask.sum(1, keepdim=True).clamp(min=1)
        similarity = _agreement(users["long"]["signs"], items["signs"])  # [B, L] equal minus different bits
        if "lsh" in config.memory:
            blocks.append(long.sum(1) / count)
            weights = torch.where(long_mask, similarity, 0.0) / (math.sqrt(config.signature_bits) * count)
            blocks.append((weights[:, None, :] @ long)[:, 0])
        for field in config.sim_fields:
            blocks += self._sim(field, users["long"], long, long_mask, items["ids"][field], self._dense("item/query", vector))
        if config.simtier == "exact":
            equal = (similarity + config.signature_bits).long() // 2
            tier = (equal * config.tiers // config.signature_bits).clamp(max=config.tiers - 1)
            counts = torch.zeros(len(tier), config.tiers).scatter_add_(1, tier, long_mask.float())
            blocks.append(torch.log1p(counts))
        return self._head(blocks)

    def _head(self, blocks: list[Tensor]) -> Tensor:
        from aif_jax.interaction import blocks as names

        kernel = torch.cat([self._get(f"interaction/first/kernels/{name}") for name in names(self.config)])
        hidden = F.relu(torch.cat(blocks, -1) @ kernel + self._get("interaction/first/bias"))
        return self._mlp("interaction/rest", hidden)[:, 0]

    def _sim(self, field: str, history: dict, long: Tensor, mask: Tensor, value: Tensor, query: Tensor) -> list[Tensor]:
        """Attention over the last P behaviours of the candidate's value, if that is among the user's Q most frequent."""
        config, ids, rows = self.config, history["ids"][field], torch.arange(len(value))
        mask = mask & (ids > 0)
        length = ids.shape[1]
        size = config.schema.item_attribute(field).size
        counts = torch.zeros(len(ids), size, dtype=torch.long).scatter_add_(1, ids, mask.long())
        places = torch.where(mask, torch.arange(length), length)
        last = torch.full((len(ids), size), length).scatter_reduce_(1, ids, places, "amin")
        rank = counts * (length + 1) + (length - last)  # most behaviours first, then the most recent
        best = rank.topk(min(config.sim_slots, size), 1).values[:, -1]
        cached = (counts[rows, value] > 0) & (rank[rows, value] >= best)
        own = (ids == value[:, None]) & mask & cached[:, None]
        kept = own & (own.long().cumsum(1) <= config.sim_length)
        attended = _attention(query[:, None, :], long, long, kept)[:, 0]
        age = history["age"][rows, last[rows, value].clamp(max=length - 1)].clamp(min=0) / 86400
        flags = [(~cached).float(), torch.log1p(counts[rows, value].float()) * cached, torch.log1p(age) * cached]
        return [attended, torch.stack(flags, -1)]

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
        if self.config.item_content and self.config.schema.content:
            inputs.append(self._dense("item/content", items["content"]))
        return self._mlp("item/tower", torch.cat(inputs, -1))

    def _behaviours(self, history: dict) -> Tensor:
        total = F.embedding(history["action"], self._get("embedding/behaviour.action"))
        bucket = (torch.frexp(1 + history["age"]).exponent - 1).clamp(0, AGE_BUCKETS - 1).long()
        total = total + F.embedding(bucket, self._get("embedding/behaviour.age"))
        for field in self.config.schema.behaviour_fields:
            total = total + self._rows(field, history["ids"][field])
        return total * history["mask"][..., None]

    def _attribute(self, attribute: aif.Attribute, ids: dict) -> Tensor:
        rows = self._rows(attribute.name, ids[attribute.name])
        return rows if attribute.length == 1 else _masked_mean(rows, ids[attribute.name] != 0)

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._get(f"embedding/{table}"), sparse=table in self.sparse)

    def _dense(self, path: str, x: Tensor) -> Tensor:
        return x @ self._get(f"{path}/kernel") + self._get(f"{path}/bias")

    def _mlp(self, path: str, x: Tensor) -> Tensor:
        layers = sorted({name.split("/")[2] for name in map(_plain, self.weights) if name.startswith(path + "/")})
        for i, layer in enumerate(layers):
            x = self._dense(f"{path}/{layer}", F.relu(x) if i else x)
        return x

    def optimizers(self, learning_rate: float, *, adagrad: bool = False) -> list[torch.optim.Optimizer]:
        """Adam (or Adagrad) of everything; of sparse tables SparseAdam (or Adagrad, which takes sparse gradients)."""
        rows = [self._get(f"embedding/{name}") for name in self.sparse]
        rest = [weight for weight in self.weights.values() if not any(weight is row for row in rows)]
        if adagrad:
            return [torch.optim.Adagrad([*rows, *rest], lr=learning_rate, initial_accumulator_value=0.1)]
        made: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=learning_rate)]
        return made + ([torch.optim.SparseAdam(rows, lr=learning_rate)] if rows else [])

    def _get(self, path: str) -> Tensor:
        return self.weights[path.replace(".", "|")]


def to_torch(batch: Any) -> dict[str, Any]:
    """A pointwise `Batch` of NumPy arrays as PyTorch tensors; signatures become their signs, done once outside the step."""

    def behaviours(history: Any) -> dict[str, Any]:
        return {
            "ids": {name: torch.from_numpy(ids).long() for name, ids in history.ids.items()},
            "action": torch.from_numpy(history.action).long(),
            "age": torch.from_numpy(history.age),
            "mask": torch.from_numpy(history.mask),
            "signs": None if history.signature is None else torch.from_numpy(_signs(history.signature)),
        }

    items = batch.items
    return {
        "users": {
            "ids": {name: torch.from_numpy(ids).long() for name, ids in batch.users.ids.items()},
            "floats": torch.from_numpy(batch.users.floats),
            "short": behaviours(batch.users.short),
            "long": behaviours(batch.users.long),
        },
        "items": {
            "ids": {name: torch.from_numpy(ids[:, 0]).long() for name, ids in items.ids.items()},
            "floats": torch.from_numpy(items.floats[:, 0]),
            "content": None if items.content is None else torch.from_numpy(items.content[:, 0]),
            "signs": torch.from_numpy(_signs(items.signature[:, 0])),
        },
        "labels": torch.from_numpy(batch.labels[:, 0]),
    }


def _agreement(behaviours: Tensor, candidate: Tensor) -> Tensor:
    return (behaviours @ candidate[:, :, None])[..., 0]


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    scores = query @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
    weights = torch.softmax(scores.masked_fill(~mask[:, None, :], -1e30), -1) * mask[:, None, :]
    return weights @ values


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _signs(signature: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(signature.astype("<u4"))
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return bits.astype(np.float32) * 2 - 1


def _flatten(tree: dict[str, Any], prefix: str = ""):
    for name, value in tree.items():
        path = f"{prefix}{name}".replace(".", "|")
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}/")
        else:
            yield path, value


def _plain(path: str) -> str:
    return path.replace("|", ".")
