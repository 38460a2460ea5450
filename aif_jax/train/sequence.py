"""The sequence loss: next item at every place of the short history, an auxiliary loss of the user tower.

The main loss teaches one event a sample. Here each event of the short history is also the target of the state before it, as in
SASRec (Kang and McAuley 2018, arXiv 1808.09781), against negatives that the whole batch shares; their correction is that of
sampled softmax (Yi et al. 2019). Nothing is added to the model: a state and an item meet in the space in which the user tower
reads behaviours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aif_jax import user
from aif_jax.blocks.block import recent
from aif_jax.checks import expect, expect_types
from aif_jax.config import Config
from aif_jax.data.pipeline import Batch
from aif_jax.model import PreRanker
from aif_jax.types import Behaviours, Params


class Shared(NamedTuple):
    """What all parts of a batch share."""

    item: jax.Array  # int32 [M] negatives, 0 for none
    log_q: jax.Array  # float32 [M] log of how often M draws hold them, 0 without a correction
    targets: jax.Array  # int32 [] how many the batch has, at least 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceLoss:
    """Next item at every place of the short history; `fit` and `make_step` add it to the loss of the candidates.

    -weight * mean over places p of log( e^(h_p z+) / (e^(h_p z+) + sum_j e^(h_p z_j - log q_j)) )

    h_p is the causal state of the user tower after event p, see `Config.encoder_layers`, z+ the item of the next event, and z_j
    are M negatives: candidates of the batch, those sampled last first. If candidates come with `log_q`, the M draws are
    corrected as in sampled softmax. The target itself and unknown items are no negatives; without `repeats`, nor are items that
    the user has met up to p.

    Attributes:
      weight: weight of the loss, added to the main one.
      negatives: M, at most the candidates of a batch.
      repeats: whether users come back to items; None takes that of `fit`, and True in `make_step`.

    Example:
      >>> import aif_jax as aif
      >>> from aif_jax.train import losses
      >>> import optax
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> config = aif.presets.two_tower(aif.Schema(item_attributes=(item, category)), short_length=128, encoder_layers=1)
      >>> given = dict(loss=losses.listwise_softmax, sequence_loss=SequenceLoss(weight=0.2))
      >>> step = aif.train.make_step(aif.build(config), optax.sgd(0.1), **given)
    """

    weight: float = 0.1
    negatives: int = 256
    repeats: bool | None = None

    def __post_init__(self):
        expect_types(self)
        expect(math.isfinite(self.weight) and self.weight > 0, "SequenceLoss.weight", "a finite number above 0", self.weight)
        expect(self.negatives >= 1, "SequenceLoss.negatives", "at least 1", self.negatives)

    def bind(self, model: PreRanker, *, repeats: bool = True) -> SequenceLoss:
        """The same for a model, and for users who come back to items or not, unless it says so itself.

        Raises:
          ValueError: a model whose user tower has no states.
        """
        reads = model.config.sequence and model.config.towers is not None
        expect(reads, "sequence_loss", "a model with towers and Config.sequence=True", f"{model.config!r}")
        ours = getattr(model.user, "func", None) is user.apply
        expect(ours, "sequence_loss", "the user tower of aif_jax.user", f"{model!r}")
        return dataclasses.replace(self, repeats=repeats) if self.repeats is None else self

    def shared(self, batch: Batch, config: Config) -> Shared:
        """Negatives of a whole batch, and how many targets it has."""
        item = jnp.where(jnp.asarray(batch.where), jnp.asarray(batch.items.ids["item"]), 0)
        last_first = item.T[::-1].reshape(-1)  # of lists that begin with their positive, the sampled ones first
        order = jnp.argsort(last_first == 0, stable=True)[: self.negatives]
        chosen = last_first[order]
        log_q = jnp.zeros(chosen.shape)
        if batch.log_q is not None:
            of_each = jnp.broadcast_to(jnp.asarray(batch.log_q), item.shape).T[::-1].reshape(-1)
            log_q = of_each[order] + math.log(len(chosen) / max(1, item.shape[1] - 1))
        history = recent_places(batch.users.history, config.short_length)
        count = jnp.sum(_is_target(history) & jnp.asarray(batch.where).any(-1)[:, None], dtype=jnp.int32)
        return Shared(chosen, log_q, jnp.maximum(count, 1))

    def over(self, batch: Batch, config: Config) -> Callable[[Params, Batch], jax.Array]:
        """`part` of a batch, with what is shared: a function of parameters and a part."""
        return partial(self.part, shared=self.shared(batch, config), config=config)

    def part(self, params: Params, batch: Batch, *, shared: Shared, config: Config) -> jax.Array:
        """What a part of a batch adds to the loss."""
        negatives = user.targets(params, shared.item, config=config)

        def of_user(history: Behaviours) -> jax.Array:
            short = recent(history, config.short_length)
            states, items = user.states(params, short, config=config)
            states, items = states[1:].astype(jnp.float32), items[:-1].astype(jnp.float32)
            target, place = jnp.asarray(short.item)[:-1, None], jnp.arange(1, len(short.item))[:, None]
            item = shared.item[None, :]
            allowed = (item > 0) & (item != target)
            if not self.repeats:
                met = (jnp.asarray(history.item)[:, None] == item) & jnp.asarray(history.mask)[:, None]
                first = jnp.max(jnp.where(met, jnp.arange(len(met))[:, None], -1), axis=0)  # the place where it was met first
                allowed &= first[None, :] < place
            others = jnp.where(allowed, states @ negatives.astype(jnp.float32).T - shared.log_q[None, :], -1e30)
            own = jnp.sum(states * items, axis=-1)
            lost = jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own
            return jnp.sum(jnp.where(_is_target(short), lost, 0.0))

        lost = jax.vmap(of_user)(batch.users.history)
        valid = jnp.asarray(batch.where).any(-1)
        return self.weight * jnp.sum(jnp.where(valid, lost, 0.0)) / shared.targets.astype(jnp.float32)


def recent_places(history: Behaviours, length: int) -> Behaviours:
    """The most recent places of the histories of a batch [B, L]."""
    return jax.tree.map(lambda x: jnp.asarray(x)[:, :length], history)


def _is_target(history: Behaviours) -> jax.Array:
    """bool [..., S - 1]: whether a known item follows the event of each place from 1 on."""
    mask, item = jnp.asarray(history.mask), jnp.asarray(history.item)
    return mask[..., 1:] & mask[..., :-1] & (item[..., :-1] > 0)
