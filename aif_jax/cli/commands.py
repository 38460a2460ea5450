"""The commands: `check`, `train`, `add`, `index ...`, `export`, `verify`, `doctor`, `refresh`, `rollback`.

The docstring of a command's function is its help text.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from aif_jax import export, index
from aif_jax.cli import doctor
from aif_jax.cli import options as shared
from aif_jax.cli.options import FINE, PROBLEMS, REFUSED, Value, read_fields, read_task
from aif_jax.cli.service import add_index_follow
from aif_jax.config import Config
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.columns import Columns
from aif_jax.export.contents import open as open_model
from aif_jax.index import ItemIndex
from aif_jax.model import build
from aif_jax.presets import PRESETS
from aif_jax.readers import check, read, read_cascade
from aif_jax.refreshing import RefreshConfig, refresh
from aif_jax.registry import HEADS
from aif_jax.run import Run, fit
from aif_jax.scores import objective_names
from aif_jax.store.folders import expect_nothing, local
from aif_jax.train.settings import FitConfig

CONFIG_FIELDS = [field.name for field in dataclasses.fields(Config) if field.name not in ("schema", "blocks", "assembled")]
BUILD, EXPORT, VERIFY = ("storage", "batch_size"), ("platforms",), ("tolerance", "sha256")
TRAINING, REFRESHING = shared.fields_of(FitConfig), shared.fields_of(RefreshConfig)
ADDED = {"svd": Run.with_svd, "popularity": Run.with_popularity_correction, "calibration": Run.calibrate}
"""Additions of `add`, in this order: each is of the scores before it."""


def add_commands(commands: Any) -> None:
    """Add all commands to what `add_subparsers` returned."""
    one = shared.add_command(commands, "check", run_check)
    add_files(one)
    shared.add_checkpoint(one, use="values that its encoder lacks are problems, and its columns are the default")
    shared.add_flags(one, check, ["cap"])
    one.add_argument("--strict", action="store_true", help="exit with 1 for suspicions too, not for problems alone")
    one.add_argument("--json", action="store_true", help="print the report as JSON")
    shared.add_quiet(one)
    shared.add_columns(one)

    one = shared.add_command(commands, "train", run_train)
    add_files(one, items_required=True)
    shared.add_flags(one, read, ["unknown", "repeats"])
    one.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoints and logs")
    one.add_argument("--preset", choices=PRESETS, default="aif", help="the model (default: %(default)s)")
    text = """fields of the config in JSON (blocks: in Python), such as width=64 'head={"head":"Mlp","widths":[64,32]}': """
    text += ", ".join(CONFIG_FIELDS)
    fields = {"make": lambda words: read_fields(words, CONFIG_FIELDS), "nargs": "+", "metavar": "FIELD=VALUE"}
    one.add_argument("--set", action=Value, default={}, dest="changes", help=text, **fields)
    text = "(default: NextItem, for events of one action, or with history_actions in --columns)"
    text = f"{shared.TASK_HELP}; such as Impressions candidates=50 threshold=2 {text}"
    one.add_argument("--task", action=Value, make=read_task, nargs="+", metavar=("NAME", "FIELD=VALUE"), help=text)
    shared.add_teacher(one, label=", or with --cascade a label")
    text = "file of a ranker's log, see read_cascade; its labels are the objectives of --set, and --teacher"
    one.add_argument("--cascade", metavar="FILE", help=text)
    shared.add_flags(one, FitConfig, TRAINING)
    one.add_argument("--evaluate", action="store_true", help="evaluate the test slice too")
    shared.add_quiet(one)
    shared.add_columns(one)

    one = shared.add_command(commands, "add", run_add)
    one.add_argument("parts", nargs="+", choices=ADDED, metavar="PART", help=f"one or more of {', '.join(ADDED)}")
    one.add_argument("--run", type=Path, required=True, metavar="RUN", dest="trained", help="the --out of train")
    add_files(one, items_required=True)
    shared.add_flags(one, read, ["unknown", "repeats"])
    one.add_argument("--out", type=Path, required=True, help="folder of the new run; must not exist")
    shared.add_quiet(one)

    text = "Builds, updates and verifies item indexes on disk."
    inner = commands.add_parser("index", help=text, description=text).add_subparsers(required=True)
    one = shared.add_command(inner, "build", run_index_build)
    shared.add_checkpoint(one, required=True)
    one.add_argument("--items", required=True, help="Parquet, CSV or TSV file or folder with the columns that training read")
    shared.add_flags(one, ItemIndex.build, BUILD)
    one.add_argument("--out", type=Path, required=True, help="folder of the new index; must not exist")
    shared.add_quiet(one)
    add_index_follow(inner)
    one = shared.add_command(inner, "verify", run_index_verify)
    one.add_argument("folder")
    shared.add_quiet(one)

    one = shared.add_command(commands, "export", run_export)
    shared.add_checkpoint(one, required=True)
    one.add_argument("--index", type=Path, help="folder of an index of the same model, to export too")
    one.add_argument("--out", type=Path, required=True, help="folder of the export; must not exist")
    shared.add_flags(one, export.save, EXPORT)

    one = shared.add_command(commands, "verify", run_verify)
    one.add_argument("folder", type=Path)
    shared.add_flags(one, export.verify, VERIFY)

    shared.add_command(commands, "doctor", run_doctor)


def add_files(parser: argparse.ArgumentParser, *, items_required: bool = False) -> None:
    """Add the options that name files."""
    parser.add_argument("--events", required=True, help="file or folder: one row for each interaction")
    parser.add_argument("--items", required=items_required, help="file or folder: one row for each item")
    parser.add_argument("--users", help="file or folder: one row for each user")


def read_files(options: argparse.Namespace, **given: Any) -> Dataset:
    """Return the data of the files of `add_files`."""
    given |= shared.flags_given(options, ["unknown", "repeats"])
    return read(options.events, items=options.items, users=options.users, **given)


def run_check(options: argparse.Namespace) -> tuple[int, Any]:
    """List every problem of event, item and user files (Parquet, CSV or TSV) with row numbers, suspicions and a profile."""
    encoder = None if options.checkpoint is None else open_model(options.checkpoint).need_encoder(str(options.checkpoint))
    report = check(
        options.events, items=options.items, users=options.users, columns=options.columns, encoder=encoder,
        **shared.flags_given(options, ["cap"]),
    )  # fmt: skip
    code = FINE if report.clean and not (options.strict and report.suspicions) else PROBLEMS
    return code, dataclasses.asdict(report) if options.json else str(report)


def run_train(options: argparse.Namespace) -> tuple[int, Any]:
    """Train a model on files. Resumable: run the same command again."""
    config = FitConfig(**shared.flags_given(options, TRAINING))
    data = read_files(options, columns=options.columns or Columns())
    teacher, changes = shared.read_teacher(options, labels=options.cascade is not None), options.changes
    if options.cascade is not None:
        ranker = () if teacher is None or not isinstance(teacher.ranker, str) else (teacher.ranker,)
        labels = tuple(dict.fromkeys((*objective_names(changes.get("objectives", ())), *ranker)))
        data = read_cascade(options.cascade, data, labels=labels)
    with shared.as_usage("--set"):
        changes |= {"head": HEADS.from_json(changes["head"])} if "head" in changes else {}
        model = build(PRESETS[options.preset](data.schema, **changes))
    run = fit(model, data, config, out=options.out, task=options.task, teacher=teacher, progress=not options.quiet)
    figures: dict[str, Any] = {"validation": run.metrics}
    if options.evaluate:
        test = run.evaluate(data)
        intervals = {name: [one.low, one.high] for name, one in test.intervals().items()}  # of 95 %
        figures |= {"test": test.figures(), "intervals": {"test": intervals}}
    return FINE, figures


def run_add(options: argparse.Namespace) -> tuple[int, Any]:
    """Add to a trained model what is fitted after training, on the files of its training, and write the new run.

    svd: scores of items that occur in the same histories (`Run.with_svd`). popularity: the popularity correction, for
    candidates from the whole catalogue (`Run.with_popularity_correction`). calibration: probabilities, on the validation
    slice (`Run.calibrate`).
    """
    expect_nothing(local(options.out, "--out"))
    run = Run.load(options.trained)
    data = read_files(options, encoder=run.trained.need_encoder(str(options.trained)))
    parts = [name for name in ADDED if name in options.parts]
    for part in parts:
        run = ADDED[part](run, data)
    run.save(options.out)
    return FINE, {"out": str(options.out), "added": parts, "version": run.version}


def run_index_build(options: argparse.Namespace) -> tuple[int, Any]:
    """Run the item function of a checkpoint over a raw items file."""
    expect_nothing(local(options.out, "--out"))
    built = ItemIndex.build(open_model(options.checkpoint), options.items, **shared.flags_given(options, BUILD))
    built.save(options.out)
    figures = {"items": len(built), "device_bytes": round(len(built) * built.bytes_per_row), "version": built.version}
    return FINE, {"out": str(options.out)} | figures


def run_index_verify(options: argparse.Namespace) -> tuple[int, Any]:
    """Read every array of an index, compare it with its checksum, and print the record of the index."""
    manifest = index.verify(options.folder)
    return FINE, vars(manifest) | {"config": manifest.config.to_json()}


def run_export(options: argparse.Namespace) -> tuple[int, Any]:
    """Write a model as one folder that runs without the package's model code."""
    expect_nothing(local(options.out, "--out"))
    trained = open_model(options.checkpoint)
    loaded = None if options.index is None else ItemIndex.load(options.index, trained)
    digest = export.save(options.out, trained, loaded, **shared.flags_given(options, EXPORT))
    return FINE, {"sha256": digest, "version": trained.version}


def run_verify(options: argparse.Namespace) -> tuple[int, Any]:
    """Check the checksums of an exported folder and compute its stored example again."""
    if not options.folder.is_dir():
        raise FileNotFoundError(f"{options.folder}: expected an exported folder, got none; write one: aif-jax export")
    return FINE, export.verify(options.folder, **shared.flags_given(options, VERIFY))


def run_doctor(_: argparse.Namespace) -> tuple[int, Any]:
    """Report installed versions and extras, and run a smoke test."""
    well, report = doctor.examine()
    return FINE if well else PROBLEMS, report


def add_refresh_commands(commands: Any) -> None:
    """Add the commands of the next model to what `add_subparsers` returned."""
    one = shared.add_command(commands, "refresh", run_refresh)
    text = "served model: URL or folder of a snapshot store of exports, or the folder of a run, checkpoint or export"
    one.add_argument("--current", metavar="URL", help=text + " (default: --out)")
    add_files(one, items_required=True)
    one.add_argument("--out", required=True, metavar="URL", help="snapshot store that `aif-jax serve URL --mirror DIR` follows")
    text = "local folder of the finished steps; required if --out is remote (default: OUT.work)"
    one.add_argument("--work", type=Path, metavar="DIR", help=text)
    text = f"{shared.TASK_HELP} (default: that of the served model)"
    one.add_argument("--task", action=Value, make=read_task, nargs="+", metavar=("NAME", "FIELD=VALUE"), help=text)
    shared.add_teacher(one)
    shared.add_flags(one, RefreshConfig, REFRESHING)
    shared.add_quiet(one)

    one = shared.add_command(commands, "rollback", run_rollback)
    one.add_argument("--out", required=True, metavar="URL", help="snapshot store of exports, --out of refresh")


def run_refresh(options: argparse.Namespace) -> tuple[int, Any]:
    """Train the served model on new events, judge it against the served one, and publish it if the gate passes it.

    Resumable: run the same command again. Exit code 0: published, or nothing new; 3: the gate refused the model, which stays
    out, and the report says why; 1 and 2 as for every command.
    """
    config = RefreshConfig(**shared.flags_given(options, REFRESHING))
    result = refresh(
        options.current or options.out, options.events, config, items=options.items, users=options.users, out=options.out,
        work=options.work, task=options.task, teacher=shared.read_teacher(options), progress=not options.quiet,
    )  # fmt: skip
    return REFUSED if result.status == "refused" else FINE, {"status": result.status, "name": result.name} | result.report


def run_rollback(options: argparse.Namespace) -> tuple[int, Any]:
    """Make the version before the current one current again; services that follow the store swap. Prints its name."""
    with shared.open_store(options.out) as store:
        return FINE, store.rollback()
