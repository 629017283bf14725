"""A reply in JSON, of ASCII alone."""

import json

from fastapi.responses import JSONResponse


class Reply(JSONResponse):
    """Tells what a stranger wrote as it is: JSON may hold half of a character, and UTF-8 may not.

    Raises `ValueError` for numbers that JSON has not.
    """

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
