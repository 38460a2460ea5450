"""A stranger's road: a data set in another company's shape, from its files to a service that answers from a folder.

Ids are text, times in ms, attributes have nulls, bags a separator; each day has a file, each request several impressions. A
second road is that of an impression log, from its files to a service that follows a store through two refreshes.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

import aif_jax as aif
from aif_jax.connectors import SnapshotStore
from aif_jax.encoding.times import TimeUnit
from aif_jax.readers import encode_items
from aif_jax.refreshing import GateConfig
from aif_jax.train.tasks import Impressions, NextItem
from tests.beside import meanwhile
from tests.client import Client
from tests.reliability.sizes import FULL, fully, generator
from tests.service_world import running, until

pytestmark = pytest.mark.lane("standing")
DAYS, DAY_MS = 12, 86_400_000
START = 1_777_600_000_000 // DAY_MS * DAY_MS
USERS, ITEMS, CONTENT = 40, 60, 6
SERVING = aif.ServingConfig(buckets=(64,), max_k=8)
ADDITIONS = ("factors", "catalogue", "unseen", "calibration")


@dataclasses.dataclass(frozen=True)
class Road:
    """What a company has, and what it chose."""

    preset: str
    length: int | None
    form: str  # of the files: "parquet" or "csv"
    separator: str
    impressions: bool  # whether the task is to rank what was shown
    additions: tuple[str, ...]

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Road":
        impressions = bool(rng.random() < 0.4)
        chosen = [name for name in ADDITIONS if rng.random() < 0.5 and not (impressions and name == "catalogue")]
        return cls(
            preset=str(rng.choice(list(aif.presets.PRESETS))),
            length=[None, 40, 65, 130][rng.integers(4)],
            form=str(rng.choice(["parquet", "csv"])),
            separator=str(rng.choice([";", ",", " / "])),
            impressions=impressions,
            additions=tuple(chosen),
        )

    def columns(self) -> aif.Columns:
        return aif.Columns(
            user="visitor", item="sku", time="at_ms", time_unit="ms", action="what", actions=("shown", "clicked", "bought"),
            category="rubric", item_attributes=("maker",), behaviour_fields=("maker",), item_bags=("labels",), bag_length=3,
            bag_separator=self.separator, item_floats=("price",), side=("margin",), item_key="article", user_key="id",
            user_attributes=("city", "plan"), user_floats=("tenure",), content="embedding" if self.form == "parquet" else None,
        )  # fmt: skip

    def config(self, schema: aif.Schema) -> aif.Config:
        """The preset, at sizes for tests."""
        sizes: dict[str, Any] = {"width": 8, "short_length": 16, "towers": (8,)}
        if self.preset != "two_tower":
            sizes |= {"head": aif.heads.Mlp((8,))} | ({} if self.length is None else {"long_length": self.length})
        return aif.presets.PRESETS[self.preset](schema, **sizes)


def company(rng: np.random.Generator, road: Road) -> tuple[dict[str, list], dict[str, list], list[dict[str, list]]]:
    """Items, users, and the impressions of each day, as columns of raw values."""

    def some(values: list, share: float = 0.15) -> Any:
        return None if rng.random() < share else values[rng.integers(len(values))]

    labels = ["new", "größer", "50%", "gift"]
    items = {
        "article": [f"SKU-{number:03d}/é" for number in range(ITEMS)],
        "rubric": [str(rng.choice(["tea", "Küche", "0", "none"])) for _ in range(ITEMS)],
        "maker": [some(["Ada & Co", "7", "b"]) for _ in range(ITEMS)],
        "labels": [some([labels[:count] for count in range(1, 5)]) for _ in range(ITEMS)],
        "price": [float(np.float32(rng.lognormal(3))) for _ in range(ITEMS)],
        "margin": [float(np.float32(rng.uniform(0, 1))) for _ in range(ITEMS)],
        "embedding": [rng.normal(size=CONTENT).astype(np.float32).tolist() for _ in range(ITEMS)],
    }
    users = {
        "id": [f"v{number:x}@shop" for number in range(USERS)],
        "city": [some(["Bern", "Łódź"]) for _ in range(USERS)],
        "plan": [some(["free", "paid"], 0.5) for _ in range(USERS)],
        "tenure": [float(rng.integers(0, 900)) for _ in range(USERS)],
    }
    appeal = 1.5 * rng.normal(size=ITEMS - 5)  # the last items are never shown
    shown = np.exp(appeal / 2) / np.exp(appeal / 2).sum()
    days = []
    for day in range(DAYS):
        rows: dict[str, list] = {name: [] for name in ("visitor", "sku", "at_ms", "what")}
        for user in rng.permutation(USERS)[: USERS // 2]:
            for request in range(rng.integers(1, 4)):
                at = START + day * DAY_MS + int(rng.integers(request * DAY_MS // 4, (request + 1) * DAY_MS // 4))
                for item in rng.choice(ITEMS - 5, rng.integers(2, 6), replace=False, p=shown):
                    level = appeal[item] + rng.normal() / 2
                    what = "bought" if level > 1.8 else "clicked" if level > 0.3 else "shown"
                    for name, value in zip(rows, (users["id"][user], items["article"][item], at, what), strict=True):
                        rows[name].append(value)
        days.append(rows)
    return items, users, days


def write(path: Path, table: Mapping[str, list], separator: str) -> None:
    """A Parquet file, or a CSV file where nulls are empty and bags are joined."""
    if path.suffix == ".parquet":
        return parquet.write_table(pa.table(dict(table)), path)
    text = {name: [separator.join(v) if isinstance(v, list) else v for v in values] for name, values in table.items()}
    csv.write_csv(pa.table(text), path)


def added(run: aif.Run, data: Any, road: Road) -> aif.Run:
    """The run with the additions, in the order in which they are documented."""
    for name in road.additions:
        if name == "factors":
            run = run.with_svd(data)
        elif name == "catalogue":
            run = run.with_popularity_correction(data)
        elif name == "unseen":
            run = run.with_unseen_items(data)
        else:
            try:
                run = run.calibrate(data, progress=False)
            except ValueError as error:  # the documented answer to a model that so little data has not taught an order
                if "expected scores that rise with the labels" not in str(error):
                    raise
                print(f"not calibrated: {error}")
    return run


def walk(folder: Path, road: Road, rng: np.random.Generator) -> aif.Run:
    """From files to a service, which must answer as the joint model; the run that it serves."""
    items, users, days = company(rng, road)
    if road.form == "csv":
        del items["embedding"]
    folder.mkdir()
    (folder / "impressions").mkdir()
    write(articles := folder / f"articles.{road.form}", items, road.separator)
    write(folder / f"visitors.{road.form}", users, road.separator)
    for day, rows in enumerate(days):
        write(folder / "impressions" / f"2026-05-{day + 1:02d}.{road.form}", rows, road.separator)

    sources: dict[str, Any] = {"items": articles, "users": folder / f"visitors.{road.form}", "columns": road.columns()}
    data = aif.read(folder / "impressions", **sources)
    assert len(data.log) == sum(len(rows["sku"]) for rows in days)
    task = Impressions(candidates=6, threshold=2) if road.impressions else NextItem(negatives=3, evaluated=9)
    settings = dict(epochs=4, batch_size=32, learning_rate=0.01, requests=50)
    config = aif.FitConfig(k=None if road.impressions else 5, id_dropout=0.1, **settings)
    run = aif.fit(aif.build(road.config(data.schema)), data, config, task=task, out=folder / "run", progress=False)
    run = added(aif.Run.load(folder / "run"), data, road)
    assert all(np.isfinite(value) for value in run.metrics.values())
    index = run.index(articles, progress=False)
    assert len(index) == ITEMS
    run.export(folder / "model", index=index, platforms=("cpu",))

    # what a call brings: raw values of one user, and of that user's events alone
    whole = {name: [value for rows in days for value in rows[name]] for name in days[0]}
    now, encoder, names = START + DAYS * DAY_MS, run.encoder, np.array([*items["article"][::-1], "SKU-new"])
    assert encoder is not None
    records = [{name: values[user] for name, values in users.items()} for user in rng.choice(USERS, 3, replace=False)]
    own = [
        {name: np.asarray(values)[np.asarray(whole["visitor"]) == record["id"]].tolist() for name, values in whole.items()}
        for record in records
    ]
    features = [encoder.user(record, events, now) for record, events in zip(records, own, strict=True)]
    _, encoded = encode_items({name: values[::-1] for name, values in items.items()}, encoder)
    joint = jax.jit(run.model.joint)
    expected = [np.asarray(joint(run.params, user, encoded)) for user in features]

    with running(folder / "model", config=SERVING) as service, service.client() as client:
        for record, events, logits in zip(records, own, expected, strict=True):
            call = {"user": record["id"], "record": record, "events": events, "now": now, "candidates": names}
            assert expect_answer(client, call, logits, index.version)["unknown"] == 1
    return run


def expect_answer(client: Client, call: dict[str, Any], logits: np.ndarray, version: str) -> dict[str, Any]:
    """The ranking of a call, whose scores are those of the joint model; a last candidate that has none is unknown."""
    answer, best = client.score(**call), client.rank(**call, k=5)
    assert answer["version"] == best["version"] == version and not answer["degraded"]
    np.testing.assert_allclose(answer["logits"][: len(logits)], logits, rtol=1e-4, atol=1e-4)
    assert best["ids"].tolist() == call["candidates"][np.argsort(-answer["logits"], kind="stable")[:5]].tolist()
    return best


def test_a_short_road(tmp_path):
    road = Road("two_tower_matching", None, "csv", " / ", False, ("factors", "catalogue", "unseen", "calibration"))
    assert "calibration" in walk(tmp_path / "road", road, generator("road", seed=0)).params["fitted"]


@fully
def test_roads_of_strangers(tmp_path):
    rng = generator("roads")
    for number in range(FULL.roads):
        road = Road.drawn(rng)
        print(number, road)
        walk(tmp_path / str(number), road, rng)


ACTIONS, FIRST_DAYS, LEAVERS = ("shown", "clicked", "bought"), 8, 4
SHOPPERS, GOODS, RUBRICS = 96, 40, 4
GATE = GateConfig(users=5, gauc=0.3, log_loss=1.0, calibration=1.0)


@dataclasses.dataclass(frozen=True)
class ImpressionLog:
    """A shop whose log has what was shown, at times within a second, and without times what was clicked before; items leave."""

    seed: int
    unit: TimeUnit

    def columns(self) -> aif.Columns:
        return aif.Columns(
            user="visitor", item="sku", time="at", time_unit=self.unit, action="what", actions=ACTIONS,
            history_actions=ACTIONS[1:], category="rubric", item_key="article", item_statistics=(86_400,),
        )  # fmt: skip

    def rubric(self, item: int) -> str | None:
        """The rubric of an item, None for every ninth."""
        return None if item % 9 == 4 else f"rubric {item % RUBRICS}"

    def goods(self, days: int) -> range:
        """The items that are on sale after some days."""
        return range(LEAVERS * max(0, days - FIRST_DAYS) // 2, GOODS)

    def items(self, days: int) -> dict[str, list]:
        return {"article": [f"SKU-{item}" for item in self.goods(days)], "rubric": [self.rubric(n) for n in self.goods(days)]}

    def events(self, days: int) -> dict[str, list]:
        """The log of the first days, times in ms."""
        table: dict[str, list] = {name: [] for name in ("visitor", "sku", "at", "what")}

        def add(user: int, item: int, at: int, what: str) -> None:
            for name, value in zip(table, (f"v{user}@shop", f"SKU-{item}", at, what), strict=True):
                table[name].append(value)

        rng = np.random.default_rng(self.seed)
        for user in range(SHOPPERS):
            for item in rng.choice(GOODS, 4, replace=False):
                add(user, item, START - DAY_MS, ACTIONS[1 + rng.integers(2)])  # no times: all at one moment
        for day in range(days):
            for user in rng.permutation(SHOPPERS)[: 3 * SHOPPERS // 4]:
                at = START + day * DAY_MS + int(rng.integers(DAY_MS // 1000 - 60)) * 1000
                for request in range(rng.integers(1, 4)):  # within a second: one list or several, as the unit says
                    for item in rng.choice(self.goods(day + 1), 5, replace=False):
                        likes = rng.random() < (0.85 if item % RUBRICS == user % RUBRICS else 0.1)
                        add(user, item, at + 130 * request, ACTIONS[int(likes) + int(likes and rng.random() < 0.3)])
        return table

    def write(self, folder: Path, days: int) -> dict[str, Path]:
        """The files after some days: events by day of the log, and items."""
        table = pa.table(self.events(days))
        table = table.set_column(2, "at", table["at"].cast(pa.timestamp("ms", tz="UTC")))
        (folder / "log").mkdir(parents=True)
        for part, start in enumerate(range(0, len(table), 500)):
            parquet.write_table(table.slice(start, 500), folder / "log" / f"part-{part:03d}.parquet")
        parquet.write_table(pa.table(self.items(days)), folder / "items.parquet")
        return {"events": folder / "log", "items": folder / "items.parquet"}

    def moment(self, ms: int) -> int:
        return ms if self.unit == "ms" else ms // 1000


def expect_answers(log: ImpressionLog, trained: aif.Trained, client: Client, days: int, rng: np.random.Generator) -> None:
    """Histories by the service's encoder are those of training, and the service ranks as the joint model does."""
    raw, encoder = log.events(days), trained.encoder
    assert encoder is not None
    data = aif.read(raw | {"at": [log.moment(at) for at in raw["at"]]}, items=log.items(days), encoder=encoder, unknown="skip")
    length = trained.config.history_length
    seconds = int(data.log.time.max()) + 1
    now, names = log.moment(1000 * seconds), np.array(log.items(days)["article"])[::-1]
    candidates = data.item_features(encoder.vocabularies["item"].encode(names), seconds)
    joint = jax.jit(trained.model.joint)
    for user in rng.choice(data.users.raw, 6, replace=False).tolist():
        own = [at for at, name in enumerate(raw["visitor"]) if name == user]
        own = rng.permutation(own)  # in any order
        events = {"sku": [raw["sku"][at] for at in own], "at": [log.moment(raw["at"][at]) for at in own]}
        events["what"] = [raw["what"][at] for at in own]
        features = encoder.with_length(length).user(None, events, now)
        trained_on = data.request_features(data.users.encode([user]), [seconds], length=length).history
        for field in ("item", "action", "age", "mask"):
            np.testing.assert_array_equal(getattr(features.history, field), getattr(trained_on, field)[0], err_msg=field)
        assert set(features.history.action[features.history.mask]) <= {2, 3}
        call = {"user": user, "events": events, "now": now, "candidates": names}
        expect_answer(client, call, np.asarray(joint(trained.params, features, candidates)), trained.version)


@fully
@pytest.mark.parametrize("unit", ["s", "ms"])
def test_roads_of_impression_logs(unit, tmp_path):
    """From the files to a service that follows a store through two refreshes."""
    rng, folder, days = generator("impressions"), tmp_path, FIRST_DAYS
    log = ImpressionLog(int(rng.integers(2**31)), unit)
    data = aif.read(**log.write(folder / "first", days), columns=log.columns())
    sizes: dict[str, Any] = dict(width=8, short_length=8, long_length=16, towers=(8,), head=aif.heads.Mlp((8,)))
    model = aif.build(aif.presets.two_tower_matching(data.schema, **sizes))
    with pytest.raises(ValueError, match="threshold: expected an action row in"):
        aif.fit(model, data, task=Impressions(candidates=6, threshold=1), progress=False)
    task = Impressions(candidates=6, threshold=2)
    config = aif.FitConfig(epochs=8, learning_rate=0.02, validation=0.25, test=0.0, batch_size=32, requests=200)
    run = aif.fit(model, data, config, task=task, out=folder / "run", progress=False)
    assert run.metrics["gauc"] > 0.6
    settings = dict(epochs=2, learning_rate=0.01, batch_size=32, requests=200, held_out=0.3)
    config = aif.RefreshConfig(**settings, gate=GATE, platforms=("cpu",))
    run.export(folder / "model", index=run.index(data.catalogue, progress=False), platforms=("cpu",))
    store, here, versions, answers = SnapshotStore(folder / "store"), folder / "here", [run.trained.version], []
    store.publish(folder / "model")
    with running(here, config=SERVING, store=store) as service, service.client() as client, service.client() as other:
        user = log.events(0)["visitor"][0]
        call = {"user": user, "events": {"sku": ["SKU-30"], "at": [log.moment(START)], "what": ["clicked"]}}
        call |= {"now": log.moment(START + DAY_MS), "candidates": log.items(FIRST_DAYS + 4)["article"]}

        def ask() -> None:
            answers.append(other.score(**call))
            assert not answers[-1]["degraded"]
            time.sleep(0.1)

        with meanwhile(ask):
            expect_answers(log, run.trained, client, days, rng)
            for days in (FIRST_DAYS + 2, FIRST_DAYS + 4):
                out, files = folder / "store", log.write(folder / f"{days} days", days)
                made = aif.refresh(out, config=config, **files, out=out, progress=False)
                assert made.status == "published" and made.trained is not None, made.report
                newest, earlier = (made.report["gate"]["metrics"][name]["gauc"] for name in ("newest", "fixed"))
                assert newest["new"] > GATE.floor and earlier["new"] > GATE.floor
                assert made.report["additions"]["version"] == made.trained.version
                versions.append(made.trained.version)
                until(lambda: client.rank(**call, k=1)["version"] == versions[-1])
                expect_answers(log, made.trained, client, days, rng)
    served = [version for version, _ in itertools.groupby(each["version"] for each in answers)]
    assert len(set(versions)) == 3 and served == versions
    for version in versions:  # each answer is of one version: those of a version are the same
        first, *others = (each["logits"] for each in answers if each["version"] == version)
        assert all(np.array_equal(first, other) for other in others)
    refused = aif.refresh(
        folder / "store", config=dataclasses.replace(config, gate=dataclasses.replace(GATE, floor=1.0)),
        **log.write(folder / "more", days + 2), out=folder / "store", progress=False,
    )  # fmt: skip
    assert refused.status == "refused" and store.current() == made.name
    assert any(re.match("newest: gauc of the new .* bound: surely above 1", each) for each in refused.report["gate"]["reasons"])
