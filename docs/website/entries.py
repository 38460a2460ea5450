"""An MkDocs hook: each section of api.md becomes a page `api/SECTION.md` with the docstrings of the names that it lists.

A list is a bullet that begins with a package: "- `aif_jax.train`: `init_state`, `loop`". A repository shows it as it is; on the
site the names in it, and links such as `api.md#aif_jax.fit`, lead to the pages.
"""

from __future__ import annotations

import re
from pathlib import Path
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
MEMBERS = {"aif_jax.train.edits": ["svd_term", "popularity_correction", "unseen_items", "calibration"]}
"""Members that are shown of a module without `__all__`."""
LIST = re.compile(r"^- `(aif_jax[\w.]*)`: ((?:[`\w, ]+\n(?:  )?)+)", re.M)
API = Path(__file__).resolve().parent.parent / "api.md"


def names(markdown: str) -> list[str]:
    """Full names of the lists of a page, in their order."""
    return [f"{package}.{name}" for package, text in LIST.findall(markdown) for name in re.findall(r"`(\w+)`", text)]


def rooms(markdown: str) -> dict[str, str]:
    """The sections of api.md, heading included, by the name of their page."""
    parts = re.split(r"^(?=## )", markdown, flags=re.M)[1:]
    return {"api/" + re.sub(r"\W+", "-", part.splitlines()[0][3:].lower()) + ".md": part[1:] for part in parts}


def pages(markdown: str) -> dict[str, str]:
    """The page of each name of api.md."""
    return {name: page for page, part in rooms(markdown).items() for name in names(part)}


def entry(name: str) -> str:
    """The directive of mkdocstrings for a name."""
    options = ([f"heading: {name}"] if name in PLACES else []) + (
        [f"members: [{', '.join(MEMBERS[name])}]"] if name in MEMBERS else []
    )
    anchor = f'<a id="{name}"></a>\n\n' * (name in PLACES)  # links have the public name
    return f"{anchor}::: {PLACES.get(name, name)}\n" + f"    options: {{{', '.join(options)}}}\n" * bool(options)


def expanded(markdown: str) -> str:
    """The text with an entry in place of each name of a list."""
    return LIST.sub(lambda found: "".join(map(entry, names(found[0]))) + "\n", markdown)


def linked(markdown: str, page_of: dict[str, str]) -> str:
    """api.md with a link in place of each name of a list."""

    def links(found: re.Match[str]) -> str:
        return re.sub(r"`(\w+)`(?=[,\n])", lambda name: f"[`{name[1]}`](api.md#{found[1]}.{name[1]})", found[0])

    return led(LIST.sub(links, markdown), page_of)


def led(markdown: str, page_of: dict[str, str]) -> str:
    """A page whose links to names of api.md lead to the pages that have them."""

    def page(name: str) -> str:
        return page_of.get(name) or page_of[name.rpartition(".")[0]]  # an attribute is on the page of its class

    return re.sub(
        r"\(((?:\.\./)*)api\.md#(aif_jax[\w.]+)\)", lambda found: f"({found[1]}{page(found[2])}#{found[2]})", markdown
    )


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks for the files of the site: adds a page for each section."""
    from mkdocs.structure.files import File

    for name, part in rooms(API.read_text(encoding="utf-8")).items():
        content = re.sub(r"\]\((?!https?:)", "](../", expanded(part))
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs is about to render a page."""
    page_of = pages(API.read_text(encoding="utf-8"))
    return (linked if page.file.src_uri == "api.md" else led)(markdown, page_of)
