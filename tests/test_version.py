"""The fingerprint: what it depends on, and what it does not."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.blocks import Bea

SCHEMA = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
CONFIG = aif.Config(schema=SCHEMA, blocks=(Bea(bridges=4),))
PARAMS = {"item": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "fitted": {"lsh": np.ones((2, 2), np.float32)}}


def changed(**groups):
    return {**PARAMS, **groups}


def test_it_is_a_hash_of_contents():
    version = aif.fingerprint(PARAMS, CONFIG)
    assert len(version) == 64 and set(version) <= set("0123456789abcdef")
    again = {"fitted": {"lsh": jnp.ones((2, 2))}, "item": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    assert aif.fingerprint(again, aif.Config.from_json(CONFIG.to_json())) == version
    fortran = changed(item={"kernel": np.asfortranarray(PARAMS["item"]["kernel"])})
    assert aif.fingerprint(fortran, CONFIG) == version


@pytest.mark.parametrize(
    "other",
    [
        changed(item={"kernel": np.arange(6, dtype=np.float32).reshape(3, 2)}),
        changed(item={"kernel": np.arange(6, dtype=np.int32).reshape(2, 3)}),
        changed(item={"weight": PARAMS["item"]["kernel"]}),
        changed(item={"kernel": np.nextafter(PARAMS["item"]["kernel"], 9).astype(np.float32)}),
        changed(fitted={"lsh": np.zeros((2, 2), np.float32)}),
        changed(user={"bias": np.zeros(0, np.float32)}),
    ],
    ids=["shape", "dtype", "path", "one bit of each", "signature matrix", "an empty leaf more"],
)
def test_every_part_of_the_parameters_counts(other):
    assert aif.fingerprint(other, CONFIG) != aif.fingerprint(PARAMS, CONFIG)


def test_config_schema_encoder_and_the_data_of_random_keys_count():
    more = CONFIG.replace(schema=dataclasses.replace(SCHEMA, actions=5))
    assert len({aif.fingerprint(PARAMS, config) for config in (CONFIG, CONFIG.replace(blocks=(Bea(bridges=5),)), more)}) == 3
    encoders = [None, *(types.SimpleNamespace(version=version) for version in ("ab", "cd", "ab"))]
    versions = [aif.fingerprint(PARAMS, CONFIG, encoder) for encoder in encoders]
    assert len(set(versions)) == 3 and versions[1] == versions[3]
    versions = {aif.fingerprint({"key": jax.random.key(seed)}, CONFIG) for seed in (1, 2)}
    assert len(versions | {aif.fingerprint({"key": jax.random.key_data(jax.random.key(1))}, CONFIG)}) == 3


def test_a_mismatch_names_both_versions():
    error = aif.VersionMismatch("index", expected="aaa", got="bbb")
    assert isinstance(error, ValueError) and issubclass(aif.EncodingMismatch, aif.VersionMismatch)
    assert (error.expected, error.got) == ("aaa", "bbb")
    assert str(error).startswith("index: expected version aaa, got bbb")
