"""The commands `check`, `train`, `add`, `index build`, `index verify`, `export`, `verify`, `refresh` and `rollback`.

The signature of a function is a command's flags, its docstring the help text.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from aif_jax import export as exports
from aif_jax import index, refreshing
from aif_jax.checks import expect
from aif_jax.cli import options
from aif_jax.cli.options import FINE, FLAGS, PROBLEMS, REFUSED, Files, Result, Teaching, TrainingFiles, UsageError
from aif_jax.config import Config
from aif_jax.encoding.columns import Columns
from aif_jax.export.contents import open as open_model
from aif_jax.export.writer import PLATFORMS
from aif_jax.index import ItemIndex, Storage
from aif_jax.model import build
from aif_jax.presets import PRESETS
from aif_jax.readers import check as check_files
from aif_jax.readers import read_cascade
from aif_jax.refreshing import RefreshConfig
from aif_jax.registry import HEADS
from aif_jax.run import Run, fit
from aif_jax.scores import objective_names
from aif_jax.store.folders import expect_nothing, local
from aif_jax.train.settings import FitConfig

CONFIG_FIELDS = [name for name in Config.__dataclass_fields__ if name not in ("schema", "blocks", "assembled")]
ADDED = {"svd": Run.with_svd, "popularity": Run.with_popularity_correction, "calibration": Run.calibrate}
"""Additions of `add`, in this order: each is of the scores before it."""


def check(
    *, events: str, items: str | None = None, users: str | None = None, columns: str | None = None,
    checkpoint: Path | None = None, cap: int = 5, strict: bool = False, json: bool = False,
) -> Result:  # fmt: skip
    """List every problem of event, item and user files (Parquet, CSV or TSV) with row numbers, suspicions and a profile.

    Args:
      events: file or folder: one row for each interaction.
      items: file or folder: one row for each item.
      users: file or folder: one row for each user.
      columns: which column is what: fields of `aif_jax.Columns` in a JSON file, or as JSON, such as '{"item": "sku"}'.
      checkpoint: folder of a checkpoint or an export, or --out of train; values that its encoder lacks are problems, but in
        bags, and its columns are the default.
      cap: problems of one kind that are listed; the rest is counted.
      strict: exit with 1 for suspicions too, not for problems alone.
      json: print the report as JSON.
    """
    encoder = None if checkpoint is None else open_model(checkpoint).need_encoder(str(checkpoint))
    report = check_files(events, items=items, users=users, columns=options.read_columns(columns), encoder=encoder, cap=cap)
    code = FINE if report.clean and not (strict and report.suspicions) else PROBLEMS
    return code, dataclasses.asdict(report) if json else str(report)


def train(
    *,
    files: Annotated[TrainingFiles, FLAGS],
    columns: str | None = None,
    out: Path,
    preset: Literal["aif", "paper", "two_tower", "two_tower_matching", "full_attention"] = "aif",
    changes: Annotated[list[str] | None, Parameter("--set")] = None,
    task: list[str] | None = None,
    config: Annotated[FitConfig, FLAGS] = FitConfig(),
    teaching: Annotated[Teaching, FLAGS] = Teaching(),
    cascade: str | None = None,
    evaluate: bool = False,
) -> Result:
    """Train a model on files. Resumable: run the same command again.

    Args:
      out: folder of the run: checkpoints and logs.
      columns: which column is what, see check.
      preset: the model.
      changes: fields of the config, FIELD=VALUE with a value in JSON, such as width=64 'head={"head":"Mlp","widths":[64,32]}':
        width, short_length, long_length, towers, head, sequence, item_content, objectives. Blocks: in Python.
      task: a task and its fields, NAME FIELD=VALUE, of NextItem (negatives, evaluated, logq_correction), Impressions
        (candidates, threshold) and Cascaded (exposed, ranked, pre_ranked, retrieved), such as Impressions candidates=50
        threshold=2. Default: NextItem, for events of one action, or with history_actions in --columns.
      cascade: file of a ranker's log, see `read_cascade`; its labels are the objectives of --set, and --teacher.
      evaluate: evaluate the test slice too.
    """
    data = files.read(columns=options.read_columns(columns) or Columns())
    teacher = teaching.read(labels=cascade is not None)
    with options.as_usage("--set"):
        fields = options.read_fields(changes or (), CONFIG_FIELDS)
    if cascade is not None:
        ranker = () if teacher is None or not isinstance(teacher.ranker, str) else (teacher.ranker,)
        labels = tuple(dict.fromkeys((*objective_names(fields.get("objectives", ())), *ranker)))
        data = read_cascade(cascade, data, labels=labels)
    with options.as_usage("--set"):
        fields |= {"head": HEADS.from_json(fields["head"], by_hand=True)} if "head" in fields else {}
        model = build(PRESETS[preset](data.schema, **fields))
    run = fit(model, data, config, out=out, task=options.read_task(task), teacher=teacher)
    figures: dict[str, Any] = {"validation": run.metrics}
    if evaluate:
        test = run.evaluate(data)
        intervals = {name: [one.low, one.high] for name, one in test.intervals().items()}  # of 95 %
        figures |= {"test": test.figures(), "intervals": {"test": intervals}}
    return FINE, figures


def add(
    *parts: Literal["svd", "popularity", "calibration"], run: Path, files: Annotated[TrainingFiles, FLAGS], out: Path,
    cascade: str | None = None,
) -> Result:  # fmt: skip
    """Add to a trained model what is fitted after training, on the files of its training, and write the new run.

    svd: scores of items that occur in the same histories (`Run.with_svd`). popularity: the popularity correction, for
    candidates from the whole catalogue (`Run.with_popularity_correction`). calibration: probabilities, on the validation
    slice (`Run.calibrate`).

    Args:
      parts: one or more of them.
      run: the --out of train.
      out: folder of the new run; must not exist.
      cascade: that of train.
    """
    expect(parts, "add", f"some of {', '.join(ADDED)}", "none; name them", error=UsageError)
    expect_nothing(local(out, "--out"))
    made = Run.load(run)
    repeats = made.settings.repeats if files.repeats is None else files.repeats
    data = dataclasses.replace(files, repeats=repeats).read(encoder=made.trained.need_encoder(str(run)))
    data = data if cascade is None else read_cascade(cascade, data, labels=objective_names(made.config.objectives))
    added = [name for name in ADDED if name in parts]
    for part in added:
        made = ADDED[part](made, data)
    made.save(out)
    return FINE, {"out": str(out), "added": added, "version": made.version}


def index_build(*, checkpoint: Path, items: str, out: Path, storage: Storage = "float32", batch_size: int = 1024) -> Result:
    """Run the item function of a checkpoint over a raw items file.

    Args:
      checkpoint: folder of a checkpoint or an export, or the --out of train.
      items: Parquet, CSV or TSV file or folder with the columns that training read and, if any, those of item_statistics.
      out: folder of the new index; must not exist.
      storage: storage of vectors: float32 (exact), bfloat16, or int8 with a scale for each row.
      batch_size: items in one run of the item function. Rows may differ in the last bit between two batch sizes.
    """
    expect_nothing(local(out, "--out"))
    built = ItemIndex.build(open_model(checkpoint), items, storage=storage, batch_size=batch_size)
    built.save(out)
    figures = {"items": len(built), "device_bytes": round(len(built) * built.bytes_per_row), "version": built.version}
    return FINE, {"out": str(out)} | figures


def index_verify(folder: str, /) -> Result:
    """Read every array of an index, compare it with its checksum, and print the record of the index."""
    return FINE, vars(index.verify(folder))


def export(*, checkpoint: Path, index: Path | None = None, out: Path, platforms: tuple[str, ...] = PLATFORMS) -> Result:
    """Write a model as one folder that runs without the package's model code.

    Args:
      checkpoint: folder of a checkpoint or an export, or the --out of train.
      index: folder of an index of the same model, to export too.
      out: folder of the export; must not exist.
      platforms: names among cpu, cuda, rocm, tpu, all served by the same artefact.
    """
    expect_nothing(local(out, "--out"))
    trained = open_model(checkpoint)
    loaded = None if index is None else ItemIndex.load(index, trained)
    return FINE, {"sha256": exports.save(out, trained, loaded, platforms=platforms), "version": trained.version}


def verify(folder: Path, /, *, tolerance: float = 1e-4, sha256: str | None = None) -> Result:
    """Check the checksums of an exported folder and compute its stored example again.

    Args:
      tolerance: largest |got - golden| / max(1, |golden|) of a float, more on accelerators of low precision; integers: exact.
      sha256: digest that `export` printed: pins every file.
    """
    expect(folder.is_dir(), str(folder), "an exported folder", "none; write one: aif-jax export", error=FileNotFoundError)
    return FINE, exports.verify(folder, tolerance=tolerance, sha256=sha256)


def refresh(
    *,
    files: Annotated[Files, FLAGS],
    out: str,
    current: str | None = None,
    work: Path | None = None,
    task: list[str] | None = None,
    config: Annotated[RefreshConfig, FLAGS] = RefreshConfig(),
    teaching: Annotated[Teaching, FLAGS] = Teaching(),
) -> Result:
    """Train the served model on new events, judge it against the served one, and publish it if the gate passes it.

    Resumable: run the same command again. Exit code 0: published, or nothing new; 3: the gate refused the model, which stays
    out, and the report says why; 1 and 2 as for every command.

    Args:
      out: snapshot store that `aif-jax serve URL --mirror DIR` follows.
      current: served model: URL or folder of a snapshot store of exports, or folder of a run, checkpoint or export. Default:
        the store of --out.
      work: local folder of the finished steps; required if --out is remote. Default: OUT.work.
      task: a task and its fields, see train. Default: that of the served model.
    """
    result = refreshing.refresh(
        current or out, files.events, config, items=files.items, users=files.users, out=out, work=work,
        task=options.read_task(task), teacher=teaching.read(),
    )  # fmt: skip
    return REFUSED if result.status == "refused" else FINE, {"status": result.status, "name": result.name} | result.report


def rollback(*, out: str) -> Result:
    """Make the version before the current one current again; services that follow the store swap. Prints its name.

    Args:
      out: snapshot store of exports, --out of refresh.
    """
    return FINE, options.open_store(out).rollback()


COMMANDS = (check, train, add, index_build, index_verify, export, verify, refresh, rollback)
