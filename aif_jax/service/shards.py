"""A table larger than one host: services that each hold the items of a shard, asked at once, their answers merged exactly.

    candidates --shard_of--> shard 0: its candidates --> its best k --+
                         --> shard 1: its candidates --> its best k --+--> the best k of all

Each shard computes the user's state itself. A score depends on the user and one item alone, so the best k of all are among the
best k of each shard, and the merge is by score, ties in the candidates' order, as one engine with the whole index has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from aif_jax.checks import VersionMismatch, expect
from aif_jax.index.ids import shard_of
from aif_jax.service.calls import SCORES
from aif_jax.service.client import GONE, Client, ServiceError
from aif_jax.serving import Candidates
from aif_jax.serving.programs import without_repeats

BUSY = (*GONE, 429, 504)  # statuses of a shard that does not answer this call, whatever the call is
Answers = dict[int, dict[str, Any]]
"""Answers by the place of their shard."""


class ShardsMissing(RuntimeError):
    """Shards that did not answer.

    Attributes:
      missing: what went wrong, by the place of the shard.
      candidates: candidates of the call that are theirs.
    """

    def __init__(self, message: str, missing: Mapping[int, Exception], candidates: int):
        super().__init__(message)
        self.missing, self.candidates = dict(missing), candidates


class ShardedClient:
    """Ranks with an index that is split over N services; used from one thread, like `Client`.

    A call goes to the shards that hold its candidates, all at once, and every answer comes from one version: while a shard
    follows a publish later than the others, those that are ahead are asked again for the version before, which `serve --keep`
    holds. Candidates may be integers or strings, with bids or without; every order is merged. A cut that is diverse
    (`ServingConfig.group`) is refused: the group of a candidate is not in the answer of its shard.

    Args:
      addresses: addresses of the services, in the order of their shards: the first one's index was built with `shard=(0, N)`.
      missing: "refuse" raises `ShardsMissing` where a shard does not answer, "degrade" answers with the items of the others,
        `degraded` and with the reason.
      timeout: seconds that the answers of all shards may take, further tries included.
      options: `token`, `trust` and `retries` of each `Client`.

    Raises:
      ValueError: no address.
    """

    def __init__(
        self, addresses: Sequence[str], *, missing: Literal["refuse", "degrade"] = "refuse", timeout: float = 10.0,
        **options: Any,
    ):  # fmt: skip
        expect(len(addresses) > 0, "addresses", "one of each shard", list(addresses))
        expect(missing in ("refuse", "degrade"), "missing", "'refuse' or 'degrade'", repr(missing))
        self.addresses = list(addresses)
        self._clients = [Client(each, timeout=timeout, **options) for each in addresses]
        self._pool = ThreadPoolExecutor(len(addresses), "aif-shards")
        self._degrades, self._timeout = missing == "degrade", timeout
        self._agreed: str | None = None  # the version of the latest answer

    def __enter__(self) -> ShardedClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every connection."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients:
            client.close()

    @property
    def retried(self) -> int:
        """Further tries so far, of all calls to all shards."""
        return sum(client.retried for client in self._clients)

    def rank(self, **fields: Any) -> dict[str, Any]:
        """The best k of all shards; fields and answer as those of `Client.rank`.

        Counts are sums over the shards, `stages` and `state_age` those of the slowest and the oldest.

        Raises:
          ShardsMissing: shards that did not answer, with missing="refuse"; with "degrade" where none did.
          ServiceError: what a shard says of the call, such as a k above `max_k`, or that no candidate has a finite score.
          VersionMismatch: no version that all of them hold.
          TypeError, ValueError: candidates that are none; shards whose cut is diverse.
        """
        given, places, calls = self._split(fields)
        answers, missing = self._asked("/v1/rank", calls)
        reason = self._missing(missing, places)
        answer = merged(answers, given, int(fields.get("k", 0)))
        return _degraded(answer | {"candidates": len(given.ids)}, reason)

    def score(self, **fields: Any) -> dict[str, Any]:
        """Logits of the candidates, in their order; raises as `rank`."""
        given, places, calls = self._split(fields)
        answers, missing = self._asked("/v1/score", calls)
        reason = self._missing(missing, places)
        logits, mask = np.full(len(given.ids), -np.inf, np.float32), np.zeros(len(given.ids), bool)
        for place, answer in answers.items():
            if "logits" in answer:
                logits[places[place]], mask[places[place]] = answer["logits"], answer["mask"]
        _expect_some_finite(answers, bool(mask.any()))
        return _degraded(_common(answers) | {"logits": logits, "mask": mask}, reason)

    def prepare(self, **fields: Any) -> dict[str, Any]:
        """Says to every shard that a user is coming, so that a later call may bring the id alone, with the version of this
        answer; raises as `rank`.
        """
        answers, missing = self._asked("/v1/prepare", dict.fromkeys(range(len(self._clients)), fields))
        self._missing(missing, {place: np.zeros(0, np.int64) for place in range(len(self._clients))})
        return next(iter(answers.values()))

    def _split(self, fields: Mapping[str, Any]) -> tuple[Candidates, dict[int, np.ndarray], dict[int, dict[str, Any]]]:
        """The candidates of a call, the places of those of each shard among them, and the calls to the shards."""
        ids, bids = fields.get("candidates"), fields.get("bids")
        expect(ids is not None, "candidates", "item ids [C]", None)
        given = Candidates.of(ids if bids is None else Candidates(ids, bids))  # type: ignore[arg-type]
        owners = shard_of(given.ids, len(self._clients))
        places = {place: np.flatnonzero(owners == place) for place in range(len(self._clients))}
        places = {place: where for place, where in places.items() if len(where)} or {0: np.zeros(0, np.int64)}
        calls = {}
        for place, where in places.items():
            bids = {} if given.bids is None else {"bids": given.bids[where]}
            calls[place] = {**fields, "candidates": given.ids[where], **bids}
        return given, places, calls

    def _asked(self, path: str, calls: Mapping[int, dict[str, Any]]) -> tuple[Answers, dict[int, Exception]]:
        """Answers of one version, and the shards that did not answer."""
        answers, missing = self._gathered(path, calls)
        if len({answer["version"] for answer in answers.values()}) > 1:
            answers, missing = self._agree(path, calls, answers, missing)
        self._agreed = next((answer["version"] for answer in answers.values() if answer["version"]), self._agreed)
        return answers, missing

    def _agree(
        self, path: str, calls: Mapping[int, dict[str, Any]], answers: Answers, missing: dict[int, Exception]
    ) -> tuple[Answers, dict[int, Exception]]:
        """The answers of one of their versions, the one of the call before first; raises VersionMismatch."""
        versions = {answer["version"] for answer in answers.values()} - {None}
        for version in sorted(versions, key=lambda each: (each != self._agreed, each)):
            others = {place: answer for place, answer in answers.items() if answer["version"] != version}
            again = {place: {**calls[place], "version": version} for place in others}
            try:
                asked, gone = self._gathered(path, again)
            except ServiceError as error:
                if error.field != "version":
                    raise
                continue  # a shard does not hold it
            return {place: each for place, each in (answers | asked).items() if place not in gone}, missing | gone
        shown = ", ".join(
            f"{answer['version'][:12]} of shard {place}" for place, answer in answers.items() if answer["version"]
        )
        raise VersionMismatch("shards", expected="held by all of them (publish one version to every shard)", got=shown)

    def _gathered(self, path: str, calls: Mapping[int, dict[str, Any]]) -> tuple[Answers, dict[int, Exception]]:
        """What shards answer that are asked at once; raises the ServiceError of a call that is wrong."""
        answers, missing, wrong = {}, {}, None
        asked = {
            place: self._pool.submit(self._clients[place].post, path, fields, within=self._timeout)
            for place, fields in calls.items()
        }
        for place, future in asked.items():
            try:
                answers[place] = future.result()
            except OSError as error:
                missing[place] = error
            except ServiceError as error:
                if error.field == SCORES and error.counts:
                    answers[place] = {"version": None, "error": error}  # nothing to rank here; the others may have some
                elif error.status in BUSY:
                    missing[place] = error
                else:
                    wrong = wrong or error
        if wrong is not None:
            raise wrong
        return answers, missing

    def _missing(self, missing: Mapping[int, Exception], places: Mapping[int, np.ndarray]) -> str | None:
        """Why the answer is degraded, None where it is whole; raises ShardsMissing."""
        if not missing:
            return None
        count, total = sum(len(places[place]) for place in missing), sum(map(len, places.values()))
        said = "; ".join(
            f"shard {place} of {len(self._clients)} ({self.addresses[place]}): {error}"
            for place, error in sorted(missing.items())
        )
        message = f"{f'{count} of {total} candidates have no score: ' if total else ''}no answer of {said}"
        if not self._degrades or len(missing) == len(places):
            raise ShardsMissing(message, missing, count)
        return message


def merged(answers: Answers, given: Candidates, k: int) -> dict[str, Any]:
    """The answer of all shards to `rank`: the best k of their best; raises as `ShardedClient.rank`."""
    whole = {place: answer for place, answer in answers.items() if "ids" in answer}
    for place, answer in whole.items():
        plain = "group" not in answer
        expect(plain, "cut", "shards without ServingConfig.group", f"group={answer.get('group')!r} of shard {place}")
    _expect_some_finite(answers, any(len(answer["ids"]) for answer in whole.values()))
    order = sorted(whole)
    fields = {name: np.concatenate([whole[place][name] for place in order]) for name in ("ids", "scores", "logits")}
    best = np.argsort(-fields["scores"], kind="stable")[: k + 1]
    if (np.diff(fields["scores"][best]) == 0).any():
        best = np.lexsort((_places(fields["ids"], given), -fields["scores"]))
    counted = [answer["error"].counts if "error" in answer else answer for answer in answers.values()]
    counts = {name: sum(each[name] for each in counted) for name in ("unknown", "excluded")}
    return _common(answers) | counts | {name: values[best[:k]] for name, values in fields.items()}


def _places(ids: np.ndarray, given: Candidates) -> np.ndarray:
    """int64 [n] where among the candidates each of some distinct ids is: the first of its highest bid."""
    distinct, rows = np.unique(given.ids, return_inverse=True)
    once = np.flatnonzero(without_repeats(rows.astype(np.int32), given.bids) >= 0)
    place_of = np.empty(len(distinct), np.int64)
    place_of[rows[once]] = once
    return place_of[np.searchsorted(distinct, ids.astype(distinct.dtype))]


def _common(answers: Answers) -> dict[str, Any]:
    """What the answers say of themselves, taken together."""
    said = [answer for answer in answers.values() if "error" not in answer]
    ages = [answer["state_age"] for answer in said if answer.get("state_age") is not None]
    stages = sorted({name for answer in said for name in answer["stages"]})
    reasons = {place: answer["reason"] for place, answer in sorted(answers.items()) if answer.get("reason") is not None}
    failed = sum(answer["error"].counts["non_finite"] for answer in answers.values() if "error" in answer)
    return {
        "id": said[0]["id"],
        "version": said[0]["version"],
        "degraded": any(answer["degraded"] for answer in said),
        "reason": "; ".join(f"shard {place}: {reason}" for place, reason in reasons.items()) or None,
        "state_age": max(ages, default=None),
        "non_finite": failed + sum(answer["non_finite"] for answer in said),
        "stages": {name: max(answer["stages"].get(name, 0.0) for answer in said) for name in stages},
    }


def _degraded(answer: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """The answer of the shards that are there."""
    if reason is None:
        return answer
    return answer | {"degraded": True, "reason": reason if answer["reason"] is None else f"{answer['reason']}; {reason}"}


def _expect_some_finite(answers: Answers, some: bool) -> None:
    errors = [answer["error"] for answer in answers.values() if "error" in answer]
    if errors and not some:
        raise errors[0]
