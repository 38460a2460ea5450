"""An MkDocs hook: lists of names in api.md become entries of the reference with their docstrings.

A list is a bullet that begins with a package: "- `aif_jax.train`: `init_state`, `loop`". A repository shows it as it is.
"""

from __future__ import annotations

import re
from typing import Any

PLACES = {
    "aif_jax.check": "aif_jax.readers.check.check",
    "aif_jax.read": "aif_jax.readers.read.read",
    "aif_jax.read_cascade": "aif_jax.readers.cascade.read_cascade",
    "aif_jax.evaluate": "aif_jax.train.evaluate.evaluate",
    "aif_jax.train.loop": "aif_jax.train.loop.loop",
    "aif_jax.refresh": "aif_jax.refreshing.run.refresh",
    "aif_jax.blocks.block": "aif_jax.blocks.block.block",
}
"""Where a name is defined, if a module of the same name hides it from MkDocs."""
MEMBERS = {"aif_jax.train.edits": ["chain", "svd_term", "popularity_correction", "unseen_items", "calibration"]}
"""Members that are shown of a module without `__all__`."""
LIST = re.compile(r"^- `(aif_jax[\w.]*)`: ((?:[`\w, ]+\n(?:  )?)+)", re.M)


def names(markdown: str) -> list[str]:
    """Full names of the lists of a page, in their order."""
    return [f"{package}.{name}" for package, text in LIST.findall(markdown) for name in re.findall(r"`(\w+)`", text)]


def entry(name: str) -> str:
    """The directive of mkdocstrings for a name."""
    options = ([f"heading: {name}"] if name in PLACES else []) + (
        [f"members: [{', '.join(MEMBERS[name])}]"] if name in MEMBERS else []
    )
    anchor = f'<a id="{name}"></a>\n\n' * (name in PLACES)  # links have the public name
    return f"{anchor}::: {PLACES.get(name, name)}\n" + f"    options: {{{', '.join(options)}}}\n" * bool(options)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs is about to render a page."""
    if page.file.src_uri != "api.md":
        return markdown
    return LIST.sub(lambda found: "".join(map(entry, names(found[0]))) + "\n", markdown)
