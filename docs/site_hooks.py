"""Hooks of mkdocs. Links to files outside docs/ are replaced by links to the repository; the files must exist."""

import logging
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\]\(\.\./(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replaces `](../path)` by the file's address in the repository."""
    root = Path(config["config_file_path"]).parent

    def address(link: re.Match[str]) -> str:
        path = link["path"].rstrip("/")
        if not (root / path).exists():
            _log.warning("%s: there is no %s", page.file.src_path, path)
        kind = "tree" if (root / path).is_dir() else "blob"
        return f"]({config['extra']['repository']}/{kind}/main/{path}{link['anchor'] or ''})"

    return _LINK.sub(address, markdown)
