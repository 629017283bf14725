"""Lets in what the owner of this machine sends, and nothing that a web site makes a browser send.

Any page that a browser shows may send requests to loopback, and a name that its owner points at
127.0.0.1 makes them look like this service's own ("DNS rebinding"). So `Host` must be a name of
this machine, `Origin` this service, and beyond loopback each call needs the token.
"""

import hmac
import ipaddress
import json
from collections.abc import Callable, Mapping
from typing import TypeAlias
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.house import House
from engine.server.refused import Refused

Headers: TypeAlias = Mapping[str, str]

_PORTS = {"http": 80, "https": 443}
_OWN_SITE = ("same-origin", "none")  # what a browser says of its own page, or of the address bar
_LEAST = frozenset({"/health"})  # tells strangers whether the service is there, and no more

SECURITY: tuple[tuple[bytes, bytes], ...] = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"media-src 'self' blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_NOT_KEPT = (b"cache-control", b"no-store")


class Guard:
    """Asks for Host, Origin and token before the service sees a request."""

    def __init__(self, app: ASGIApp, house: House, is_open: Callable[[str], bool]) -> None:
        """Guards `app`. `is_open` tells of a path that it needs no token: the page's own files."""
        self._app, self._house, self._is_open = app, house, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # there are no web sockets here

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *SECURITY]
                if not any(name.lower() == _NOT_KEPT[0] for name, _ in headers):
                    headers.append(_NOT_KEPT)
                message = {**message, "headers": headers}
            await send(message)

        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        scope["state"]["is_known"] = is_known(headers, self._house)
        try:
            check_host(headers, self._house)
            check_sender(headers, scope["method"], scope["path"])
            if scope["path"] not in _LEAST and not self._is_open(scope["path"]):
                check_token(headers, self._house)
        except Refused as refusal:
            await _tell(refusal, hardened)
            return
        await self._app(scope, receive, hardened)


def check_host(headers: Headers, house: House) -> None:
    """Raises `Refused` for a request to a machine of another name than this one has."""
    name = _name(headers.get("host", ""))
    if name in house.names or (house.takes_numeric and _is_numeric(name)):
        return
    raise Refused(
        421, "foreign_host",
        "This service does not go by that name. Ask it as localhost, or list the name in "
        "SCAIL_HOSTS where the service is started.",
    )  # fmt: skip


def check_sender(headers: Headers, method: str, path: str) -> None:
    """Raises `Refused` for a request that another web site has a browser send."""
    origin = headers.get("origin")
    if origin is not None and not _is_same(origin, headers.get("host", "")):
        raise _foreign()
    if headers.get("sec-fetch-site", "none") in _OWN_SITE:
        return
    is_page = method == "GET" and headers.get("sec-fetch-dest") == "document" and path == "/"
    if not is_page:
        raise _foreign()


def check_token(headers: Headers, house: House) -> None:
    """Raises `Refused` for a request without the token, where there is one."""
    if not is_known(headers, house):
        raise Refused(
            401, "no_token",
            "A token is needed: send the header Authorization: Bearer TOKEN, with the value of "
            "SCAIL_TOKEN where the service was started.",
        )  # fmt: skip


def is_known(headers: Headers, house: House) -> bool:
    """Tells whether a request has the token, comparing all of it whatever it is."""
    if house.token is None:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    found = given.strip().encode("latin-1")
    return hmac.compare_digest(found, house.token.encode()) and scheme.lower() == "bearer"


def _foreign() -> Refused:
    return Refused(
        403, "foreign_origin", "Another web site asks for this; only this service's own page may."
    )


def _name(host: str) -> str:
    """Returns the name in a Host header, without its port and the brackets of a numeric one."""
    try:
        parts = urlsplit(f"//{host}")
        name = parts.hostname or ""
        _ = parts.port  # raises for one that is none
    except ValueError:
        return ""
    return "" if "@" in host or "/" in host else name.lower().removesuffix(".")


def _is_numeric(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_same(origin: str, host: str) -> bool:
    """Tells whether an Origin is the host and port that was asked, by http or, outside, https."""
    try:
        parts, asked = urlsplit(origin), urlsplit(f"//{host}")
        usual = _PORTS.get(parts.scheme)
        if usual is None or parts.hostname is None or parts.path:
            return False
        return (parts.hostname, parts.port or usual) == (asked.hostname, asked.port or usual)
    except ValueError:
        return False


async def _tell(refusal: Refused, send: Send) -> None:
    body = json.dumps({"error": str(refusal), "code": refusal.code}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
