"""Docstrings as Griffe wants them: it knows "Examples:" alone, and one argument or attribute a line."""

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"( +)(\w+(?:, \w+)+)(: .*)")


def one_a_line(text: str) -> str:
    """A docstring in which each of "low, high: bounds" has its own line, in the sections of arguments and attributes."""
    made: list[str] = []
    block: list[str] = []  # lines of an entry for several names
    names, inside = [], False

    def end() -> None:
        for name in names:
            made.extend([block[0].replace("\0", name), *block[1:]])
        names.clear()
        block.clear()

    for line in text.splitlines():
        if names and line.startswith(" " * (len(block[0]) - len(block[0].lstrip()) + 1)):
            block.append(line)
            continue
        end()
        inside = line in ("Args:", "Attributes:") or (inside and (not line or line.startswith(" ")))
        found = SEVERAL.fullmatch(line) if inside else None
        if found:
            names.extend(found[2].split(", "))
            block.append(f"{found[1]}\0{found[3]}")
        else:
            made.append(line)
    end()
    return "\n".join(made)


class Examples(griffe.Extension):
    """Edits every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Receives each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = one_a_line(re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M))
