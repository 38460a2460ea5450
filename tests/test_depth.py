"""A second depth for the best tenth of the candidates: places by hand, and the protocol of `question`."""

import json

import numpy as np
import pytest

from aif_jax.metrics import ByUser
from experiments.study import datasets, depth, question, records

pytestmark = pytest.mark.usefixtures("light_compilation")


def test_a_tenth_exchanges_its_places_by_hand():
    first = np.arange(30, 0, -1.0)
    second, where = -first, np.ones(30, bool)
    where[1] = False
    rng = np.random.default_rng(0)
    best = depth.rescored(first, second, where, depth.BEST, rng)
    assert best[:4].tolist() == [27, 29, 28, 30]  # 3 of 29, turned around; what is left out stays
    assert (best[4:] == first[4:]).all()
    second[[0, 2, 3]] = 0.0, 0.0, 1e6  # standardised -0.71, -0.71, 1.41; and the first model's 1.34, -0.27, -1.07
    assert depth.rescored(first, second, where, depth.MEAN, rng)[[0, 2, 3]].tolist() == [30, 27, 28]  # 0.63, -0.98, 0.34
    assert depth.rescored(first, second, where, depth.BEST, rng)[3] == 30
    drawn = depth.rescored(first, -first, where, depth.RANDOM, rng)
    moved = np.flatnonzero(drawn != first)
    assert len(moved) == 2 and 1 not in moved  # of three, the middle one keeps its place
    assert sorted(drawn) == sorted(first)


def test_smoke(tmp_path, capsys):
    """Models alone get the figures of `question`; rescoring the best tenth keeps HR@k for k from a tenth on; times."""
    results, work, kept, data = tmp_path / "results", tmp_path / "work", tmp_path / "kept", datasets.load("smoke")
    arguments = ["--dataset", "smoke", "--seed", "0", "--work", str(work), "--kept", str(kept), "--results", str(results)]
    with pytest.raises(FileNotFoundError, match="expected a model in .*, a record in .*; run question's --plan test"):
        depth.main(arguments)
    for name in depth.MODELS:
        trial = question.Trial(dataset="smoke", model=name, split="test", epochs=question.EPOCHS)
        (part,) = question.parts_of(trial, data)
        few = part._replace(seen=part.seen[-256:])
        model, params, _ = question.trained(trial, few, data, work=work, progress=False)
        one = ByUser(np.arange(1), np.ones(1), np.ones(1))
        figures = {"gauc": one} | {f"hr100@{offset:g}": one for offset in question.UNTRAINED}
        if name == question.AIF:
            figures = question.evaluate(trial, part, model, params, data, progress=False)
        question.keep(kept, trial, figures, met_items=0)
    depth.main(arguments)
    told = capsys.readouterr().out
    (record,) = records.read(results).values()
    ways, (mine,) = record["ways"], [one for one in records.read(kept).values() if one["model"] == question.AIF]
    offset = question.chosen(records.read(kept), mine)
    for key, name in (("gauc", "gauc"), ("hr10", f"hr10@{offset:g}"), ("hr100", f"hr100@{offset:g}")):
        assert ways[question.AIF]["figures"][key][0] == pytest.approx(mine["figures"][name], abs=1e-4)
    assert len(ways) == 9 and told.count(f"against {question.AIF}: gauc") == 8
    for first, second in depth.CASCADES:
        for kind in (depth.BEST, depth.MEAN):
            way = ways[f"{first}, then {second} on {kind}"]
            assert way["figures"]["hr100"] == ways[first]["figures"]["hr100"]  # 100 of 200 items hold the tenth
            assert way["differences"][first]["hr100"] == [0, 0, 0]
    depth.main([*arguments, "--times", "--rounds", "2"])
    times = json.loads((results / "times.json").read_text())
    assert all(one["score"] > 0 for one in times["ways"].values()) and f"{question.BASE}, then {question.AIF}" in times["ways"]
