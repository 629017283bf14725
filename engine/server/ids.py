"""Makes the ids of jobs and uploads: 128 random bits, so that whoever knows one was told it."""

import hashlib
import re
import secrets

_BYTES = 16
_ID = re.compile(r"[0-9a-f]{32}")
_BROWSER = re.compile(r"[0-9a-f]{32,64}")


def make_id() -> str:
    return secrets.token_hex(_BYTES)


def is_id(text: str) -> bool:
    """Tells whether a text of a stranger may be one of our ids: it then names no other file."""
    return _ID.fullmatch(text) is not None


def owner_of(header: str | None) -> str | None:
    """Returns whose a request is, from the secret that a browser made; None for nobody's.

    The secret itself is not kept: who reads the state folder cannot pass for the browser.
    """
    if header is None or not _BROWSER.fullmatch(header):
        return None
    return hashlib.sha256(header.encode("ascii")).hexdigest()
