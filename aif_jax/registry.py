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
        reserved = (self.kind, "revision")
        taken = [f for f in fields if f in reserved or callable(getattr(base, f, 0)) or type(getattr(cls, f, 0)) is property]
        expected = f"no field named {self.kind!r} or as a method, no property without a default, `revision = 1` without a type"
        expect(not taken, cls.__name__, expected, taken)
        revision = getattr(cls, "revision", 0)  # which a Flax module may lack
        expect(type(revision) is int, f"{cls.__name__}.revision", "a whole number", repr(revision))
        cls.revision = revision  # type: ignore[attr-defined]
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
        named = isinstance(part, layers.Module) and part.name is not None  # which JSON would lack
        expect(not named, name, "a Flax module without a name", repr(getattr(part, "name", "")))
        for field, entry in plain(part).items():
            flat = isinstance(getattr(part, field), str | int | float | tuple | None)
            same = flat and json.loads(json.dumps(entry, default=repr)) == entry
            expect(same, f"{type(part).__name__}.{field}", "a number, boolean, string or flat tuple of these", repr(entry))

    def to_json(self, part: Any) -> dict[str, Any]:
        """Return the part as plain JSON values, with the revision of its class if that is not 0."""
        return {self.kind: type(part).__name__} | ({"revision": part.revision} if part.revision else {}) | plain(part)

    def from_json(self, value: Mapping[str, Any], *, by_hand: bool = False) -> Any:
        """Return the part that `to_json` wrote, or somebody who leaves out the revision of the class.

        Raises ValueError for a class that is not registered, lacks a field or has another revision.
        """
        given = value if isinstance(value, Mapping) else {}
        name = given.get(self.kind)
        way_out = f"import the module with its `@{self.kind}`" if name else f'give {{"{self.kind}": NAME, FIELD: VALUE}}'
        expect(name in self, self.kind, f"one of {sorted(self)}", f"{name or value!r}; {way_out}")
        cls = self[str(name)]
        revision = given.get("revision", cls.revision if by_hand else 0)
        got = f"{revision!r}; use the code that wrote it"
        expect(revision == cls.revision, f"{self.kind} {name!r}", f"revision {cls.revision}, that of the class", got)
        fields = {key: entry for key, entry in given.items() if key not in (self.kind, "revision")}
        return from_plain(cls, fields, f"{self.kind} {name!r}")


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
