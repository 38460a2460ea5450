"""Parts that a config holds as values, its blocks and its head: frozen dataclasses that its JSON names by class."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from aif_jax import layers
from aif_jax.checks import expect, expect_types

Class = TypeVar("Class", bound=type)


class Registry(dict[str, type]):
    """Classes of parts by name; `kind`, "block" or "head", is the key of the class name in JSON."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def add(self, cls: Class, *bases: type) -> Class:
        """Make a class a frozen dataclass that checks the types of its fields, and register it; a Flax module stays as it is.

        Raises TypeError for a class of none of the `bases`, ValueError if another class has its name.
        """
        got = f"{cls.__bases__}"
        got += "; give a Linen module that returns nnx.bridge.to_linen(...)(features)" if ".nnx." in got else ""
        expect(issubclass(cls, bases), cls.__name__, f"a subclass of one of {bases}", got, error=TypeError)
        if "__dataclass_fields__" not in vars(cls):  # which a Flax module has
            expect("__init__" not in vars(cls), cls.__name__, "fields such as `width: int = 4`", "its own `__init__`")
            own_checks = getattr(cls, "__post_init__", lambda self: None)

            def check(self: Any) -> None:
                expect_types(self)
                own_checks(self)

            cls.__post_init__ = check  # type: ignore[attr-defined]
            cls = dataclasses.dataclass(frozen=True)(cls)
        expect(cls.__hash__, cls.__name__, f"no `@dataclass`, which `@{self.kind}` adds", "a mutable one", error=TypeError)
        fields, base = vars(cls)["__dataclass_fields__"], bases[0]
        taken = [f for f in fields if f == self.kind or callable(getattr(base, f, 0)) or type(getattr(cls, f, 0)) is property]
        expect(not taken, cls.__name__, f"no field {self.kind!r} or named as a method, or a property without a default", taken)
        known = self.setdefault(cls.__name__, cls)
        same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        expect(same, f"{self.kind} {cls.__name__!r}", "a new name", f"one that {known.__module__} has registered")
        self[cls.__name__] = cls
        return cls

    def check(self, part: Any, name: str) -> None:
        """Raise TypeError for a part whose class is not registered, ValueError for fields that JSON does not give back."""
        expected = f"a value of a class made by the decorator `{self.kind}`, such as one of {sorted(self)}"
        known = self.get((part if isinstance(part, type) else type(part)).__name__)
        if known:  # a class in place of its value, or a value made before the class was defined again
            expected = f"a value of {known.__name__} as it was defined last; make it by {known.__name__}(...)"
        expect(type(part) in self.values(), name, expected, repr(part).partition("\n")[0], error=TypeError)
        for field, entry in plain(part).items():
            flat = isinstance(getattr(part, field), str | int | float | tuple | None)
            same = flat and json.loads(json.dumps(entry, default=repr)) == entry
            expect(same, f"{type(part).__name__}.{field}", "a number, boolean, string or flat tuple of these", repr(entry))

    def to_json(self, part: Any) -> dict[str, Any]:
        """Return the part as plain JSON values."""
        return {self.kind: type(part).__name__} | plain(part)

    def from_json(self, value: Mapping[str, Any]) -> Any:
        """Return the part that `to_json` wrote; ValueError for a class that is not registered, or fields that it lacks."""
        given = value if isinstance(value, Mapping) else {}
        name = given.get(self.kind)
        way_out = f"import the module with its `@{self.kind}`" if name else f'give {{"{self.kind}": NAME, FIELD: VALUE}}'
        expect(name in self, self.kind, f"one of {sorted(self)}", f"{name or value!r}; {way_out}")
        fields = {key: entry for key, entry in given.items() if key != self.kind}
        return from_plain(self[str(name)], fields, f"{self.kind} {name!r}")


BLOCKS, HEADS = Registry("block"), Registry("head")


def plain(value: Any, *, if_set: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass or a Flax module, tuples as lists.

    Those named by `if_set` are left out where they are empty, so that versions without them stay what they were.
    """
    entries = ((name, getattr(value, name)) for name in _fields(type(value)))
    return {name: list(entry) if isinstance(entry, tuple) else entry for name, entry in entries if name not in if_set or entry}


def from_plain(cls: Any, value: Mapping[str, Any], name: str) -> Any:
    """Return the dataclass of these fields, lists as tuples; ValueError for fields that it lacks."""
    known = set(_fields(cls))
    expect(value.keys() <= known, name, f"fields among {sorted(known)}", sorted(value.keys() - known))
    return cls(**{key: tuple(entry) if isinstance(entry, list) else entry for key, entry in value.items()})


def _fields(cls: Any) -> list[str]:
    """Return names of the fields of a dataclass, in order, less those that Flax adds to a module."""
    added = ("parent", "name") if issubclass(cls, layers.Module) else ()
    return [field.name for field in dataclasses.fields(cls) if field.name not in added]
