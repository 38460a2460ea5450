"""What requests may be ranked by: the logit, or a score expression by name; a part of each published version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.scores import Expression, objective_names, parse_expression

LOGIT, BID = "logit", "bid"


class Orders(NamedTuple):
    """The expressions of an engine by name, hashable: programs are compiled for them.

    The mode of a request is 0 for the logit, and 2 i + 1 or 2 i + 2 for expression i, with the bid of the row or of candidates.
    """

    names: tuple[str, ...]
    expressions: tuple[Expression, ...]
    bid: str  # the side value that candidates may bring in place of the row's
    in_row: bool  # whether the row has it
    group: str | None = None  # the side value by which the cut is diverse
    most: int = 1  # candidates of one group

    def expect(self, order: str, *, given: bool) -> None:
        """Raises ValueError for an order that there is none of, or that reads a bid that is nowhere."""
        if order == LOGIT:
            return
        expect(order in self.names, "Request.order", f"one of {[LOGIT, *self.names]}", repr(order))
        lacks = self.bid in self.expressions[self.names.index(order)].side and not given and not self.in_row
        expected = f"bids with the candidates or {self.bid!r} in schema.side"
        expect(not lacks, f"order {order!r}", expected, "neither")

    def mode(self, order: str, *, given: bool) -> int:
        """The number of an order in the compiled program."""
        return 0 if order == LOGIT else 2 * self.names.index(order) + 1 + given


def orders_of(config: Config, bid: str, given: Mapping[str, Any], *, group: str | None = None, most: int = 1) -> Orders:
    """The orders of an engine: "bid", the probability of the first objective times the bid, and those given.

    Raises:
      ValueError: a name that is taken by the logit, an expression that does not fit the model, or a group that no row has.
    """
    known = group is None or group in config.schema.side
    expect(known, "ServingConfig.group", f"a side value among {list(config.schema.side)}", repr(group))
    expect(isinstance(given, Mapping), "orders", "score expressions by name", type(given).__name__)
    expect(LOGIT not in given, "orders", f"another name than {LOGIT!r}, which is the order without an expression", list(given))
    several = config.outputs > 1
    first = f"p.{objective_names(config.objectives)[0]}" if several else "p"
    usable = bid.isidentifier() and bid != "p"
    texts = ({BID: f"{first} * {bid}"} if usable else {}) | dict(given)
    side = {*config.schema.side, *([bid] if usable else [])}
    parsed = tuple(parse_expression(text, objectives=config.objectives, side=sorted(side)) for text in texts.values())
    return Orders(tuple(texts), parsed, bid, bid in config.schema.side, group, most)
