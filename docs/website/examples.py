"""Shows "Example:" of a docstring as code: Griffe knows only "Examples:" and takes the other for a note in prose."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section in every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Receives each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
