"""`aif-jax doctor`."""

import importlib.util
import json

import jax
import pytest

from aif_jax import checkpoint, cli
from aif_jax.cli import doctor


@pytest.fixture
def quick(monkeypatch):
    """Replaces the checks by quick ones, so that a test says what they find."""

    def replace(**checks):
        monkeypatch.setattr(doctor, "CHECKS", checks)

    return replace


def broken():
    raise RuntimeError("no space left on device")


def skipped():
    raise doctor.Skipped("needs flatbuffers")


def test_everything_works_here(capsys):
    """The real checks: a compiled product, a checkpoint there and back, an export there and back."""
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"]
    assert {name: check["status"] for name, check in report["checks"].items()} == {
        "compute": "ok",
        "checkpoint": "ok",
        "export": "ok",
    }
    assert report["versions"]["jax"] == jax.__version__
    assert len(report["devices"]) == len(jax.devices())
    assert report["threads"]["cpus"] >= 1


def test_a_failed_check_is_named_and_gives_exit_status_one(quick, capsys):
    quick(compute=lambda: "fine", checkpoint=broken)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "checkpoint        failed   RuntimeError: no space left on device" in said
    assert "compute           ok       fine" in said
    verdict = said[said.index("NOT WELL") :].splitlines()
    assert verdict[0] == "NOT WELL: checkpoint failed. Reinstall, then run this again:"
    assert verdict[1].startswith("  python -m pip install") and verdict[2] == "  aif-jax doctor"


def test_a_skipped_check_is_no_failure(quick, capsys):
    quick(export=skipped)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "export            skipped  needs flatbuffers" in said
    lines = said[said.index("all well") :].splitlines()
    assert lines[0] == "all well; skipped: export, see above. Next:"
    assert [line.split("  ")[1].strip() for line in lines[1:]] == [command for command, _ in doctor.NEXT]


def test_what_is_missing_comes_with_the_command_that_installs_it(quick, capsys, monkeypatch):
    quick()
    monkeypatch.setattr(doctor, "EXTRAS", {"export": ("no-such-package",)})
    assert cli.main(["doctor"]) == 0
    assert '(missing no-such-package: pip install "aif_jax[export]")' in capsys.readouterr().out


def test_export_is_skipped_without_flatbuffers(monkeypatch):
    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    with pytest.raises(doctor.Skipped, match=r'pip install "aif_jax\[export\]"'):
        doctor.check_export()


def test_a_device_that_computes_nonsense_fails(monkeypatch):
    monkeypatch.setattr(doctor.jnp, "matmul", lambda a, b: a)
    with pytest.raises(ValueError, match="one that differs by"):
        doctor.check_compute()


def test_a_checkpoint_that_comes_back_different_fails(monkeypatch):
    real = checkpoint.load
    monkeypatch.setattr(
        checkpoint,
        "load",
        lambda *a, **k: checkpoint.Checkpoint(
            params=jax.tree.map(lambda x: x + 1, real(*a, **k).params), config=None, version=""
        ),
    )
    with pytest.raises(ValueError, match="expected what was saved, got others"):
        doctor.check_checkpoint()


def test_a_platform_that_is_not_here_is_reported_and_fails(python):
    code = "import sys; from aif_jax.cli import main; sys.exit(main(['doctor']))"
    said = python(code, expect=1, env={"JAX_PLATFORMS": "no_such_platform"})
    assert "none: Unable to initialize backend 'no_such_platform'" in said
    assert "NOT WELL" in said


def test_the_next_commands_are_commands(capsys):
    """Each begins a command that is there: a module of experiments, or one of `aif-jax`."""
    for command, _ in doctor.NEXT:
        words = command.split()
        if words[0] == "aif-jax":
            with pytest.raises(SystemExit) as ended:
                cli.main([words[1], "--help"])
            assert ended.value.code == 0 and f"aif-jax {words[1]}" in capsys.readouterr().out
        else:
            assert words[:2] == ["python", "-m"] and importlib.util.find_spec(words[2]) is not None
