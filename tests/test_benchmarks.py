"""Public benchmarks: every command in its smoke form."""

import pytest

from experiments import benchmarks
from tests.refusals import refused
from tests.test_scripts import measured


@pytest.mark.parametrize("name", ["recflow", "kuairand"])
def test_every_command_in_its_smoke_form(name, tmp_path):
    got = measured(tmp_path, "experiments.benchmarks", name, "--model", "two-tower", "aif", "--epochs", "1")
    assert list(got["models"]) == ["two-tower", "aif"]
    for model in got["models"].values():
        assert model and all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in model.values())
    assert list(got["published"]) == (["LCRON, two stages"] if name == "recflow" else [])


def test_data_or_smoke(capsys):
    refused(SystemExit, "", benchmarks.main, ["taobao"])
    assert "expected --data DIR or --smoke, one of them" in capsys.readouterr().err
