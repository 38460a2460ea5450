"""Ali_Display_Ad_Click as a `Dataset`.

Data: Alibaba Tianchi, data set 56, under its terms: eight days of ad impressions at Taobao with clicks, and the shopping
behaviours of the 22 days before. CSV with headers: raw_sample.csv, ad_feature.csv, user_profile.csv, behavior_log.csv.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from aif_jax import Columns, Dataset
from experiments.datasets.tables import UNKNOWN, Table, dataset, text_file

SHOWN, CLICKED = 1, 2  # actions of impressions
BEHAVIOURS = ("pv", "cart", "fav", "buy")  # actions 3 to 6; the data set's page writes "ipv" for "pv"
PAIRS = 1 << 40
"""Raw ids of pairs of category and brand are this and more; those of ads are less."""
PROFILE = (
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation",
    "new_user_class_level",
)  # fmt: skip
MISSING = (UNKNOWN, "NULL")


def read(path: str | os.PathLike, *, behaviours: bool = True, user_id: bool = False) -> Dataset:
    """Reads the four files of the data set, or excerpts of them.

    What is an event: every *impression* of raw_sample (action 1 shown, 2 clicked), and with `behaviours` every line of
    behavior_log by a user who has impressions (3 pv, 4 cart, 5 fav, 6 buy). The label of a sample is its click: train and
    evaluate on `impressions(dataset)`, and on no other events. What a sample's history is: all of the user's strictly earlier
    events, behaviours and impressions, clicked or not; the action tells the network which.

    A behaviour names a category and a brand and no item. Each pair of the two is an item of the catalogue, with a raw id from
    `PAIRS` on, so that it meets the candidates in category and brand: by SIM on either field, by attention through their
    embeddings. Pairs are never candidates; ads are, their raw id is the ad group.

    | feature | values |
    |---|---|
    | item `item`, `category`, `brand`, `campaign`, `customer` | brand may be unknown |
    | item float | log(1 + price) |
    | user `cms_segid`, ..., `new_user_class_level` | of user_profile.csv; unknown where empty or without a profile |
    | user `user` | the user's row, with `user_id` |

    The ad's place on the page (pid) belongs to neither user nor item and is left out.

    `behaviours`: whether to read behavior_log.csv (723 million lines in the full set).

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
    items = _ads(folder / "ad_feature.csv")
    events = _impressions(folder / "raw_sample.csv", items["item"])
    users = np.unique(events["user"])
    if behaviours:
        found, pairs = _behaviours(folder / "behavior_log.csv", users)
        events = {name: np.concatenate([values, found[name]]) for name, values in events.items()}
        items = {name: np.concatenate([values, pairs[name]]) for name, values in items.items()}
    may_miss = ("brand", "campaign", "customer")
    return dataset(
        folder.name,
        events=events,
        items=items | {name: [None if value < 0 else value for value in items[name].tolist()] for name in may_miss},
        users=_profile(folder / "user_profile.csv", users),
        columns=Columns(
            action="action",
            actions=tuple(range(1, 3 + len(BEHAVIOURS))),
            item_attributes=may_miss,
            item_floats=("log_price",),
            behaviour_fields=("brand",),
            user_attributes=PROFILE,
            user_id=user_id,
            scale=False,
        ),
        vocabularies={},
    )


def impressions(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The samples: positions int64 [n] in the log where an ad was shown, and float32 [n] whether it was clicked."""
    action = dataset.log.action
    positions = np.flatnonzero((action == SHOWN) | (action == CLICKED))
    return positions, (action[positions] == CLICKED).astype(np.float32)


def _ads(path: Path) -> dict[str, np.ndarray]:
    table = Table(text_file(path), {
        "adgroup_id": "id", "cate_id": "id", "campaign_id": "id", "customer": "id", "brand": "text", "price": "float",
    })  # fmt: skip
    table.expect_once("adgroup_id")
    table.expect(table["price"] >= 0, "price", "0 or more")
    return {
        "item": table["adgroup_id"],
        "category": table["cate_id"],
        "campaign": table["campaign_id"],
        "customer": table["customer"],
        "brand": table.integers("brand", missing=MISSING),
        "log_price": np.log1p(table["price"]),
    }


def _impressions(path: Path, ads: np.ndarray) -> dict[str, np.ndarray]:
    table = Table(text_file(path), {
        "user": "id", "time_stamp": "time", "adgroup_id": "id", "nonclk": "text", "clk": "text",
    })  # fmt: skip
    clicked, passed = (table.words(name, ("0", "1")) for name in ("clk", "nonclk"))
    table.expect(clicked != passed, "clk", "0 where nonclk is 1, 1 where it is 0")
    table.expect(np.isin(table["adgroup_id"], ads), "adgroup_id", "an ad that ad_feature.csv has")
    return {"user": table["user"], "item": table["adgroup_id"], "action": SHOWN + clicked, "time": table["time_stamp"]}


def _behaviours(path: Path, users: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Events of known users, and the pairs of category and brand that are their items."""
    table = Table(text_file(path), {"user": "id", "time_stamp": "time", "btag": "text", "cate": "id", "brand": "id"})
    action = CLICKED + 1 + table.words("btag", (*BEHAVIOURS, "ipv")) % len(BEHAVIOURS)  # "ipv" comes last and is the first
    kept = np.isin(table["user"], users)
    pairs, pair = np.unique(np.stack([table["cate"][kept], table["brand"][kept]], axis=1), axis=0, return_inverse=True)
    none = np.full(len(pairs), -1)
    items = {"item": PAIRS + np.arange(len(pairs)), "category": pairs[:, 0], "brand": pairs[:, 1], "campaign": none}
    items |= {"customer": none, "log_price": np.zeros(len(pairs), np.float32)}
    events = {"user": table["user"][kept], "action": action[kept], "time": table["time_stamp"][kept]}
    return events | {"item": PAIRS + pair.reshape(-1)}, items


def _profile(path: Path, users: np.ndarray) -> dict[str, list]:
    """Raw values of every user; None where there is none. The file may hold more users, and need not hold all."""
    header = []
    if path.is_file():
        with path.open(encoding="utf8") as file:
            header = file.readline().rstrip("\r\n").split(",")
    names = {name.strip(): name for name in header}  # the file's last column name ends in a space
    table = Table(text_file(path), {"userid": "id"} | {names.get(name, name): "text" for name in PROFILE})
    table.expect_once("userid")
    row = dict(zip(table["userid"].tolist(), range(len(table)), strict=True))
    at = [row.get(user) for user in users.tolist()]
    columns: dict[str, list] = {"user": users.tolist()}
    for name in PROFILE:
        values = table.integers(names.get(name, name), missing=MISSING).tolist()
        columns[name] = [None if i is None or values[i] < 0 else values[i] for i in at]
    return columns
