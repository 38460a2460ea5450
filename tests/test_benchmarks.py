"""Public benchmarks: Yambda's files and split, the figures against slow ones, every command in its smoke form."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aif_jax.train.evaluate import catalogue_scores
from experiments import benchmarks
from experiments.datasets import yambda
from tests.refusals import refused
from tests.test_scripts import measured

TEST, GAP = yambda.TEST, yambda.GAP
LISTENS = [  # user, item, time, organic, played
    (100, 30, TEST - GAP - 5, 1, 50.0),  # the last moment of training
    (100, 10, TEST - GAP, 1, 90.0),  # in the gap
    (100, 20, TEST, 0, 100.0),  # the first moment of the test
    (100, 30, TEST + 5, 1, 49.0),  # not half of the track
    (200, 10, TEST - 10 * GAP, 0, 150.0),
    (200, 50, TEST + 10, 1, 80.0),  # an item without a listen in training
    (300, 10, TEST + 10, 1, 80.0),  # a user without one
]
ARTISTS = [(10, 7), (20, 9), (20, 8), (30, 7), (99, 1)]


def columns(rows, *names, dtype=np.int64):
    return {name: np.array([row[i] for row in rows], dtype) for i, name in enumerate(names)}


def write(folder, listens=LISTENS):
    table = columns(listens, "uid", "item_id", "timestamp", "is_organic", "played_ratio_pct", dtype=np.float64)
    table = {name: values if name == "played_ratio_pct" else values.astype(np.uint32) for name, values in table.items()}
    yambda.write(folder, table, columns(ARTISTS, "item_id", "artist_id"))
    return folder


def test_listens_that_count_and_the_split(tmp_path):
    data, test = yambda.read(write(tmp_path))
    assert test == TEST and data.repeats
    assert list(data.users.decode(data.log.user)) == [100, 100, 200, 200]
    assert list(data.items.decode(data.log.item)) == [30, 20, 10, 50]
    assert data.log.time.tolist() == [TEST - GAP - 5, TEST, TEST - 10 * GAP, TEST + 10]
    assert data.log.action.tolist() == [2, 1, 1, 2]  # organic, recommended
    artist = data.encoder.vocabularies["category"]
    assert list(artist.decode(data.catalogue.ids["category"][1:])) == [7, 8, 7, -1]  # 20 has two, the lower one; 50 none


def test_what_a_file_lacks_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"listens.parquet: expected a file of Yambda, got none. It is published as"):
        yambda.read(tmp_path)
    write(tmp_path, LISTENS[2:4])
    message = rf"expected listens of at least 50 % before {TEST - GAP} and of the same users .*, got 0 and"
    refused(ValueError, message, yambda.read, tmp_path)
    path = tmp_path / "flat" / "50m" / "listens.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["uid"]), path)
    refused(ValueError, r"listens.parquet: expected columns \['uid'\], got \['item_id'", yambda.read, tmp_path)
    pq.write_table(table.set_column(0, "uid", pa.array(["a"] * len(table))), path)
    refused(ValueError, "column 'uid': expected int64, got string", yambda.read, tmp_path)
    pq.write_table(table.set_column(0, "uid", pa.array([1, None], pa.int64())), path)
    refused(ValueError, "column 'uid': expected no missing value, got 1", yambda.read, tmp_path)


def test_users_are_ranked_once_as_a_slow_loop_ranks_them(tmp_path):
    options = SimpleNamespace(smoke=True, days=None, requests=1000, epochs=1)
    benchmark = benchmarks.of_yambda(benchmarks.small_files("yambda", tmp_path), options)
    data, k = benchmark.data, 5
    run = benchmarks.trained("two-tower", benchmark, options)
    found = benchmarks.once_a_user(run, data, TEST, k=k, requests=1000)
    log, whole = data.log, run.with_popularity_correction(data)
    trained = set(log.item[log.time < TEST].tolist())
    users = np.unique(log.user[log.time >= TEST])
    assert found[f"ndcg@{k}"].users.tolist() == users.tolist() and len(users) > 3
    for place, user in enumerate(users):
        later = np.flatnonzero((log.user == user) & (log.time >= TEST))
        wanted = set(log.item[later].tolist())
        ((_, scores),) = catalogue_scores(whole.model, whole.params, data, later[:1], repeats=True, progress=False)
        order = [item for item in np.argsort(-scores[0], kind="stable").tolist() if item in trained][:k]
        gain = sum(1 / np.log2(rank + 2) for rank, item in enumerate(order) if item in wanted)
        best = sum(1 / np.log2(rank + 2) for rank in range(min(k, len(wanted))))
        assert found[f"ndcg@{k}"].values[place] == pytest.approx(gain / best)
        assert found[f"recall@{k}"].values[place] == pytest.approx(len(wanted & set(order)) / len(wanted))


@pytest.mark.parametrize("name", ["yambda", "recflow", "movielens", "taobao"])
def test_every_command_in_its_smoke_form(name, tmp_path):
    got = measured(tmp_path, "experiments.benchmarks", name, "--model", "two-tower", "aif", "--epochs", "1")
    assert list(got["models"]) == ["two-tower", "aif"]
    for model in got["models"].values():
        assert model and all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in model.values())
    published = {"yambda": ["ItemKNN", "SASRec"], "recflow": ["LCRON, two stages"]}
    assert list(got["published"]) == published.get(name, [])


def test_data_or_smoke(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["yambda"])
    assert "expected --data DIR or --smoke, one of them" in capsys.readouterr().err
