"""Damaged files of every format: the right content or the documented error, never a wrong content or another error."""

import json

import pytest

from tests.reliability import damaged
from tests.reliability.sizes import FULL, SEED, fully

pytestmark = pytest.mark.lane("standing")


@fully
@pytest.mark.parametrize("name", list(damaged.FORMATS))
def test_damaged_files(python, tmp_path, name):
    """In a child process, which may crash."""
    print(f"AIF_JAX_RELIABILITY_SEED={SEED}")
    cases, env = FULL.damaged_files, {"PYTHONWARNINGS": "default"}  # readers in other languages warn of what they then refuse
    code = f"from tests.reliability import damaged; damaged.main({name!r}, {str(tmp_path)!r}, {SEED}, {cases})"
    tally = json.loads(python(code, timeout=3000, env=env).splitlines()[-1])
    print(f"{name}: {tally}")
    assert sum(tally.values()) == cases and tally["refused"] > 0
    assert tally.get("unsure", 0) < cases / 2, "too few cases in which the right content is known"


# Arrow swallows an error within its handler of broken rows, such as of text in another encoding.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_few_damaged_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(damaged.resource, "setrlimit", lambda *limits: None)  # this process goes on without limits
    monkeypatch.setattr(damaged.faulthandler, "dump_traceback_later", lambda *limits, **options: None)
    damaged.main("csv", str(tmp_path), 0, 20)
    assert sum(json.loads(capsys.readouterr().out.splitlines()[-1]).values()) == 20
