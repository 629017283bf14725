"""Downloads from an address, piece by piece, however badly the other side behaves.

Every host, those of redirects too, is checked by `addresses` and asked at the very IP address that
was checked. Time and bytes are limited on the wire, so neither slow headers nor odd chunks escape.
`http.client` reads the answer and nothing else of it is used: it has no proxies, cookies, redirects
and decompression that would have to be switched off, and it takes a socket that is already there.
"""

import io
import logging
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.parse import urljoin

from engine.errors import BadMedia
from engine.jobs.addresses import Resolve, Target, parse_address, public_addresses, resolve_name

log = logging.getLogger(__name__)

TOTAL_S = 120.0  # the limit for one file, with all redirects

_STALL_S = 20.0  # the limit without a single byte
_CONNECT_S = 10.0  # the limit for one name, or one of its addresses
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16
_BESIDE_BODY = 1 << 20  # bytes of headers and chunk marks
_MIB = 2**20


def _connect(address: str, port: int, timeout_s: float) -> socket.socket:
    return socket.create_connection((address, port), timeout_s)


@dataclass(frozen=True, slots=True)
class Internet:
    """The functions that reach the Internet. Tests bring their own; rules about addresses stay."""

    resolve: Resolve = resolve_name
    connect: Callable[[str, int, float], socket.socket] = _connect  # address, port, timeout_s
    tls: Callable[[], ssl.SSLContext] = ssl.create_default_context


INTERNET = Internet()


def download(
    text: object, field: str, max_bytes: int, network: Internet, timeout_s: float
) -> Generator[bytes, None, None]:
    """Yields the body at an http or https address; `field` is its name in the job.

    Raises `BadRequest` for an address that is not asked and `BadMedia` for what came of asking,
    with the host in the sentence and never the rest of the address.
    """
    start = time.monotonic()
    asked, target = field, parse_address(text, field)
    for _ in range(_MAX_REDIRECTS + 1):
        with closing(_dial(target, asked, network, start + timeout_s)) as sock:
            wire = _Wire(sock, field, start + timeout_s, max_bytes)
            response = _ask(sock, wire, target, field)
            if response.status not in _REDIRECTS:
                yield from _body(response, target, field, max_bytes)
                log.info("%s: %s in %.1f s", field, target.host, time.monotonic() - start)
                return
            asked = f"the redirect of {field}"
            target = parse_address(_joined(target, response, asked), asked)
    raise BadMedia(f"{field} redirects more than {_MAX_REDIRECTS} times; send the last address.")


def too_large(field: str, max_bytes: int) -> BadMedia:
    return BadMedia(f"{field} is too large; at most {max_bytes / _MIB:.1f} MiB are taken.")


class _Wire(io.RawIOBase):
    """A socket as a file that ends in an error when time or bytes are used up."""

    def __init__(self, sock: socket.socket, field: str, deadline: float, max_bytes: int) -> None:
        self._sock, self._field, self._deadline = sock, field, deadline
        self._max_bytes = max_bytes
        self._left = max_bytes + max_bytes // 8 + _BESIDE_BODY

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore
        self._sock.settimeout(_wait_s(self._deadline, _STALL_S))
        size = self._sock.recv_into(buffer)
        self._left -= size
        if self._left < 0:
            raise too_large(self._field, self._max_bytes)
        return size


def _wait_s(deadline: float, longest_s: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the time for the whole file is over")
    return min(left_s, longest_s)


@contextmanager
def _on_the_wire(field: str, host: str) -> Iterator[None]:
    """Turns what sockets and `http.client` raise into a sentence that names the host."""
    try:
        yield
    except TimeoutError as error:
        raise BadMedia(f"{field}: {host} takes too long; send the file from elsewhere.") from error
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message
        raise BadMedia(f"{field}: the certificate of {host} is refused: {reason}.") from error
    except (OSError, HTTPException, ValueError) as error:
        # http.client lets a ValueError through for a chunk of negative size
        raise BadMedia(
            f"{field}: the connection to {host} failed or broke off ({type(error).__name__})."
        ) from error


def _dial(target: Target, field: str, network: Internet, deadline: float) -> socket.socket:
    """Connects to one of the checked addresses, in TLS where the address says so."""
    with _on_the_wire(field, target.host):
        wait_s = _wait_s(deadline, _CONNECT_S)
        addresses = public_addresses(target, field, network.resolve, wait_s)
        sock = _first(addresses, target.port, network, deadline)
        if target.scheme == "http":
            return sock
        try:
            sock.settimeout(_wait_s(deadline, _STALL_S))
            return network.tls().wrap_socket(sock, server_hostname=target.host)
        except BaseException:
            sock.close()
            raise


def _first(
    addresses: Sequence[str], port: int, network: Internet, deadline: float
) -> socket.socket:
    """Connects to the first address that answers. Raises what the last one raised."""
    *others, last = addresses
    for address in others:
        with suppress(OSError):
            return network.connect(address, port, _wait_s(deadline, _CONNECT_S))
    return network.connect(last, port, _wait_s(deadline, _CONNECT_S))


def _ask(sock: socket.socket, wire: _Wire, target: Target, field: str) -> HTTPResponse:
    request = (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: scail-engine\r\n"
        "Accept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    with _on_the_wire(field, target.host):
        sock.settimeout(_STALL_S)
        sock.sendall(request.encode("ascii"))
        response = HTTPResponse(sock, method="GET")
        response.fp.close()  # the socket's own file, which knows no limits
        response.fp = io.BufferedReader(wire, _PIECE)
        response.begin()
    return response


def _joined(target: Target, response: HTTPResponse, field: str) -> str:
    try:
        location = response.getheader("Location", "").encode("latin-1").decode()
        return urljoin(target.url, location)
    except ValueError:  # the cause would quote the address
        raise BadMedia(f"{field} is not a well-formed address.") from None


def _body(response: HTTPResponse, target: Target, field: str, max_bytes: int) -> Iterator[bytes]:
    if response.status != 200:
        raise BadMedia(f"{field}: {target.host} answers {response.status} and not with the file.")
    if response.length is not None and response.length > max_bytes:
        raise too_large(field, max_bytes)
    buffer = bytearray(_PIECE)
    while True:
        with _on_the_wire(field, target.host):
            size = response.readinto(buffer)
        if not size:
            break
        yield bytes(memoryview(buffer)[:size])
    if response.length:
        raise BadMedia(f"{field}: {target.host} sent less than it announced; try again.")
