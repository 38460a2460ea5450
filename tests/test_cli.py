"""The command line: every command on real files, its exit codes, its help."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aif_jax as aif
from aif_jax import checkpoint, cli, export
from aif_jax.cli import doctor
from aif_jax.registry import BLOCKS
from tests import demo
from tests.refusals import refused

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = aif.Columns(category="kind", item_floats=("price",), user_attributes=("city",))
FLAGS = ["--columns", json.dumps(COLUMNS.to_json())]


def items(ids, *, kinds=3):
    ids = np.asarray(ids)
    return pa.table({"item": ids, "kind": [f"kind {number % kinds}" for number in ids], "price": ids / 7})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    ids = np.arange(1000, 1090)
    time = np.sort(rng.integers(1_600_000_000, 1_600_900_000, 600))
    events = {"user": rng.integers(1, 30, 600), "item": rng.choice(ids, 600), "time": time}
    pq.write_table(pa.table(events), folder / "events.parquet")
    (folder / "items").mkdir()
    pq.write_table(items(ids[:40]), folder / "items" / "a.parquet")
    pq.write_table(items(ids[40:]), folder / "items" / "b.parquet")
    (folder / "users.csv").write_text("user,city\n" + "".join(f"{user},city {user % 4}\n" for user in range(1, 30)))
    (folder / "columns.json").write_text(json.dumps(COLUMNS.to_json()))
    data = aif.read(folder / "events.parquet", items=folder / "items", users=folder / "users.csv", columns=COLUMNS)
    model = aif.build(aif.presets.two_tower(data.schema, width=8, short_length=4, long_length=8, towers=(8,), sequence=False))
    params = demo.init(model, items=data.catalogue)
    checkpoint.save(folder / "model", aif.Trained(model, params, data.encoder))
    checkpoint.save(folder / "bare", aif.Trained(model, params))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return aif.open(folder / "model")


class Command:
    """The command line, in this process."""

    def __init__(self, capsys):
        self._said = capsys.readouterr

    def __call__(self, *words):
        """(exit code, stdout, stderr)."""
        return cli.main([str(word) for word in words]), *self._said()

    def told(self, *words):
        """What a command that succeeds writes to stdout."""
        code, out, err = self(*words)
        assert code == 0, err
        return out

    def refuses(self, code, message, *words):
        """A command ends with a code, and with the pattern of a message in stderr."""
        got, _, err = self(*words)
        assert got == code and re.search(message, err, re.S), (got, err)


@pytest.fixture
def run(capsys):
    return Command(capsys)


def files(folder):
    return ["--events", folder / "events.parquet", "--items", folder / "items", "--users", folder / "users.csv"]


def test_index_build_and_verify(folder, trained, tmp_path, run):
    build = ["index", "build", "--checkpoint", folder / "model", "--items", folder / "items", "--batch-size", 64, "--quiet"]
    figures = json.loads(run.told(*build, "--out", tmp_path / "one"))
    built = aif.ItemIndex.build(trained, folder / "items", batch_size=64, progress=False)
    assert demo.same(aif.ItemIndex.load(tmp_path / "one", trained).stored(), built.stored())
    manifest = json.loads(run.told("index", "verify", tmp_path / "one"))
    assert (manifest["items"], manifest["version"]) == (figures["items"], figures["version"]) == (90, built.version)
    assert manifest["positions"] == {}
    file = tmp_path / "one" / "arrays.safetensors"
    assert file.stat().st_size > figures["device_bytes"] + 90 * 8  # ids of 64 bits
    file.write_bytes(file.read_bytes()[:-3])
    run.refuses(1, "arrays.safetensors: expected", "index", "verify", tmp_path / "one")


def test_modules_with_blocks_of_your_own_are_imported_first(tmp_path, monkeypatch, run):
    (tmp_path / "own_parts.py").write_text("from aif_jax.blocks import Block, block\n\n@block\nclass OwnPart(Block): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("--import", "own_parts", "index", "verify", tmp_path / "none")[0] == 2 and "OwnPart" in BLOCKS
    for name, message in ("no_parts", "No module named 'no_parts'; set PYTHON"), ("own_parts.py", "a module name such as mine"):
        run.refuses(2, message, "--import", name, "index", "verify", "none")


def test_flags_are_the_fields_of_settings_with_their_defaults(run):
    said = " ".join(run.told("serve", "--help").replace("│", " ").split())
    for field in dataclasses.fields(aif.ServingConfig):
        assert (f"--serving.{field.name.replace('_', '-')} " in said) == (field.name != "orders"), field.name
    assert "--max-bytes INT bytes of one call. [default: 16777216]" in said and "--token " not in said
    for words, fields in (
        ("--sparse --buckets 2 4 --keep-best none --k none", {"sparse": (), "buckets": (2, 4), "keep_best": None, "k": None}),
        ("--since 2022-05-06 --without 5 2022-05-07", {"since": "2022-05-06", "without": (5, "2022-05-07")}),
    ):
        command, given, _ = cli.app.parse_args(f"train --events e --items i --out o {words}")
        assert given.arguments["config"] == aif.FitConfig(**fields)
    assert set(typing.get_args(typing.get_type_hints(command)["preset"])) == set(aif.presets.PRESETS)


def test_exit_codes_of_the_index(folder, trained, tmp_path, run):
    run.refuses(2, "expected a snapshot, found nothing", "index", "verify", tmp_path / "nothing")
    (tmp_path / "there").mkdir()
    build = ["index", "build", "--checkpoint", folder / "model", "--quiet", "--out"]
    run.refuses(2, "expected a new folder", *build, tmp_path / "there", "--items", folder / "items")
    run.refuses(2, "no such file", *build, tmp_path / "a", "--items", tmp_path / "none.csv")
    pq.write_table(items([1000, 1000]), tmp_path / "twice.parquet")
    run.refuses(1, "1000 comes twice", *build, tmp_path / "a", "--items", tmp_path / "twice.parquet")
    pq.write_table(items([1000]).drop_columns(["kind"]), tmp_path / "short.parquet")
    run.refuses(1, "'kind': missing column", *build, tmp_path / "a", "--items", tmp_path / "short.parquet")
    bare = *build[:3], folder / "bare", *build[4:], tmp_path / "a", "--items", folder / "items"
    run.refuses(2, "expected a model with an encoder", *bare)
    assert run("index", "build", "--storage", "float8")[0] == 2
    aif.ItemIndex.build(trained, folder / "items", batch_size=64, progress=False).save(tmp_path / "index")
    other = {**trained.params, "item": jax.tree.map(lambda x: x + 1, trained.params["item"])}
    checkpoint.save(tmp_path / "other", trained.replace(params=other))
    words = ["export", "--index", tmp_path / "index", "--out", tmp_path / "b", "--checkpoint", tmp_path / "other"]
    run.refuses(1, "expected version", *words)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_export_verify(folder, trained, tmp_path, run):
    index = aif.ItemIndex.build(trained, folder / "items", progress=False)
    index.save(tmp_path / "index")
    words = ["export", "--checkpoint", folder / "model", "--index", tmp_path / "index", "--platforms", "cpu"]
    written = json.loads(run.told(*words, "--out", tmp_path / "exported"))
    assert written["version"] == index.version
    loaded = export.load(tmp_path / "exported", sha256=written["sha256"])
    assert loaded.version == index.version and loaded.index is not None
    assert run(*words, "--out", tmp_path / "exported")[0] == 2

    assert json.loads(run.told("verify", tmp_path / "exported", "--sha256", written["sha256"]))["version"] == index.version
    again = ["export", "--checkpoint", tmp_path / "exported", *words[3:], "--out", tmp_path / "again"]
    assert run("verify", tmp_path / "again", "--sha256", json.loads(run.told(*again))["sha256"])[0] == 0

    params_file = tmp_path / "exported" / "params.safetensors"
    params_file.write_bytes(params_file.read_bytes()[:-1] + b"\x01")
    run.refuses(1, "params.safetensors", "verify", tmp_path / "exported")
    assert run("verify", tmp_path / "nothing")[0] == 2


def test_check(folder, tmp_path, run):
    out = run.told("check", *files(folder), "--columns", folder / "columns.json")
    assert "0 problems" in out and "profile: " in out
    assert run("check", *files(folder), "--columns", json.dumps(COLUMNS.to_json() | {"item_statistics": [3600, 86400]}))[0] == 0
    assert json.loads(run.told("check", *files(folder), *FLAGS, "--json"))["problems"] == []
    (tmp_path / "events.csv").write_text("user,item,time\n1,1000,1600000000\n1,1000,\n1,5,1600000001\n")
    code, out, _ = run("check", "--events", tmp_path / "events.csv", "--checkpoint", folder / "model", "--cap", 1)
    assert code == 1 and "null: expected a time" in out and "unknown item" in out and "2 problems" in out
    (tmp_path / "events.csv").write_text("user,item,time\n" + "1,1000,1600000000\n" * 2)
    words = "check", "--events", tmp_path / "events.csv", "--checkpoint", folder / "model"
    out = run.told(*words)
    assert "suspicion: " in out and "duplicate event" in out and "0 problems, 1 suspicion " in out
    code, out, _ = run(*words, "--strict", "--json")
    assert code == 1 and json.loads(out)["suspicions"][0]["kind"] == "duplicate event" and json.loads(out)["problems"] == []


def test_settings_that_make_no_sense_and_no_command_are_wrong_usage(folder, tmp_path, run):
    run.refuses(2, "none.json", "check", *files(folder), "--columns", tmp_path / "none.json")
    for text, words in (
        ("{", "columns.json"),
        ('{"hue": 1}', "hue"),
        ('{"time_unit": "h"}', "Columns.time_unit"),
        ('{"itm": "sku"}', "got 'itm'; did you mean 'item'?"),
        ("[]", "columns.json"),
    ):
        (tmp_path / "columns.json").write_text(text)
        run.refuses(2, words, "check", *files(folder), "--columns", tmp_path / "columns.json")
    for short in ("--orde=none", "--ca=1"):  # a flag is its whole name
        assert run("check", *files(folder), short)[0] == 2
    message = "colums.json: expected a JSON file of settings, got no such file"
    run.refuses(2, message, "check", "--events", folder / "events.parquet", "--columns", tmp_path / "colums.json")
    run.refuses(2, "--columns: Columns.bag_length", "check", *files(folder), "--columns", '{"bag_length": 1}')
    run.refuses(2, "no such file", "check", "--events", tmp_path / "none.parquet")
    run.refuses(2, "doctor", "fly")
    assert "doctor" in run.told() and "follow" in run.told("index")


SMALL = ["--preset", "two_tower", "--set", "width=8", "short_length=4", "long_length=8", "towers=[8]", "sequence=false"]
START = 1_600_041_600  # 2020-09-14


def test_from_files_to_an_exported_folder(folder, tmp_path, run):
    words = ["train", *files(folder), "--columns", folder / "columns.json", "--out", tmp_path / "run", *SMALL]
    words += ["--epochs", 2, "--batch-size", 64, "--requests", 50, "--buckets", 2, 4, "--id-dropout", 0.1]
    words += ["--since", "2020-09-14", "--validation", START + 5 * 86_400, "--test", "2020-09-20T12:00"]
    code, out, err = run(*words, "--evaluate")
    figures = json.loads(out)
    assert code == 0, err
    settings, time = aif.Run.load(tmp_path / "run").settings, pq.read_table(folder / "events.parquet")["time"].to_numpy()
    assert settings.buckets == (2, 4) and settings.id_dropout == 0.1
    assert (settings.since, settings.first_test) == (START, START + 6 * 86_400 + 43_200)
    tested = (time >= settings.first_test).sum()
    held = (time >= START + 5 * 86_400).sum() - tested
    assert re.search(rf"to train on, {held} for validation .* from 2020-09-19T00:00:00, {tested} for the test", err)
    assert set(figures) == {"validation", "test", "intervals"} and 0 < figures["validation"]["gauc"] < 1
    low, high = figures["intervals"]["test"]["gauc"]
    assert low <= figures["test"]["gauc"] <= high and figures["intervals"]["test"].keys() == figures["test"].keys()
    assert json.loads(run.told(*words, "--quiet")) == {"validation": figures["validation"]}
    words = ["index", "build", "--checkpoint", tmp_path / "run", "--items", folder / "items", "--out", tmp_path / "index"]
    assert json.loads(run.told(*words, "--quiet"))["items"] == 90
    words = ["export", "--checkpoint", tmp_path / "run", "--index", tmp_path / "index", "--out", tmp_path / "exported"]
    assert json.loads(run.told(*words, "--platforms", "cpu"))["version"] == aif.open(tmp_path / "run").version
    other = ["train", *files(folder), *FLAGS, *SMALL, "--quiet", "--out"]
    run.refuses(1, "expected a run with these settings.*fit.epochs", *other, tmp_path / "run", "--epochs", 3)
    message = "test: expected an ISO date such as '2022-05-06', a datetime, or an integer in 's', got"
    run.refuses(2, message, *other, tmp_path / "other", "--test", "2022-05-32")


def test_a_teacher_is_a_model_or_a_label_of_a_rankers_log(folder, trained, tmp_path, run):
    events = pq.read_table(folder / "events.parquet")
    lines = {name: events[name].to_numpy() for name in ("user", "item", "time")}
    lines |= {"stage": ["exposed"] * len(events), "house": np.linspace(-1, 1, len(events)), "click": lines["item"] % 2}
    pq.write_table(pa.table(lines), tmp_path / "log.parquet")
    words = ["train", *files(folder), *FLAGS, *SMALL, "--batch-size", 64, "--requests", 20, "--quiet", "--out"]
    run.told(*words, tmp_path / "taught", "--teacher", folder / "model")
    assert aif.Run.load(tmp_path / "taught").settings.teacher == trained.version
    run.told(*words, tmp_path / "logged", "--teacher", "house", "--cascade", tmp_path / "log.parquet")
    assert aif.Run.load(tmp_path / "logged").settings.teacher == "house, 40 candidates"
    log, counts = ["--cascade", tmp_path / "log.parquet"], ["exposed=1", "ranked=1", "pre_ranked=0", "retrieved=0"]
    run.told(*words, tmp_path / "clicks", *log, "--set", 'objectives=["click"]', "--task", "Cascaded", *counts)
    added = ["--run", tmp_path / "clicks", *files(folder), "--quiet", "--out"]
    run.told("add", "calibration", *added, tmp_path / "calibrated", *log)
    assert "calibration" in aif.open(tmp_path / "calibrated").params["fitted"]
    message = "--teacher: expected the folder of a model, or with --cascade a label of it, got 'house'"
    run.refuses(2, message, *words, tmp_path / "other", "--teacher", "house")


def test_a_teacher_scores_the_retrieved_candidates_of_a_file(folder, tmp_path, run):
    events = pq.read_table(folder / "events.parquet")
    lines = {name: np.repeat(events[name].to_numpy(), 12) for name in ("user", "time")}
    lines["item"] = np.random.default_rng(0).permuted(np.tile(np.arange(1000, 1095), (600, 1)), axis=1)[:, :12].ravel()
    pq.write_table(pa.table(lines), tmp_path / "found.parquet")  # some items are in no file
    words = ["train", *files(folder), *FLAGS, *SMALL, "--batch-size", 64, "--requests", 20, "--out"]
    teacher = ["--candidates", tmp_path / "found.parquet"]
    teacher += ["--teacher", folder / "model", "--teacher-weight", 4, "--teacher-count", 8]
    code, out, err = run(*words, tmp_path / "run", *teacher, "--keep-best", "ranker_recall")
    assert code == 0, err
    assert 0 < json.loads(out)["validation"]["ranker_recall"] <= 1 and "the ranker's top 10 among 3 kept" in err
    settings = aif.Run.load(tmp_path / "run").settings
    assert ", 8 candidates of " in settings.teacher and settings.keep_best == "ranker_recall"
    assert settings.loss.endswith("4 * distill_listwise.of('teacher')")
    message = "--candidates: expected a ranker of them, got none; give --teacher"
    run.refuses(2, message, *words, tmp_path / "other", "--candidates", tmp_path / "found.parquet")
    message = "'ranker_recall': none of its .* samples has scores of a teacher"
    run.refuses(1, message, *words, tmp_path / "other", "--keep-best", "ranker_recall")
    pq.write_table(pa.table(lines | {"time": lines["time"] + 10**7}), tmp_path / "found.parquet")
    message = "expected a known item, at the user and time of an event, got none in 7,200 lines"
    run.refuses(1, message, *words, tmp_path / "other", *teacher)


def test_what_is_fitted_after_training_is_added_from_the_command_line(folder, tmp_path, run):
    rng = np.random.default_rng(0)
    users = rng.integers(1, 30, 900)
    events = {"user": users, "item": 1000 + 3 * rng.integers(0, 30, 900) + users % 3, "time": 1_600_000_000 + np.arange(900)}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    given = ["--events", tmp_path / "events.parquet", *files(folder)[2:]]
    words = [*given, *FLAGS, "--out", tmp_path / "run", *SMALL, "--batch-size", 64, "--epochs", 3]
    words += ["--learning-rate", 0.03, "--no-repeats", "--quiet"]
    assert run("train", *words)[0] == 0
    before = aif.open(tmp_path / "run").version
    add = ["--run", tmp_path / "run", *given, "--quiet", "--out"]
    told = json.loads(run.told("add", "calibration", "svd", "popularity", *add, tmp_path / "served"))
    assert told["added"] == ["svd", "popularity", "calibration"]

    trained = aif.Run.load(tmp_path / "run")
    data = aif.read(given[1], items=folder / "items", users=folder / "users.csv", encoder=trained.encoder, repeats=False)
    bare = dataclasses.replace(trained, folder=None)
    wanted = bare.with_svd(data).with_popularity_correction(data).calibrate(data, progress=False)
    served = aif.open(tmp_path / "served")
    assert served.config == wanted.config and served.encoder.version == trained.encoder.version
    jax.tree.map(np.testing.assert_array_equal, served.params, wanted.params)
    words = ["index", "build", "--checkpoint", tmp_path / "served", "--items", folder / "items", "--out", tmp_path / "index"]
    assert run(*words, "--quiet")[0] == 0

    assert "expected a new folder" in run("add", "svd", *add, tmp_path / "served")[2]
    assert run("add", "svd", *add, tmp_path / "other")[0] == 0
    assert [block.name for block in aif.open(tmp_path / "other").config.blocks] == ["dot_product", "pure_svd"]
    told = json.loads(run.told("add", "calibration", *add, tmp_path / "last"))
    assert told == {"out": str(tmp_path / "last"), "added": ["calibration"], "version": aif.open(tmp_path / "last").version}
    assert aif.open(tmp_path / "run").version == before != told["version"]
    for parts in (["cream"], []):
        assert run("add", *parts, *add, tmp_path / "another")[0] == 2


def test_events_of_unknown_items_are_skipped_where_that_is_said(folder, tmp_path, run, caplog):
    events = pq.read_table(folder / "events.parquet").to_pydict()
    events["item"][0] = 99  # the items file lacks it
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    given = ["--events", tmp_path / "events.parquet", *files(folder)[2:], "--quiet"]
    train = ["train", *given, *FLAGS, *SMALL, "--batch-size", 64, "--out", tmp_path / "run"]
    for words in (train, ["add", "svd", *given, "--run", tmp_path / "run", "--out", tmp_path / "served"]):
        run.refuses(1, "got 99", *words)
        caplog.clear()
        run.told(*words, "--unknown", "skip")
        assert "1 values left out or left unknown" in caplog.text


def test_wrong_words_of_train(folder, tmp_path, run):
    words = ["train", *files(folder), *FLAGS, "--out", tmp_path / "run"]
    for more, message in (
        (["--set", "width=0"], "--set: Config.width: expected at least 1, got 0"),
        (["--set", "hue=1"], "--set: expected one of the fields width, .* objectives, got 'hue'"),
        (["--set", "width"], "--set: expected FIELD=VALUE with the value in JSON, got 'width'"),
        (["--task", "Sing"], "--task: name: expected one of NextItem, Impressions, Cascaded, got 'Sing'"),
        (["--task", "Impressions", "candidates=4"], "--task: .*threshold"),
        (["--task", "NextItem", "negatives=0"], "--task: NextItem.negatives: expected at least 1, got 0"),
    ):
        run.refuses(2, message, *words, *more)
    assert not (tmp_path / "run").exists()


COMMANDS = [
    [], ["check"], ["train"], ["add"], ["index"], ["index", "build"], ["index", "verify"], ["snapshots"], ["export"],
    ["verify"], ["serve"], ["doctor"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command, run):
    said = run.told(*command, "--help")
    assert said.startswith(" ".join(["Usage: aif-jax", *command]))
    if not command:
        assert "Exit codes" in said and all(word[0] in said for word in COMMANDS if word)


def test_a_broken_pipe_to_somewhere_else_is_an_error(monkeypatch, run):
    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "keep_compiled", broken)
    run.refuses(1, r"^error: \[Errno 32\] Broken pipe\n$", "index", "verify", "somewhere")


@pytest.mark.lane("standing")
def test_a_process_whose_output_nobody_reads_ends_in_silence(folder, trained, tmp_path):
    aif.ItemIndex.build(trained, folder / "items", progress=False).save(tmp_path / "one")
    module, given = [sys.executable, "-m", "aif_jax"], dict(stderr=subprocess.PIPE, cwd=ROOT, timeout=120)
    verify = ["index", "verify", str(tmp_path / "one")]
    for words, code in ((verify, 141), (["--help"], 1)):  # Rich ends the process
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([*module, *words], stdout=writer, **given)
        os.close(writer)
        assert (done.returncode in (code, 141), done.stderr) == (True, b"")
    with open("/dev/full", "wb") as full:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run([*module, *verify], stdout=full, env=env, **given)
    assert (done.returncode, done.stderr) == (1, b"error: stdout: [Errno 28] No space left on device\n")


def test_the_command_is_installed_and_runs_as_a_module(python):
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {"aif-jax": "aif_jax.cli:main"}
    said = python("import runpy, sys; sys.argv = ['aif_jax', '--help']; runpy.run_module('aif_jax', run_name='__main__')")
    assert said.startswith("Usage: aif-jax")


def test_everything_works_here(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "\nsmoke test: a model was built, saved and loaded on " in said and "\nall well. Next:\n" in said
    assert f"jax {jax.__version__}" in re.search("^needed: .*", said, re.M)[0] and re.search("^data: .*pyarrow ", said, re.M)


def test_a_failed_check_is_named_and_gives_exit_status_one(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "smoke_test", lambda: 1 / 0)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "smoke test: ZeroDivisionError: division by zero" in said
    verdict = said[said.index("NOT WELL") :].splitlines()
    assert verdict[0] == "NOT WELL. Reinstall, then run this again:"
    assert verdict[1].startswith("  python -m pip install") and verdict[2] == "  aif-jax doctor"


def test_what_is_missing_comes_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "smoke_test", lambda: "fine")
    needs = ["jax>=0.10", "no-such[x]>=1; extra == 'export'", 'no_other; (sys_platform != "x") and extra == "export"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert 'export:  (missing no-such, no_other: pip install "aif_jax[export]")' in said
    assert f"needed: jax {jax.__version__}\n" in said and "smoke test: fine\nall well. Next:\n" in said


def test_a_checkpoint_that_comes_back_different_fails(monkeypatch):
    real = checkpoint.load

    def others(*given, **options):
        params = jax.tree.map(lambda x: x + 1, real(*given, **options).params)
        return checkpoint.Checkpoint(params=params, config=None, version="")

    monkeypatch.setattr(checkpoint, "load", others)
    refused(AssertionError, "Arrays are not equal", doctor.smoke_test)


def test_a_platform_that_is_not_here_is_reported_and_fails(python):
    code = "import sys; from aif_jax.cli import main; sys.exit(main(['doctor']))"
    said = python(code, expect=1, env={"JAX_PLATFORMS": "no_such_platform"})
    assert "Unable to initialize backend 'no_such_platform'" in said
    assert "NOT WELL" in said
