"""Strings character by character: hashes that fold one character after another, over many strings at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

FEW = 16  # strings below which Python's integers are faster than NumPy's calls


def folded(
    strings: list[str],
    start: tuple[np.generic, ...],
    step: Callable[..., tuple[np.ndarray, ...]],
    one: Callable[..., tuple[int, ...]],
) -> list[np.ndarray]:
    """The states [n] of each string after its last character, in memory that follows the characters.

    Args:
      strings: texts of any lengths.
      start: state before the first character, a scalar of its dtype for each part.
      step: `step(*state, character)`: the next states of several strings from uint32 characters [m], the same in each place.
      one: `one(*state, characters)`: the last state of one string from its remaining characters, in Python's integers. The
        longest strings end here, so that one long string among short ones costs no array operation for each character.
    """
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    points = np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), np.uint32)
    order = np.argsort(-lengths, kind="stable")  # the longest first: strings with a character left are a prefix
    starts, sizes = (np.cumsum(lengths) - lengths)[order], lengths[order]
    states = [np.full(len(strings), part, part.dtype) for part in start]
    place = int(sizes[FEW]) if len(strings) > FEW else 0
    for at, count in enumerate(np.searchsorted(-sizes, -np.arange(place), side="left").tolist()):
        character = points[starts[:count] + at]
        for state, after in zip(states, step(*(state[:count] for state in states), character), strict=True):
            state[:count] = after
    for row in range(min(FEW, len(strings))):
        rest = points[starts[row] + place : starts[row] + sizes[row]].tolist()
        for state, after in zip(states, one(*(int(state[row]) for state in states), rest), strict=True):
            state[row] = after
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return [state[back] for state in states]
