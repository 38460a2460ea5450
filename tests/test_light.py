"""Light compilation goes with whatever options this XLA has: they come and go between versions of JAX."""

import types

import jax
import pytest

from tests import conftest, light
from tests.refusals import refused


def test_an_option_that_this_xla_lacks_is_left_out(monkeypatch):
    level = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(light, "WANTED", {**level, "xla_no_such_option": True})
    assert light.options.__wrapped__() == level
    monkeypatch.setattr(light, "WANTED", {"xla_backend_optimization_level": "many"})
    refused(jax.errors.JaxRuntimeError, "many", light.options.__wrapped__)


def test_a_child_starts_with_the_flags(python):
    assert python("import jax; print(jax.numpy.ones(2).sum())", lightly=True).strip() == "2.0"


def test_what_is_compiled_inside_is_compiled_with_the_options(monkeypatch):
    monkeypatch.setattr(light, "options", lambda: {"xla_no_such_option": True})
    with light.lightly_compiled(), pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        jax.jit(lambda x: x * 3 - 1)(2.0)


def test_light_modules_share_programs_and_a_test_of_what_is_shipped_does_not(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    config = types.SimpleNamespace(stash={})
    files = "tests/test_serving.py", "tests/test_fit.py"
    shipped, lightly = (types.SimpleNamespace(config=config, nodeid=f"{file}::test") for file in files)
    with light.lightly_compiled(keep=True):
        pass
    conftest.pytest_runtest_setup(shipped)
    assert cleared == []
    for item in (shipped, types.SimpleNamespace(config=config, nodeid="aif_jax/run.py::aif_jax.run.fit")):
        around, before = conftest.Compilation().pytest_runtest_protocol(item), light._open
        next(around)
        assert light._open - before == (item is not shipped)  # the examples of the package compile lightly
        assert next(around, None) is None and light._open == before
        assert (conftest.LIGHT_PROGRAMS in config.stash) == (item is not shipped)
    conftest.pytest_runtest_setup(lightly)
    assert cleared == []
    conftest.pytest_runtest_setup(shipped)
    conftest.pytest_runtest_setup(shipped)
    assert cleared == [1]
    with light.lightly_compiled():
        pass
    assert cleared == [1, 1]
