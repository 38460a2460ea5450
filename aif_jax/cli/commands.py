"""The commands: `check`, `train`, `add`, `index ...`, `export`, `verify`, `doctor`, `refresh`, `rollback`.

The docstring of a command's function is its help text.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from aif_jax import export, index
from aif_jax.cli import doctor
from aif_jax.cli import options as shared
from aif_jax.cli.options import FINE, PROBLEMS, REFUSED, UsageError
from aif_jax.cli.service import add_index_follow
from aif_jax.config import Config
from aif_jax.encoding.columns import Columns
from aif_jax.export.contents import open as open_model
from aif_jax.index import ItemIndex
from aif_jax.model import build
from aif_jax.presets import PRESETS
from aif_jax.readers import check, load_columns, read, read_cascade, read_items
from aif_jax.readers.tables import CAP
from aif_jax.refreshing import RefreshConfig, refresh
from aif_jax.registry import HEADS
from aif_jax.run import Run, fit
from aif_jax.scores import objective_names
from aif_jax.store.folders import expect_nothing, local
from aif_jax.train.evaluate import Evaluation
from aif_jax.train.settings import FitConfig

CONFIG_FIELDS = [field.name for field in dataclasses.fields(Config) if field.name not in ("schema", "blocks", "assembled")]
BUILD = ("storage", "batch_size")
ADDED = {"svd": Run.with_svd, "popularity": Run.with_popularity_correction, "calibration": Run.calibrate}
"""Additions of `add`, in this order: each is of the scores before it."""


def add_commands(commands: Any) -> None:
    """Add all commands to what `add_subparsers` returned."""
    one = shared.add_command(commands, "check", run_check)
    add_files(one)
    shared.add_checkpoint(one, use="values that its encoder lacks are problems, and its columns are the default")
    text = "problems of one kind that are listed (default: %(default)s)"
    one.add_argument("--cap", type=at_least_one, default=CAP, help=text)
    one.add_argument("--strict", action="store_true", help="exit with 1 for suspicions too, not for problems alone")
    shared.add_shown(one, printed="the report")
    shared.add_columns(one)

    one = shared.add_command(commands, "train", run_train)
    add_files(one, items_required=True)
    one.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoints and logs")
    one.add_argument("--preset", choices=PRESETS, default="aif", help="the model (default: %(default)s)")
    text = """fields of the config in JSON (blocks: in Python), such as width=64 'head={"head":"Mlp","widths":[64,32]}': """
    text += ", ".join(CONFIG_FIELDS)
    one.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="changes", help=text)
    text = "(default: NextItem, for events of one action, or with history_actions in --columns)"
    text = f"{shared.TASK_HELP}; such as Impressions candidates=50 threshold=2 {text}"
    one.add_argument("--task", nargs="+", metavar=("NAME", "FIELD=VALUE"), help=text)
    shared.add_teacher(one, label=", or with --cascade a label")
    text = "file of a ranker's log, see read_cascade; its labels are the objectives of --set, and --teacher"
    one.add_argument("--cascade", metavar="FILE", help=text)
    shared.add_flags(one, FitConfig, shared.fields_of(FitConfig))
    one.add_argument("--evaluate", action="store_true", help="evaluate the test slice too")
    shared.add_shown(one, printed="the figures")
    shared.add_columns(one)

    one = shared.add_command(commands, "add", run_add)
    one.add_argument("parts", nargs="+", choices=ADDED, metavar="PART", help=f"one or more of {', '.join(ADDED)}")
    one.add_argument("--run", type=Path, required=True, metavar="RUN", dest="trained", help="the --out of train")
    add_files(one, items_required=True)
    one.add_argument("--out", type=Path, required=True, help="folder of the new run; must not exist")
    one.add_argument("--evaluate", action="store_true", help="print figures of the test slice as JSON, before and after")
    shared.add_shown(one, printed="what was added, and the figures")

    text = "Builds, updates, inspects and verifies item indexes on disk."
    inner = commands.add_parser("index", help=text, description=text).add_subparsers(
        required=True, metavar="build|update|follow|inspect|verify"
    )
    one = shared.add_command(inner, "build", run_index_build)
    shared.add_checkpoint(one, required=True)
    one.add_argument("--items", required=True, help="Parquet, CSV or TSV file or folder with the columns that training read")
    shared.add_flags(one, ItemIndex.build, BUILD)
    add_output(one)

    one = shared.add_command(inner, "update", run_index_update)
    one.add_argument("--index", required=True, help="folder of the index to start from")
    shared.add_checkpoint(one, required=True)
    one.add_argument("--items", help="raw items file or folder: new and changed items")
    one.add_argument("--deleted", help="file or folder with the id column: items to delete, after the changes")
    add_output(one)

    add_index_follow(inner)
    shared.add_command(inner, "inspect", run_index_inspect).add_argument("folder")
    one = shared.add_command(inner, "verify", run_index_verify)
    one.add_argument("folder")
    shared.add_shown(one)

    one = shared.add_command(commands, "export", run_export)
    shared.add_checkpoint(one, required=True)
    one.add_argument("--index", type=Path, help="folder of an index of the same model, to export too")
    one.add_argument("--out", type=Path, required=True, help="folder of the export; must not exist")
    one.add_argument("--platforms", nargs="+", default=argparse.SUPPRESS, metavar="NAME", help=shared.PLATFORM_HELP)

    one = shared.add_command(commands, "verify", run_verify)
    one.add_argument("folder", type=Path)
    one.add_argument("--tolerance", type=float, default=1e-4, help="largest error of a stored output (default: %(default)s)")
    one.add_argument("--sha256", help="digest of the manifest, as export printed it: pins every file")

    one = shared.add_command(commands, "doctor", run_doctor)
    one.add_argument("--json", action="store_true", help="print the report as JSON")


def add_files(parser: argparse.ArgumentParser, *, items_required: bool = False) -> None:
    """Add the options that name files."""
    parser.add_argument("--events", required=True, help="file or folder: one row for each interaction")
    parser.add_argument("--items", required=items_required, help="file or folder: one row for each item")
    parser.add_argument("--users", help="file or folder: one row for each user")
    if items_required:  # it trains on them
        shared.add_flags(parser, read, ["unknown"])


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that write an index."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the new index; must not exist")
    text = "stream position that the index records; once for each PARTITION; a bare NUMBER: partition 0 (default: of --index)"
    form = "[PARTITION=]NUMBER"
    parser.add_argument("--position", action="append", type=position, default=[], metavar=form, help=text)
    parser.add_argument("--dry-run", action="store_true", help="check and compute everything, write nothing")
    shared.add_shown(parser, printed="counts and version")


def at_least_one(text: str) -> int:
    """Return a positive integer of an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def position(text: str) -> tuple[int, int]:
    """Return (partition, position) of an option."""
    partition, _, number = text.rpartition("=")
    return int(partition or 0), int(number)


def run_check(options: argparse.Namespace) -> int:
    """List every problem of event, item and user files (Parquet, CSV or TSV) with row numbers, suspicions and a profile."""
    encoder = None
    if options.checkpoint is not None:
        encoder = shared.encoder_of(options.checkpoint, open_model(options.checkpoint))
    report = check(
        options.events, items=options.items, users=options.users, columns=shared.read_columns(options), encoder=encoder,
        cap=options.cap,
    )  # fmt: skip
    print(json.dumps(dataclasses.asdict(report), indent=2) if options.json else report)
    return FINE if report.clean and not (options.strict and report.suspicions) else PROBLEMS


def run_train(options: argparse.Namespace) -> int:
    """Train a model on files. Resumable: run the same command again."""
    task = None if options.task is None else shared.read_task(options.task)
    changes = shared.read_fields(options.changes, "--set", CONFIG_FIELDS)
    columns = shared.read_columns(options) or Columns()
    files = dict(items=options.items, users=options.users, columns=columns, **shared.flags_given(options, ["unknown"]))
    data = read(options.events, **files)
    teacher = shared.read_teacher(options, labels=options.cascade is not None)
    if options.cascade is not None:
        ranker = () if teacher is None or not isinstance(teacher.ranker, str) else (teacher.ranker,)
        labels = tuple(dict.fromkeys((*objective_names(changes.get("objectives", ())), *ranker)))
        data = read_cascade(options.cascade, data, labels=labels)
    with shared.as_usage("--set"):
        changes |= {"head": HEADS.from_json(changes["head"])} if "head" in changes else {}
        model = build(PRESETS[options.preset](data.schema, **changes))
    config = shared.config_of(options, FitConfig, "train")
    run = fit(model, data, config, out=options.out, task=task, teacher=teacher, progress=not options.quiet)
    figures: dict[str, Any] = {"validation": run.metrics}
    test = run.evaluate(data) if options.evaluate else None
    if options.json:
        if test is not None:
            figures |= {"test": test.figures(), "intervals": {"test": bounds(test)}}
        print(json.dumps(figures))
    else:
        print(f"validation: {', '.join(f'{name} {value:.4f}' for name, value in run.metrics.items())}")
        if test is not None:
            print(f"test: {test}")
    return FINE


def run_add(options: argparse.Namespace) -> int:
    """Add to a trained model what is fitted after training, on the files of its training, and write the new run.

    svd: scores of items that occur in the same histories (`Run.with_svd`). popularity: the popularity correction, for
    candidates from the whole catalogue (`Run.with_popularity_correction`). calibration: probabilities, on the validation
    slice (`Run.calibrate`).
    """
    expect_nothing(local(options.out, "--out"))
    trained = Run.load(options.trained)
    encoder = shared.encoder_of(options.trained, trained.trained)
    files = dict(items=options.items, users=options.users, **shared.flags_given(options, ["unknown"]))
    data = read(options.events, encoder=encoder, **files)
    made = dataclasses.replace(trained, folder=None)  # which stays as it is
    parts = [name for name in ADDED if name in options.parts]
    for part in parts:
        made = ADDED[part](made, data)
    made.save(options.out)
    if options.json or options.evaluate:
        figures: dict[str, Any] = {"added": parts, "version": made.version} if options.json else {}
        if options.evaluate:
            found = {name: run.evaluate(data) for name, run in {"before": trained, "after": made}.items()}
            figures |= {name: evaluation.figures() for name, evaluation in found.items()}
            figures["intervals"] = {name: bounds(evaluation) for name, evaluation in found.items()}
        print(json.dumps(figures))
    else:
        print(f"{options.out}: {', '.join(parts)} added, version {made.version}")
    return FINE


def bounds(evaluation: Evaluation) -> dict[str, list[float]]:
    """Return low and high ends of the 95 % intervals of figures by name."""
    return {name: [one.low, one.high] for name, one in evaluation.intervals().items()}


def run_index_build(options: argparse.Namespace) -> int:
    """Run the item function of a checkpoint over a raw items file."""
    expect_nothing(local(options.out, "--out"))
    trained = open_model(options.checkpoint)
    shared.encoder_of(options.checkpoint, trained)
    built = ItemIndex.build(trained, options.items, **shared.flags_given(options, BUILD))
    figures = {"items": len(built), "device_bytes": round(len(built) * built.bytes_per_row), "version": built.version}
    summary = f"{figures['items']} items, {figures['device_bytes']} bytes on the device, version {built.version}"
    return save(built, dict(options.position), summary, figures, options)


def run_index_update(options: argparse.Namespace) -> int:
    """Apply changed and deleted items to an index; the old one stays as it is."""
    if options.items is None and options.deleted is None:
        raise UsageError("index update: expected --items or --deleted, got neither; give one of them")
    expect_nothing(local(options.out, "--out"))
    trained = open_model(options.checkpoint)
    encoder = shared.encoder_of(options.checkpoint, trained)
    updated = ItemIndex.load(options.index, trained)
    positions = index.inspect(options.index).positions | dict(options.position)
    before, changed, deleted = len(updated), 0, 0
    if options.items is not None:
        for ids, features in read_items(options.items, encoder):
            updated, changed = updated.upsert(ids, features), changed + len(ids)
    if options.deleted is not None:
        name = encoder.columns.item_id
        there, ids = len(updated), load_columns(options.deleted, {name: "id"}, columns=encoder.columns)[name]
        updated = updated.delete(ids)
        deleted = there - len(updated)  # the others of the file are not in the index
    summary = f"{changed} changed, {deleted} deleted, {before} -> {len(updated)} items, version {updated.version}"
    figures = {"changed": changed, "deleted": deleted, "before": before, "items": len(updated), "version": updated.version}
    return save(updated, positions, summary, figures, options)


def save(
    built: ItemIndex, positions: dict[int, int], summary: str, figures: dict[str, Any], options: argparse.Namespace
) -> int:
    """Write an index, except in a dry run."""
    if not options.dry_run:
        built.save(options.out, positions=positions)
    place = "dry run" if options.dry_run else str(options.out)
    print(json.dumps({"out": place} | figures) if options.json else f"{place}: {summary}")
    return FINE


def run_index_inspect(options: argparse.Namespace) -> int:
    """Print the record of an index as JSON; reads no arrays."""
    manifest = index.inspect(options.folder)
    print(json.dumps({**vars(manifest), "config": manifest.config.to_json()}, indent=2))
    return FINE


def run_index_verify(options: argparse.Namespace) -> int:
    """Read every array of an index and compare it with its checksum."""
    manifest = index.verify(options.folder)
    figures = {"items": manifest.items, "bytes": manifest.nbytes, "version": manifest.version}
    text = f"{options.folder}: intact, {manifest.items} items, {manifest.nbytes} bytes with ids, version {manifest.version}"
    print(json.dumps({"folder": str(options.folder)} | figures) if options.json else text)
    return FINE


def run_export(options: argparse.Namespace) -> int:
    """Write a model as one folder that runs without the package's model code."""
    expect_nothing(local(options.out, "--out"))
    trained = open_model(options.checkpoint)
    loaded = None if options.index is None else ItemIndex.load(options.index, trained)
    settings: dict[str, Any] = shared.flags_given(options, ["platforms"])
    digest = export.save(options.out, trained, loaded, **settings)
    print(json.dumps({"sha256": digest, "version": trained.version}))
    return FINE


def run_verify(options: argparse.Namespace) -> int:
    """Check the checksums of an exported folder and compute its stored example again."""
    if not options.folder.is_dir():
        raise FileNotFoundError(f"{options.folder}: expected an exported folder, got none; write one: aif-jax export")
    print(json.dumps(export.verify(options.folder, tolerance=options.tolerance, sha256=options.sha256)))
    return FINE


def run_doctor(options: argparse.Namespace) -> int:
    """Report installed versions and extras, and run a smoke test."""
    report = doctor.examine()
    print(json.dumps(report, indent=2) if options.json else doctor.render(report))
    return FINE if report["healthy"] else PROBLEMS


def add_refresh_commands(commands: Any) -> None:
    """Add the commands of the next model to what `add_subparsers` returned."""
    one = shared.add_command(commands, "refresh", run_refresh)
    text = "served model: URL or folder of a snapshot store of exports, or the folder of a run, checkpoint or export"
    one.add_argument("--current", metavar="URL", help=text + " (default: --out)")
    one.add_argument("--events", required=True, help="file or folder: new events, and those before them for histories")
    one.add_argument("--items", required=True, help="file or folder: one row for each item")
    one.add_argument("--users", help="file or folder: one row for each user")
    one.add_argument("--out", required=True, metavar="URL", help="snapshot store that `aif-jax serve URL --mirror DIR` follows")
    text = "local folder of the finished steps; required if --out is remote (default: OUT.work)"
    one.add_argument("--work", type=Path, metavar="DIR", help=text)
    text = f"{shared.TASK_HELP} (default: that of the served model)"
    one.add_argument("--task", nargs="+", metavar=("NAME", "FIELD=VALUE"), help=text)
    shared.add_teacher(one)
    shared.add_flags(one, RefreshConfig, shared.fields_of(RefreshConfig))
    shared.add_shown(one, printed="the report")

    one = shared.add_command(commands, "rollback", run_rollback)
    one.add_argument("--out", required=True, metavar="URL", help="snapshot store of exports, --out of refresh")


def run_refresh(options: argparse.Namespace) -> int:
    """Train the served model on new events, judge it against the served one, and publish it if the gate passes it.

    Resumable: run the same command again. Exit code 0: published, or nothing new; 3: the gate refused the model, which stays
    out, and the report says why; 1 and 2 as for every command.
    """
    task = None if options.task is None else shared.read_task(options.task)
    config = shared.config_of(options, RefreshConfig, "refresh")
    made = refresh(
        options.current or options.out, options.events, config, items=options.items, users=options.users, out=options.out,
        work=options.work, task=task, teacher=shared.read_teacher(options), progress=not options.quiet,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"status": made.status, "name": made.name} | made.report))
    else:
        reasons = made.report.get("gate", {}).get("reasons", ())
        print("\n".join([made.status if made.name is None else f"{made.status}: {made.name}", *reasons]))
    return REFUSED if made.status == "refused" else FINE


def run_rollback(options: argparse.Namespace) -> int:
    """Make the version before the current one current again; services that follow the store swap. Prints its name."""
    with shared.open_store(options.out) as store:
        print(store.rollback())
    return FINE
