"""`Trained`: a model with its parameters and its encoder, the value that index, jobs, engine and export take; and its version.

The version is one string for the contents of parameters, config and encoder. User state, index and features carry the version
that they were made with; a different one is refused, never mixed.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np

from aif_jax.checks import ArgumentError, check_encoding, expect
from aif_jax.config import Config
from aif_jax.encoding.encoder import Encoder
from aif_jax.features import item_layout, user_layout
from aif_jax.model import PreRanker, build
from aif_jax.trees import differences, is_key, leaves_by_path, listed
from aif_jax.types import ItemFeatures, Params

__version__ = "0.2.0"
"""Of this package."""


@dataclasses.dataclass(frozen=True)
class Digest:
    """What identifies one leaf of a tree."""

    dtype: str  # "float32", "key<fry>" for typed random keys
    shape: tuple[int, ...]
    sha256: str  # of the bytes in C order

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def fingerprint(params: Params, config: Config, encoder: Encoder | None = None) -> str:
    """Return the version: 64 hex digits over path, dtype, shape and bytes of each leaf of `params`, config and encoder.

    Equal contents give equal strings, in NumPy or on a device, sharded or not. Every leaf is copied to the host once.

    Args:
      params: all groups, `fitted` included.
      config: with its schema and blocks.
      encoder: with its columns, vocabularies and scales; None for a model without one.

    Raises ValueError: a leaf that this process does not hold whole.

    Example:
      >>> import numpy as np, aif_jax as aif
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> config = aif.presets.two_tower(aif.Schema(item_attributes=(item, category)))
      >>> params = {"item": {"kernel": np.zeros((2, 3), np.float32)}}
      >>> fingerprint(params, config) == fingerprint(params, config.replace(width=24))
      False
    """
    return combine({path: digest(leaf, path) for path, leaf in leaves_by_path(params).items()}, config, encoder)


def encoding_for(config: Config, encoder: Encoder | None = None) -> str:
    """Return the encoding that data for a model must have: its encoder's, else that of its schema; "" where neither is known.

    Raises EncodingMismatch where both are known and differ.
    """
    if encoder is None:
        return config.schema.encoding
    check_encoding("encoder", expected=config.schema.encoding, got=encoder.version)
    return encoder.version


def combine(leaves: Mapping[str, Digest], config: Config, encoder: Encoder | None = None) -> str:
    """Return the fingerprint, from the digests of the leaves."""
    digests = {path: dataclasses.astuple(leaf) for path, leaf in leaves.items()}
    parts = {"leaves": digests, "config": config.to_json(), "encoder": None if encoder is None else encoder.version}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest(leaf: Any, path: str = "leaf") -> Digest:
    """Return the digest of one array, a typed random key by its key data; raises ValueError if only a part is here."""
    whole = getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated
    expect(whole, path, "an array that this process holds whole", "one spread over several processes")
    dtype = str(leaf.dtype) if hasattr(leaf, "dtype") else str(np.asarray(leaf).dtype)
    data = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return Digest(dtype=dtype, shape=tuple(np.shape(leaf)), sha256=hashlib.sha256(flat.data).hexdigest())


def model_of(config: Config, model: PreRanker | None = None) -> PreRanker:
    """Return the model of a saved config: built from it, or the given one; ValueError if that has another config."""
    if model is None:
        return build(config)
    if not model.config.schema.encoding:
        model = model._replace(config=model.config.with_encoding(config.schema.encoding))
    expect(model.config == config, "model", f"one of the saved config {config!r}", repr(model.config))
    return model


def check_params(model: PreRanker, params: Params, name: str = "params") -> Params:
    """Return parameters; ValueError unless the model's `init` takes the fitted group, and makes the others by path and shape.

    Ids beyond a table that is too small would read row 0: nothing would fail, and nothing be right.
    """
    groups = sorted(params) if isinstance(params, Mapping) else type(params).__name__
    expect("fitted" in groups, name, "the groups that `model.init` returns, 'fitted' among them, such as run.params", groups)
    leaves, tree = jax.tree.flatten(params["fitted"])
    expected = _expected(model.init, tree, tuple(map(np.shape, leaves)))
    shapes = {path: str(list(np.shape(leaf))) for path, leaf in leaves_by_path(params).items()}
    if lines := differences(shapes, expected, source=name):
        raise ValueError(f"{name}: expected parameters of this model (warm_start, per_item), got others:\n{listed(lines)}")
    return params


@functools.lru_cache(maxsize=16)
def _expected(init: Callable[..., Params], tree: Any, shapes: tuple[tuple[int, ...], ...]) -> dict[str, str]:
    """Return shapes by path of what `init` makes with a fitted group of these shapes; raises as it."""
    fitted = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes])
    made = jax.eval_shape(lambda fitted: init(jax.random.key(0), None, fitted=fitted), fitted)
    return {path: str(list(leaf.shape)) for path, leaf in leaves_by_path(made).items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained model: pure functions, their parameters, and the encoder that turns raw data into their features.

    `aif.open` reads one from a folder, and a `Run` holds one. Two are the same model if their versions are equal.

    Attributes:
      model: from `build` or `assemble`.
      params: all groups of the model, `fitted` included. The arrays must not be changed in place: the version is kept.
      encoder: encoder of the training data; None for a model that takes encoded features only.
      settings: settings of its run as JSON, which tell `refresh` until when it was trained; None for unknown. Checkpoints and
        exports carry them; they are no part of the version.
      items: features of all rows of the encoder's items as training had them, NumPy arrays; None for unknown. Of items that
        leave the items file `read(earlier=)` knows them from here. Saved with the model; no part of the version.

    Raises:
      EncodingMismatch: an encoder other than that of the model's data.
      ValueError: an encoder of other features, trained parameters of other paths or shapes, a fitted group that `init` refuses.

    Example:
      >>> import jax, aif_jax as aif
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)
      >>> schema = aif.Schema(item_attributes=(item, category))
      >>> model = aif.build(aif.presets.two_tower(schema, width=4, sequence=False))
      >>> catalogue = aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4})
      >>> trained = aif.Trained(model, model.init(jax.random.key(0), catalogue))
      >>> index = aif.ItemIndex.build(trained, catalogue, progress=False)
      >>> index.version == trained.version == aif.fingerprint(trained.params, trained.config)
      True
    """

    model: PreRanker
    params: Params = dataclasses.field(repr=False)
    encoder: Encoder | None = None
    settings: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
    items: ItemFeatures | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        check_params(self.model, self.params)
        if self.encoder is None:
            return
        if self.items is not None:
            rows = len(self.encoder.vocabularies["item"])
            expect(len(self.items.floats) == rows, "Trained.items", f"{rows} rows like the encoder", len(self.items.floats))
        schema, other = self.config.schema, self.encoder.schema
        if any(layout(schema) != layout(other) for layout in (user_layout, item_layout)):
            raise ValueError(f"encoder: expected one that makes the features of {schema!r}, got one of {other!r}")
        encoding_for(self.config, self.encoder)

    @property
    def config(self) -> Config:
        """Config of the model."""
        return self.model.config

    @functools.cached_property
    def version(self) -> str:
        """`aif_jax.fingerprint` of params, config and encoder, computed once."""
        return fingerprint(self.params, self.config, self.encoder)

    @property
    def encoding(self) -> str:
        """Version of the encoder, "" where it is unknown."""
        return encoding_for(self.config, self.encoder)

    def __repr__(self) -> str:
        known = "" if "version" not in self.__dict__ else f", version={self.version[:12]}..."
        return f"Trained({self.model!r}, {'without' if self.encoder is None else 'with'} encoder{known})"

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other fields, whose version is computed again."""
        return dataclasses.replace(self, **changes)

    def with_version(self, version: str) -> Self:
        """Return copy whose version is not computed: for a reader that compared the digests, or received it with the arrays."""
        copy = dataclasses.replace(self)
        copy.__dict__["version"] = version
        return copy

    def on_device(self) -> Self:
        """Return a copy with its parameters on the default device."""
        return self.replace(params=jax.device_put(self.params)).with_version(self.version)

    def need_encoder(self, what: str) -> Encoder:
        """Return the encoder; ArgumentError for a model without one, named by `what` needs it."""
        if self.encoder is None:
            expected = "a model with an encoder, which reads raw data"
            out = "give Trained(model, params, encoder), or save the model with the encoder of its data"
            raise ArgumentError(f"{what}: expected {expected}, got one without; {out}")
        return self.encoder
