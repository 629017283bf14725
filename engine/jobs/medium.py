"""Tells what a client's text for a medium is: an address, the name of a file, or base64.

Clients put one kind into the field of another, quote what they copied, or send what a browser or
ComfyUI calls a file. Where the text says what it is, it is taken as that; it meets the same checks
as in its own field. What lies beyond this worker is refused here, with what to send instead.
"""

import re
from urllib.parse import unquote

from engine.errors import BadRequest
from engine.jobs.job import Given, MediumKind

_AROUND = " \t\r\n\v\f\ufeff\u200b\u00a0"  # blanks, and two marks that editors leave unseen
_QUOTES = ('""', "''", "``", "<>")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]{1,15}):", re.ASCII)
# How ComfyUI says which of its folders a file is in
_FOLDER = re.compile(r"\s*\[(input|output|temp)\]", re.ASCII | re.IGNORECASE)
_FOLDER_CHARS = 40  # from the end of a name, where a folder is looked for
_OF_A_STORE = ("s3", "gs", "az", "abfs", "r2", "hf")
_OF_A_BROWSER = ("blob", "filesystem", "content", "cid")
_SHORTEST_BASE64 = 64  # shorter text may be a name that lacks its scheme
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64}", re.ASCII)


def read_medium(field: str, kind: MediumKind, text: str) -> Given:
    """Reads the text of a field. Raises `BadRequest` for what names nothing that can be fetched."""
    text = _bare(text)
    scheme = found[1].lower() if (found := _SCHEME.match(text)) else ""
    if scheme == "data":
        return Given(field, "base64", text)
    if scheme in ("http", "https"):
        return Given(field, "url", text)
    if scheme == "file" and kind != "base64":
        return Given(field, "path", _input_file(field, _of_file_address(field, text)))
    if scheme in _OF_A_STORE and text.startswith("//", len(scheme) + 1):
        raise BadRequest(
            f"{field} is an address of a store that needs its keys ({scheme}:); send a signed "
            "https address of the file."
        )
    if scheme in _OF_A_BROWSER and kind != "path":
        raise BadRequest(
            f"{field} is an address that one program knows ({scheme}:); send the file in base64 or "
            "as an https address."
        )
    if kind == "url" and len(text) >= _SHORTEST_BASE64 and _BASE64.match(text):
        raise BadRequest(f"{field} is no address but looks like base64; send that in _base64.")
    return Given(field, kind, _input_file(field, text) if kind == "path" else text)


def _bare(text: str) -> str:
    """Takes away what people paste around a text: blanks, quotes, and blanks in them."""
    text = text.strip(_AROUND)
    if len(text) > 1 and text[0] + text[-1] in _QUOTES:
        text = text[1:-1].strip(_AROUND)
    return text


def _of_file_address(field: str, text: str) -> str:
    """Returns the path of a file: address on this machine."""
    path = text[len("file:") :]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise BadRequest(f"{field} is a file of another machine; send an https address.")
        path = slash + rest
    return unquote(path)


def _input_file(field: str, name: str) -> str:
    """Takes away the folder that ComfyUI writes behind a name. Only inputs are files here."""
    found = _FOLDER.search(name, max(0, len(name) - _FOLDER_CHARS))
    if found is None or found.end() != len(name):
        return name
    if (folder := found[1].lower()) != "input":
        raise BadRequest(
            f"{field} names a file in ComfyUI's {folder} folder, which is not here; put the file "
            "into an input folder of this worker, or send it as an address or in base64."
        )
    return name[: found.start()]
