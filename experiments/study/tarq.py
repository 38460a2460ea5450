"""TARQ: target attention whose queries are the codewords of residual codebooks, so that it is ready before the candidates.

Paper: Li et al. 2025, *Equip Pre-ranking with Target Attention by Residual Quantization* (arXiv 2509.16931). Its abstract and
summaries say: an item is quantised by residual codebooks; a student reads the history with codewords as queries, on the user
side, and looks them up by the item's codes; a teacher attends with the item itself, in training alone, and both are trained
together; an alignment keeps codewords in use. The formulas here are a reconstruction: the full text was not read. What is ours:
readings are added less the mean of the history, see `Tarq`; the teacher has no head, its gradient goes past the quantisation;
the balance in `QuantizationLoss` takes the place of the paper's codebook alignment.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from aif_jax import Config, PreRanker, item, layers, user
from aif_jax.blocks.block import Block, HeadInputs, ItemView, UserView, block, expect, own
from aif_jax.blocks.exact import Sequence
from aif_jax.data.pipeline import Batch
from aif_jax.types import Array, ItemFeatures, ItemRow, Params, UserFeatures, UserState, record


@record
class Readings:
    """What the codewords read in one user's history."""

    mean: Array  # float32 [D]
    deviations: Array  # float32 [R, K, D], less the mean


@block
class Tarq(Block):
    """Target attention over the long history with the codewords of an item in place of its query.

    An item query q [D] is quantised by R codebooks of K codewords: codeword k_1 of the first one is the nearest to q, k_r of
    codebook r the nearest to what is left, q - c_1 - ... - c_(r-1). With E [L, D] the behaviours and b their mean,

        nearline    k_1, ..., k_R                                        of an item, R integers
        user side   A_r,k = softmax(c_r,k E^T / sqrt D) E - b            [R, K, D], for all codewords
        real time   softmax(q E^T / sqrt D) E - b  ~  sum_r A_r,k_r      R rows a candidate

    A query of zeros reads the mean, and what attention reads is linear in small queries. So the sum is exact to first order in
    q, and with one codeword an item's attention itself. The head receives mean and sum apart, as of `LinearMemory`.

    Training: codewords get the gradient of what they read. The item query gets the gradient that attention with q itself would
    have at the same place, straight past the quantisation; `QuantizationLoss` keeps codewords near the queries.

    - Cost: user side R x K x L x D; real time R x K x D x H once, and R rows of H + D numbers a candidate, independent of L.

    Attributes:
      levels: R.
      codewords: K of each level.
      dot_product: adds the dot product of the sum and the item vector to the logit.

    Raises:
      ValueError: fewer than one level or codeword.
    """

    levels: int = 2
    codewords: int = 64
    dot_product: bool = False
    needs_towers = True

    def __post_init__(self):
        expect(self.levels >= 1, self, "levels", "at least 1", self.levels)
        expect(self.codewords >= 1, self, "codewords", "at least 1", self.codewords)

    def widths(self, config: Config) -> dict[str, int]:
        return {"mean": config.width, "deviation": config.width}

    def init(self, key: jax.Array, config: Config) -> Params:
        query, codebooks = jax.random.split(key)
        drawn = jax.random.normal(codebooks, (self.levels, self.codewords, config.width)) / math.sqrt(config.width)
        halved = [0.5**level * drawn[level] for level in range(self.levels)]
        return {"query": layers.dense_init(query, config.width, config.width), "codebooks": jnp.stack(halved)}

    def user(self, params: Params, user: UserView) -> Readings | Sequence:
        """Readings; of a user whose candidates are known, as in training, the history itself."""
        values, mask = user.embedded, jnp.asarray(user.long.mask)
        if user.candidates is not None:
            return Sequence(values=values, mask=mask)
        mean = layers.masked_mean(values, mask)
        return Readings(mean=mean, deviations=layers.attention(params["codebooks"], values, values, mask) - mean[None, None, :])

    def item(self, params: Params, item: ItemView) -> jax.Array:
        """The codes int32 [R]."""
        return quantize(layers.dense(params["query"], item.vector), params["codebooks"])

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        history, codes, item = state.blocks[self.name], jnp.asarray(rows.blocks[self.name]), jnp.asarray(rows.vector)
        kernel, root = kernels["deviation"], math.sqrt(item.shape[-1])
        if isinstance(history, Sequence):
            mean = layers.masked_mean(jnp.asarray(history.values), jnp.asarray(history.mask))
            read = straight_through(*student_and_teacher(params, history, item, codes))
            rest, product = read @ kernel, (item * read).sum(-1) / root
        else:
            mean, deviations = jnp.asarray(history.mean), jnp.asarray(history.deviations)
            ready = jnp.concatenate([deviations @ kernel, deviations / root], -1) if self.dot_product else deviations @ kernel
            # [C, H + D]
            found = sum(ready[level].at[codes[:, level]].get(mode="promise_in_bounds") for level in range(self.levels))
            rest, read = jnp.split(found, [kernel.shape[1]], axis=1)
            product = (item * read).sum(-1) if self.dot_product else 0.0
        return HeadInputs(once=mean @ kernels["mean"], rest=rest, logit=product if self.dot_product else 0.0)


def quantize(query: jax.Array, codebooks: jax.Array) -> jax.Array:
    """The codes of a query, int32 [..., R]: float32 [..., D], [R, K, D]; the first of equally near codewords."""
    left, codes = jax.lax.stop_gradient(query), []
    for codebook in jax.lax.stop_gradient(codebooks):
        codes.append(jnp.argmin(distances(left, codebook), -1).astype(jnp.int32))
        left = left - codebook[codes[-1]]
    return jnp.stack(codes, -1)


def distances(query: jax.Array, codebook: jax.Array) -> jax.Array:
    """|q - c_k|^2 - |q|^2, float32 [..., K]."""
    norms = jnp.square(codebook).sum(-1)
    return jnp.expand_dims(norms, range(query.ndim - 1)) - 2 * query @ codebook.T


def codewords(codebooks: jax.Array, codes: jax.Array) -> jax.Array:
    """The codewords of codes [..., R] of codebooks [R, K, D]: [..., R, D]."""
    return jnp.stack([codebook[codes[..., level]] for level, codebook in enumerate(codebooks)], -2)


def student_and_teacher(params: Params, history: Sequence, item: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the codewords of candidates read, added up, and what their queries read, both less the mean: [C, D].

    The behaviours get the gradient of the student alone.
    """
    values, mask = jnp.asarray(history.values), jnp.asarray(history.mask)
    mean = layers.masked_mean(values, mask)
    student = (layers.attention(codewords(params["codebooks"], codes), values, values, mask) - mean[None, None, :]).sum(-2)
    values, mean = jax.lax.stop_gradient((values, mean))
    return student, layers.attention(layers.dense(params["query"], item), values, values, mask) - mean[None, :]


@jax.custom_vjp
def straight_through(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The student; the teacher has the same gradient."""
    return student


straight_through.defvjp(lambda student, teacher: (student, None), lambda _, cotangent: (cotangent, cotangent))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """What trains codebooks beside the loss of the candidates; `make_step` takes it as its `sequence_loss`.

    Means over the candidates of a batch, with r_r = q - c_1 - ... - c_(r-1) what is left at level r, and sg without gradient:

        commitment    sum_r |sg(r_r) - c_r|^2 / D + commitment |r_r - sg(c_r)|^2 / D
        alignment     |sg(teacher) - student|^2 / D
        balance       sum_r KL(mean over candidates of softmax_k(-|r_r - c_r,k|^2 / t_r) || uniform)

    t_r is the mean distance to the nearest codeword. The commitment is that of VQ-VAE (van den Oord et al. 2017,
    arXiv 1711.00937) at each level, as in RQ-VAE.

    Attributes:
      block: the block whose codebooks are trained.
      weight, commitment, alignment, balance: weights of all, and of its parts.
    """

    block: Tarq
    weight: float = 1.0
    commitment: float = 0.25
    alignment: float = 1.0
    balance: float = 0.01

    def bind(self, model: PreRanker) -> QuantizationLoss:
        """The same; ValueError of a model without the block."""
        expect(self.block in model.config.blocks, self.block, "QuantizationLoss", "a block of the model", model.config.blocks)
        return self

    def over(self, batch: Batch, config: Config) -> Callable[[Params, Batch], jax.Array]:
        """`part` of a batch, with how many candidates the whole batch has: a function of parameters and a part."""
        return partial(self.part, candidates=jnp.maximum(_count(batch), 1), config=config)

    def part(self, params: Params, batch: Batch, *, candidates: jax.Array, config: Config) -> jax.Array:
        """What a part of a batch adds to the loss."""
        ours, where = own(params, self.block), jnp.asarray(batch.where)
        name, fixed = self.block.name, jax.lax.stop_gradient

        def of_user(features: UserFeatures, items: ItemFeatures) -> tuple[jax.Array, ...]:
            history = user.apply(params, features, config=config, candidates=where.shape[1]).blocks[name]
            rows = jax.vmap(partial(item.apply, config=config), (None, 0))(params, items)
            codes, vector = rows.blocks[name], rows.vector
            return layers.dense(ours["query"], vector), codes, *student_and_teacher(ours, history, vector, codes)

        query, codes, student, teacher = jax.vmap(of_user)(batch.users, batch.items)
        chosen = codewords(ours["codebooks"], codes)
        left = query[..., None, :] - fixed(jnp.cumsum(chosen, -2) - chosen)
        near, committed = _square(fixed(left) - chosen).sum(-1), _square(left - fixed(chosen)).sum(-1)
        each = near + self.commitment * committed + self.alignment * _square(fixed(teacher) - student)
        of_part, count = jnp.where(where, each, 0.0).sum(), _count(batch)
        for level, codebook in enumerate(ours["codebooks"]):
            away = distances(left[..., level, :], codebook) + jnp.square(left[..., level, :]).sum(-1, keepdims=True)
            nearest = fixed(jnp.where(where, away.min(-1), 0.0).sum() / jnp.maximum(count, 1))
            shares = jnp.where(where[..., None], jax.nn.softmax(-away / jnp.maximum(nearest, 1e-6)), 0.0)
            used = shares.sum((0, 1)) / jnp.maximum(count, 1)
            entropy = -(used * jnp.log(jnp.maximum(used, 1e-9))).sum()
            of_part = of_part + self.balance * count * (math.log(self.block.codewords) - entropy)
        return self.weight * of_part / candidates


def _count(batch: Batch) -> jax.Array:
    """Candidates of a batch or part, float32 []."""
    return jnp.asarray(batch.where).sum(dtype=jnp.float32)


def _square(x: jax.Array) -> jax.Array:
    return jnp.square(x).mean(-1)


def loss_of(config: Config) -> QuantizationLoss | None:
    """The loss of a model with the block, None without."""
    ours = [block for block in config.blocks if isinstance(block, Tarq)]
    return QuantizationLoss(block=ours[0]) if ours else None
