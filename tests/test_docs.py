"""Every code block of README and tutorials runs as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest

import aif_jax as aif
from tests import demo

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted(ROOT.glob("docs/tutorial_*.md"))
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(page)
    assert code
    namespace = {"__name__": "tutorial"}
    for block in code:
        exec(compile(block, str(page), "exec"), namespace)


def test_readme_block_runs():
    config = aif.tiny()
    items = demo.items(config, 8)
    namespace = {"config": config, "user_features": demo.user(config), "items": items, "catalogue": items}
    (block,) = blocks(ROOT / "README.md")
    exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (8,) and np.isfinite(namespace["logits"]).all()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_no_dead_link(page):
    """Relative links lead to a file that is there."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_paper_map_names_things_that_exist():
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
