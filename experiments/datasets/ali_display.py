"""Ali_Display_Ad_Click as a `Dataset`.

Data: Alibaba Tianchi, data set 56, under its terms: eight days of ad impressions at Taobao with clicks, and the shopping
behaviours of the 22 days before. CSV with headers: raw_sample.csv, ad_feature.csv, user_profile.csv, behavior_log.csv.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from aif_jax.data.catalogue import Catalogue
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.schema import Attribute, Schema, Vocabulary
from aif_jax.data.text_table import DataError, Kind, number_blocks, text_rows, whole_number

SHOWN, CLICKED = 1, 2  # actions of impressions
BEHAVIOURS = ("pv", "cart", "fav", "buy")  # actions 3 to 6; the data set's page writes "ipv" for "pv"
ACTIONS = 3 + len(BEHAVIOURS)
PROFILE = (
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation",
    "new_user_class_level",
)  # fmt: skip
SAMPLE: dict[str, Kind] = {
    "user": "id", "time_stamp": "integer", "adgroup_id": "id", "nonclk": ("0", "1"), "clk": ("0", "1"),
}  # fmt: skip
BEHAVIOUR: dict[str, Kind] = {
    "user": "id", "time_stamp": "integer", "btag": (*BEHAVIOURS, "ipv"), "cate": "id", "brand": "id",
}  # fmt: skip
AD = ("adgroup_id", "cate_id", "campaign_id", "customer", "brand", "price")
MISSING = ("", "NULL")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Ads:
    """ad_feature.csv, by ascending id; -1 where a value is missing."""

    raw: np.ndarray  # int64 [n]
    columns: dict[str, np.ndarray]  # int64 [n]: cate_id, campaign_id, customer, brand
    price: np.ndarray  # float64 [n]


def read(path: str | os.PathLike, *, behaviours: bool = True, user_id: bool = False) -> Dataset:
    """Reads the four files of the data set, or excerpts of them.

    What is an event: every *impression* of raw_sample (action 1 shown, 2 clicked), and with `behaviours` every line of
    behavior_log by a user who has impressions (3 pv, 4 cart, 5 fav, 6 buy). The label of a sample is its click: train and
    evaluate on `impressions(dataset)`, and on no other events. What a sample's history is: all of the user's strictly earlier
    events, behaviours and impressions, clicked or not; the action tells the network which.

    A behaviour names a category and a brand and no item. It stands in the catalogue as a row of its own for each pair of the
    two, with item 0 (unknown), so that it meets the candidates in category and brand: by SIM on either field, by attention
    through their embeddings. Ads are the rows of positive raw id, the ad group; such pairs have negative raw ids and are
    never candidates.

    | feature | values |
    |---|---|
    | item `item`, `category`, `brand`, `campaign`, `customer` | brand may be unknown |
    | item float | log(1 + price) |
    | user `cms_segid`, ..., `new_user_class_level` | of user_profile.csv; unknown where empty or without a profile |
    | user `user` | the user's row, with `user_id` |

    The ad's place on the page (pid) belongs to neither user nor item and is left out.

    Args:
      path: the folder with the files.
      behaviours: whether to read behavior_log.csv (723 million lines in the full set).
      user_id: adds the user's own row as a user attribute.

    Returns:
      The data set; user rows follow the ascending raw ids.

    Raises:
      DataError: a file is missing or malformed: names file, line, what was expected and what came.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> def write(name, *lines):
      ...     _ = (folder / name).write_text("".join(line + "\\n" for line in lines))
      >>> write("raw_sample.csv", "user,time_stamp,adgroup_id,pid,nonclk,clk", "7,1494137644,1,430548_1007,0,1")
      >>> write("ad_feature.csv", "adgroup_id,cate_id,campaign_id,customer,brand,price", "1,60,83237,1,NULL,170.0")
      >>> write("user_profile.csv", ",".join(("userid", *PROFILE)) + " ", "7,0,5,2,5,,3,0,3")
      >>> data = read(folder, behaviours=False)
      >>> data.log.action.tolist(), data.user_ids["pvalue_level"].tolist()
      ([2], [0, 0])
    """
    folder = Path(path)
    ads = _ads(folder / "ad_feature.csv")
    events = [_impressions(folder / "raw_sample.csv", Vocabulary(ads.raw))]
    users = Vocabulary(events[0]["user"])
    pairs = np.zeros((0, 2), np.int64)
    if behaviours:
        found, pairs = _behaviours(folder / "behavior_log.csv", users, pairs=len(ads.raw))
        events.append(found)
    columns = {name: np.concatenate([part[name] for part in events]) for name in events[0]}

    values = {name: np.append(np.full(len(pairs), -1), ads.columns[name]) for name in ads.columns}
    values["cate_id"][: len(pairs)], values["brand"][: len(pairs)] = pairs[:, 0], pairs[:, 1]
    known = {name: Vocabulary(column[column >= 0]) for name, column in values.items()}
    items = Vocabulary(np.append(-np.arange(1, len(pairs) + 1), ads.raw))
    # ascending ids: the last pair has the lowest
    order = np.append(np.arange(len(pairs))[::-1], np.arange(len(pairs), len(items) - 1))
    rows = {name: known[name].encode(column[order]) for name, column in values.items()}
    item = np.arange(1, len(items), dtype=np.int32)
    item[: len(pairs)] = 0
    price = np.append(np.zeros(len(pairs)), ads.price)
    profile, attributes = _profile(folder / "user_profile.csv", users)
    if user_id:
        profile["user"] = np.arange(len(users), dtype=np.int32)
        attributes = (Attribute(name="user", size=len(users)), *attributes)
    names = {"category": "cate_id", "brand": "brand", "campaign": "campaign_id", "customer": "customer"}
    schema = Schema(
        item_attributes=(
            Attribute(name="item", size=len(items)),
            *(Attribute(name=name, size=max(len(known[column]), 2)) for name, column in names.items()),
        ),
        user_attributes=attributes,
        behaviour_fields=("item", "category", "brand"),
        actions=ACTIONS,
        item_floats=1,
    )
    return Dataset(
        name=folder.name,
        schema=schema,
        log=EventLog.from_arrays(
            user=users.encode(columns["user"]),
            item=items.encode(columns["item"]),
            action=columns["action"],
            time=columns["time"],
            users=len(users),
        ),
        catalogue=Catalogue.from_items(
            schema,
            items.raw,
            ids={"item": item} | {name: rows[column] for name, column in names.items()},
            floats=np.log1p(price)[:, None],
        ),
        user_ids=profile,
        user_floats=np.zeros((len(users), 0), np.float32),
        users=users,
        items=items,
    )


def impressions(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The samples of the data set: where an ad was shown, and whether it was clicked.

    Returns:
      positions int64 [n] in the event log, ascending, and labels float32 [n].
    """
    action = dataset.log.action
    positions = np.flatnonzero((action == SHOWN) | (action == CLICKED))
    return positions, (action[positions] == CLICKED).astype(np.float32)


def _impressions(path: Path, ads: Vocabulary) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {"user": [], "item": [], "action": [], "time": []}
    for first, block in number_blocks(path, SAMPLE, header=True):
        both = np.flatnonzero(block["clk"] == block["nonclk"])
        if both.size:
            got = f"{block['nonclk'][both[0]]} and {block['clk'][both[0]]}"
            raise DataError(path, first + int(both[0]), "nonclk and clk to be 0 and 1 or 1 and 0", got)
        unknown = np.flatnonzero(ads.encode(block["adgroup_id"]) == 0)
        if unknown.size:
            got = str(block["adgroup_id"][unknown[0]])
            raise DataError(path, first + int(unknown[0]), "an adgroup_id that ad_feature.csv has", got)
        for name, values in zip(
            parts, (block["user"], block["adgroup_id"], SHOWN + block["clk"], block["time_stamp"]), strict=True
        ):
            parts[name].append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _behaviours(path: Path, users: Vocabulary, *, pairs: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Events whose item is minus the number, from 1, of their pair; and the pairs int64 [n, 2] of category and brand."""
    parts: dict[str, list[np.ndarray]] = {"user": [], "item": [], "action": [], "time": []}
    for _, block in number_blocks(path, BEHAVIOUR, header=True):
        kept = users.encode(block["user"]) > 0
        packed = (block["cate"][kept].astype(np.int64) << 32) | block["brand"][kept]
        action = 3 + block["btag"][kept] % len(BEHAVIOURS)  # "ipv" stands after the last one, and is the first
        for name, values in zip(parts, (block["user"][kept], packed, action, block["time_stamp"][kept]), strict=True):
            parts[name].append(values)
    events = {name: np.concatenate(values) for name, values in parts.items()}
    packed, inverse = np.unique(events["item"], return_inverse=True)
    events["item"] = -1 - inverse
    return events, np.stack([packed >> 32, packed & (2**32 - 1)], axis=1)


def _ads(path: Path) -> _Ads:
    lines: dict[int, int] = {}
    rows: list[list[int]] = []
    prices: list[float] = []
    for line, row in text_rows(path, AD, header=True):
        ad = whole_number(path, line, "adgroup_id", row[0])
        if ad in lines:
            raise DataError(path, line, "each adgroup_id once", f"{ad}, which stands in line {lines[ad]} too")
        lines[ad] = line
        rows.append([
            -1 if text in MISSING and name == "brand" else whole_number(path, line, name, text)
            for name, text in zip(AD[1:5], row[1:5], strict=True)
        ])  # fmt: skip
        prices.append(_price(path, line, row[5]))
    if not rows:
        raise DataError(path, 2, "at least one ad", "the end of the file")
    raw, table, price = np.array(list(lines), np.int64), np.array(rows, np.int64), np.array(prices)
    order = np.argsort(raw)
    columns = {name: table[order, i] for i, name in enumerate(AD[1:5])}
    return _Ads(raw=raw[order], columns=columns, price=price[order])


def _price(path: Path, line: int, text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < np.inf:
        raise DataError(path, line, "price to be a number of 0 or more", repr(text))
    return price


def _profile(path: Path, users: Vocabulary) -> tuple[dict[str, np.ndarray], tuple[Attribute, ...]]:
    """ids [U] of each profile column, and the attributes; the file may hold more users, and need not hold all."""
    table = np.full((len(users), len(PROFILE)), -1, np.int64)
    lines: dict[int, int] = {}
    raws: list[int] = []
    rows: list[list[int]] = []
    for line, (user, *values) in text_rows(path, ("userid", *PROFILE), header=True):
        raw = whole_number(path, line, "userid", user)
        if raw in lines:
            raise DataError(path, line, "each userid once", f"{raw}, which stands in line {lines[raw]} too")
        lines[raw] = line
        raws.append(raw)
        rows.append([
            -1 if text in MISSING else whole_number(path, line, name, text)
            for name, text in zip(PROFILE, values, strict=True)
        ])  # fmt: skip
    if rows:
        at = users.encode(np.array(raws, np.int64))
        table[at] = np.array(rows, np.int64)
        table[0] = -1  # where those went whom nothing was shown
    known = {name: Vocabulary(column[column >= 0]) for name, column in zip(PROFILE, table.T, strict=True)}
    attributes = tuple(Attribute(name=name, size=max(len(vocabulary), 2)) for name, vocabulary in known.items())
    return {name: vocabulary.encode(table[:, i]) for i, (name, vocabulary) in enumerate(known.items())}, attributes
