"""An MkDocs hook: LaTeX of a page becomes MathML, which browsers draw by themselves; a repository draws the LaTeX.

Lines between two lines of "$$", and inline $`...`$, the form in which underscores and stars are safe.
"""

import re
from typing import Any


def mathml(latex: str, display: str) -> str:
    """One formula as an element of HTML."""
    from latex2mathml.converter import convert

    return convert(latex.strip(), display=display)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs is about to render a page."""
    markdown = re.sub(
        r"^\$\$\n(.*?)^\$\$$", lambda found: f"<div>{mathml(found[1], 'block')}</div>", markdown, flags=re.S | re.M
    )
    # in a span: Markdown takes a line that begins with another element for a block
    return re.sub(r"\$`(.*?)`\$", lambda found: f"<span>{mathml(found[1], 'inline')}</span>", markdown)
