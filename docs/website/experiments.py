"""An MkDocs hook: the README and notes of experiments/, which pages link to, become pages of the site below experiments/."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = "experiments"


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks for the files of the site."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / FOLDER).rglob("*.md")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs is about to render a page: experiments/ is in the root of the site, and beside docs/ in the repository."""
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    return re.sub(rf"\]\(((?:\.\./)*)\.\./{FOLDER}/", rf"](\1{FOLDER}/", markdown)
