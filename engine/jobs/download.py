"""Downloads from an address, piece by piece, however badly the other side behaves.

Every host, those of redirects too, is checked by `addresses` and asked at the very IP address that
was checked, over a bounded `wire`. `http.client` reads the answer and nothing else of it is used:
it has no proxies, cookies, redirects and decompression that would have to be switched off.
"""

import logging
import socket
import ssl
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPException, HTTPResponse
from urllib.parse import urljoin

from engine.errors import BadMedia
from engine.flow import Check, go_on
from engine.jobs.addresses import Target, parse_address, public_addresses
from engine.jobs.wire import PIECE, Internet, Patience, TooMuch, Wire, dial

log = logging.getLogger(__name__)

TOTAL_S = 120.0  # the limit for one file, with all redirects

_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_BESIDE_BODY = 1 << 20  # bytes of headers and chunk marks
_REASON_CHARS = 200
_LOCATION_CHARS = 8192  # more than any address that is asked
_MIB = 2**20


def download(
    text: object,
    field: str,
    max_bytes: int,
    network: Internet,
    timeout_s: float,
    check: Check = go_on,
) -> Generator[bytes, None, None]:
    """Yields the body at an http or https address; `field` is its name in the job.

    Raises `BadRequest` for an address that is not asked and `BadMedia` for what came of asking,
    with the host in the sentence and never the rest of the address; or what `check` raises.
    """
    start = time.monotonic()
    patience = Patience(start + timeout_s, check)
    most = max_bytes + max_bytes // 8 + _BESIDE_BODY
    asked, target = field, parse_address(text, field)
    for _ in range(_MAX_REDIRECTS + 1):
        with closing(_dial(target, asked, network, patience)) as sock:
            with _on_the_wire(field, target.host, max_bytes):
                response = _ask(Wire(sock, patience, most), sock, target)
            if response.status not in _REDIRECTS:
                yield from _body(response, target, field, max_bytes)
                log.info("%s: %s in %.1f s", field, target.host, time.monotonic() - start)
                return
            asked = f"the redirect of {field}"
            target = parse_address(_joined(target, response, asked), asked)
    raise BadMedia(f"{field} redirects more than {_MAX_REDIRECTS} times; send the last address.")


def too_large(field: str, max_bytes: int) -> BadMedia:
    return BadMedia(f"{field} is too large; at most {max_bytes / _MIB:.1f} MiB are taken.")


@contextmanager
def _on_the_wire(field: str, host: str, max_bytes: int) -> Iterator[None]:
    """Turns what sockets and `http.client` raise into a sentence that names the host."""
    try:
        yield
    except TooMuch as error:
        raise too_large(field, max_bytes) from error
    except TimeoutError as error:
        raise BadMedia(f"{field}: {host} takes too long; send the file from elsewhere.") from error
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message[:_REASON_CHARS]
        raise BadMedia(f"{field}: the certificate of {host} is refused: {reason}.") from error
    except (OSError, HTTPException, ValueError) as error:
        # http.client lets a ValueError through for a chunk of negative size
        raise BadMedia(
            f"{field}: the connection to {host} failed or broke off ({type(error).__name__})."
        ) from error


def _dial(target: Target, field: str, network: Internet, patience: Patience) -> socket.socket:
    """Connects to one of the checked addresses."""
    with _on_the_wire(field, target.host, 0):
        addresses = patience.wait_for(partial(public_addresses, target, field, network.resolve))
        return dial(target, addresses, network, patience)


def _ask(wire: Wire, sock: socket.socket, target: Target) -> HTTPResponse:
    request = (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: scail-engine\r\n"
        "Accept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    wire.send(request.encode("ascii"))
    response = HTTPResponse(sock, method="GET")
    response.fp.close()  # the socket's own file, which knows no limits
    response.fp = wire.file
    response.begin()
    return response


def _joined(target: Target, response: HTTPResponse, field: str) -> str:
    try:
        location = response.getheader("Location", "").encode("latin-1").decode()
        return urljoin(target.url, location[:_LOCATION_CHARS])
    except ValueError:  # the cause would quote the address
        raise BadMedia(f"{field} is not a well-formed address.") from None


def _body(response: HTTPResponse, target: Target, field: str, max_bytes: int) -> Iterator[bytes]:
    if response.status != 200:
        raise BadMedia(f"{field}: {target.host} answers {response.status} and not with the file.")
    if response.length is not None and response.length > max_bytes:
        raise too_large(field, max_bytes)
    buffer = bytearray(PIECE)
    while True:
        with _on_the_wire(field, target.host, max_bytes):
            size = response.readinto(buffer)
        if not size:
            break
        yield bytes(memoryview(buffer)[:size])
    if response.length:
        raise BadMedia(f"{field}: {target.host} sent less than it announced; try again.")
