"""Light compilation goes with whatever options this XLA has: they come and go between versions of JAX."""

import jax
import pytest

from tests import light


def test_an_option_that_this_xla_lacks_is_left_out(monkeypatch):
    level = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(light, "WANTED", {**level, "xla_no_such_option": True})
    assert light.options.__wrapped__() == level
    monkeypatch.setattr(light, "WANTED", {"xla_backend_optimization_level": "many"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="many"):  # anything else that is wrong is not taken for that
        light.options.__wrapped__()


def test_a_child_starts_with_the_flags(python):
    assert python("import jax; print(jax.numpy.ones(2).sum())", lightly=True).strip() == "2.0"


def test_what_is_compiled_inside_is_compiled_with_the_options(monkeypatch):
    monkeypatch.setattr(light, "options", lambda: {"xla_no_such_option": True})
    with light.lightly_compiled(), pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        jax.jit(lambda x: x * 3 - 1)(2.0)
