"""`aif-jax doctor`."""

import json

import jax

from aif_jax import checkpoint, cli
from aif_jax.cli import doctor
from tests.refusals import refused


def test_everything_works_here(capsys):
    """The real smoke test."""
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] and report["smoke test"].startswith("a model was built, saved and loaded on ")
    assert report["versions"]["needed"]["jax"] == jax.__version__ and report["versions"]["data"]["pyarrow"]


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
