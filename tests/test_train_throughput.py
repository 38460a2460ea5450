import json
import shutil
from pathlib import Path

import pytest

from tests.light import flags

pytestmark = pytest.mark.usefixtures("light_compilation")
KEYS = {
    "step_ms_by_table_rows", "step_ratio_1e7_over_1e4", "examples_per_s", "torch_examples_per_s", "ratio_over_torch",
    "dense_step_ms_1e6", "sparse_step_ms_1e6", "input_share",
}  # fmt: skip


def test_smoke_writes_every_figure(tmp_path):
    pytest.importorskip("torch")  # extra "benchmarks"
    from experiments import train_throughput

    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    train_throughput.main(["--smoke", "--json", str(figures), "--plot", str(plot)])
    read = json.loads(figures.read_text())
    assert read.keys() >= KEYS
    times = read["step_ms_by_table_rows"]
    assert read["step_ratio_1e7_over_1e4"] == pytest.approx(list(times.values())[-1] / list(times.values())[0])
    assert read["ratio_over_torch"] == pytest.approx(read["examples_per_s"] / read["torch_examples_per_s"])
    assert 0 <= read["input_share"] <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_step_of_another_checkout(tmp_path, capfd, monkeypatch):
    from experiments import train_throughput

    monkeypatch.setenv("XLA_FLAGS", flags())

    root = Path(train_throughput.__file__).resolve().parents[1]
    (tmp_path / "before").mkdir()
    shutil.copytree(root / "aif_jax", tmp_path / "before" / "aif_jax", ignore=shutil.ignore_patterns("__pycache__"))
    figures = tmp_path / "figures.json"
    arguments = ["--smoke", "--only-before", "--json", str(figures), "--before"]
    train_throughput.main([*arguments, str(tmp_path / "before")])
    read = json.loads(figures.read_text())
    assert read["step_ratio_before"] == pytest.approx(read["step_ms_before"] / read["step_ms_now"])
    for wrong, message in ((tmp_path, "expected a checkout with aif_jax in it"), (None, "expected --before DIR too")):
        with pytest.raises(SystemExit):
            train_throughput.main(["--only-before", *([] if wrong is None else ["--before", str(wrong)])])
        assert message in capfd.readouterr().err
