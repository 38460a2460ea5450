"""An MkDocs hook: pages have edit links if the address of the repository is known."""

from typing import Any


def on_config(config: Any) -> Any:
    """MkDocs has read its configuration; without an address an edit link would lead nowhere."""
    config["edit_uri"] = "edit/main/docs/" if config["repo_url"] else None
    return config
