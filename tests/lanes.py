"""Lanes: each test is in exactly one, and `python -m pytest` runs the default lane alone.

A test that fits no line here is in the default lane: the package, its promises, the doors.
"""

import collections
from collections.abc import Collection

DEFAULT = "default"
LANES = {
    DEFAULT: "the package, its promises, the doors",
    "docs": "every page runs, every link leads somewhere",
    "experiments": "the scripts and data sets of experiments/",
    "standing": "child processes, servers, brokers, a browser, kills in their short form, options beyond `presets.aif`",
    "reliability": "kills, storm, fuzz, chaos, soak in full size",
    "engines": "Ray and Spark; needs their extras and Java: .ci/run engines",
}
"""Markers, and what each lane holds."""
LANDING = ("docs", "experiments", "standing")
"""Lanes that .ci/run runs after the default one, on every change."""
MARKED = ("reliability", "engines")
"""Lanes that a test file states itself: full sizes are parameters and functions next to the short ones."""
STARTERS = {"python", "server"}
"""Fixtures that start another process; a test that takes one is in `standing` unless a line of TABLE names it."""
CHIEF = ("every block", "matching", "two_tower")
"""Cases of OF_VARIANTS that the default lane takes: all blocks at once, what `presets.aif` is made of, and the baseline."""
OF_VARIANTS = (
    "tests/promises/test_decomposition.py::test_every_trained_parameter_gets_a_gradient",
    "tests/promises/test_decomposition.py::test_other_users_of_a_batch",
    "tests/promises/test_decomposition.py::test_staged_equals_joint",
    "tests/promises/test_decomposition.py::test_gradients_of_an_empty_history_are_finite",
    "tests/promises/test_decomposition.py::test_padding_changes_nothing_and_an_empty_history_is_finite",
)
"""Tests of `demo.VARIANTS`, each a case by name; the others are in `standing`."""
EXPORTED = "tests/promises/test_exported_equals_joint.py::test_exported_equals_joint"
DEFINITIONS = "tests/blocks/test_definitions.py::test_inputs_of_the_head_are_those_of_the_definition"
HEAD = "tests/test_head.py::test_interaction_equals_the_concatenated_head"
TABLE = {
    DEFAULT: (
        "tests/test_package.py", f"{DEFINITIONS}[bridges]", f"{DEFINITIONS}[linear keys]",
        *(f"{test}[{case}]" for test in OF_VARIANTS for case in CHIEF),
        f"{EXPORTED}[aif]", f"{EXPORTED}[two_tower]", f"{HEAD}[every block]", f"{HEAD}[matching]",
    ),
    "docs": ("tests/test_docs.py",),
    "experiments": (
        "tests/test_cascade_data.py", 
        "tests/test_datasets.py", "tests/test_experiments.py", "tests/test_peers.py",
        "tests/test_plots.py", "tests/test_question.py", "tests/test_ranker_recall.py", "tests/test_recipes.py",
        "tests/test_scale_out_serving.py",
        "tests/test_scripts.py", "tests/test_synthetic.py",
        "tests/test_serving_parts.py::test_timeline_sums_stages_and_draws",
    ),
    "standing": (
        *OF_VARIANTS, EXPORTED, HEAD,
        "tests/reliability/", "tests/test_clients.py",
        "tests/test_export.py::test_deep_sparse_and_many_files_are_refused",
        "tests/test_feature_sources.py", "tests/test_several_processes.py",
        "tests/test_service_fronts.py",
        "tests/test_service_log.py", "tests/test_service_mirror.py", "tests/test_service_nearline.py",
        "tests/test_service_page.py", "tests/test_service_process.py",
        "tests/test_sharded_training.py", "tests/test_snapshot_store.py",
        "tests/test_update_streams.py",
        "tests/test_cli.py::test_a_process_whose_output_nobody_reads_ends_in_silence",
        "tests/test_folders.py::test_a_killed_process_leaves_all_or_nothing",
        "tests/test_folders.py::test_the_work_folder_of_a_running_process_stays",
        "tests/test_folders.py::test_what_a_killed_writer_of_a_file_left_goes_with_the_next_write",
        "tests/test_jobs.py::test_a_worker_needs_the_pickle_alone",
        "tests/test_lanes.py::test_commands_keep_compiled_programs",
        "tests/test_index.py::test_every_kind_of_model_scores_from_the_table_as_from_features",
        DEFINITIONS, "tests/blocks/test_definitions.py::test_cache_matches_the_reference",
        "tests/blocks/test_definitions.py::test_read_and_flags_match_the_reference", "tests/test_carry_over.py",
        "tests/test_distill.py",
        "tests/test_calibration.py", "tests/test_objectives.py",
        "tests/test_sparse.py", "tests/test_tier_histogram.py",
        "tests/test_serving.py::test_a_process_that_serves_computes_in_the_calling_thread",
        "tests/test_serving_parts.py::test_the_bytes_of_a_cache_are_those_of_the_process",
    ),
}  # fmt: skip
"""Folders, files, functions and cases of each lane. A case's line wins over its function's, that over its file's, and so on."""


def lane_of(test: str, *, marks: Collection[str] = (), fixtures: Collection[str] = ()) -> str:
    """The lane of a test.

    Args:
      test: its id, such as "tests/test_folders.py::test_damage[name]".
      marks: names of the markers in its file.
      fixtures: names of the fixtures that it takes.

    Raises:
      ValueError: two lanes of MARKED are among its markers.
    """
    marked = [lane for lane in MARKED if lane in marks]
    if len(marked) > 1:
        raise ValueError(f"{test}: expected one lane, got the markers {' and '.join(marked)}; leave one of them")
    if marked:
        return marked[0]
    name = test.partition("[")[0]
    lines = {
        line: lane
        for lane, entries in TABLE.items()
        for line in entries
        if line in (test, name) or name.startswith(line if line.endswith("/") else f"{line}::")
    }
    if lines:
        return lines[max(lines, key=len)]
    return "standing" if STARTERS & set(fixtures) else DEFAULT


def left_out(expression: str) -> list[str]:
    """Lanes that a run with `-m expression` leaves out."""
    names = [collections.defaultdict(bool, {lane: True}) for lane in LANES]
    return [lane for lane, chosen in zip(LANES, names, strict=True) if expression and not eval(expression, {}, chosen)]


def command(lanes: Collection[str]) -> str:
    """What runs these lanes."""
    expression = " or ".join(lanes)
    return "python -m pytest -m " + (f'"{expression}"' if len(lanes) > 1 else expression)
