"""Finds the page's own files: those below one folder, under plain names."""

import re
from collections.abc import Mapping
from pathlib import Path

TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
}
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")  # never begins with a dot
_PARTS = 6
_FIRST = "index.html"


def page_file(path: str, folder: Path) -> Path | None:
    """Finds the file of the page at a path of an address; None if it names none."""
    parts = [_FIRST] if path == "/" else path.removeprefix("/").split("/")
    if len(parts) > _PARTS or not all(_PART.fullmatch(part) for part in parts):
        return None
    found = folder.joinpath(*parts)
    return found if found.suffix in TYPES and found.is_file() else None
