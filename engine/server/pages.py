"""Writes the plain page of the routes: HTML alone, with nothing from elsewhere and no script."""

from collections.abc import Mapping
from html import escape
from typing import Any

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>SCAIL engine: the routes</title><h1>SCAIL engine: the routes</h1>
<p>All of it: docs/serve.md of the project. For programs:
<a href="/openapi.json">openapi.json</a>.</p>
"""


def routes_page(schema: Mapping[str, Any]) -> str:
    """Lists the routes of an OpenAPI schema."""
    parts = [_HEAD]
    for path, methods in schema["paths"].items():
        for method, told in methods.items():
            parts.append(f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>")
            for line in str(told.get("description", "")).split("\n\n"):
                parts.append(f"<p>{escape(line)}</p>")
    return "\n".join(parts)
