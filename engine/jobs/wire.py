"""One connection to somebody else's server, bounded in time and bytes however it behaves.

Downloads and uploads go over it alone, to an IP address that was checked before. The limits hold on
the wire, so neither slow headers nor odd chunks escape, and whoever may call the job off is asked
twice a second, whatever is waited for.
"""

import io
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from engine.errors import EngineError
from engine.flow import Check
from engine.jobs.addresses import Resolve, Target, resolve_name

T = TypeVar("T")

PIECE = 1 << 16

_STALL_S = 20.0  # the limit without a single byte
_CONNECT_S = 10.0  # the limit for one name, or one of its addresses
_ASK_S = 0.5  # between two looks at whether the job was called off
_AT_ONCE_S = 0.001


def _connect(address: str, port: int, timeout_s: float) -> socket.socket:
    return socket.create_connection((address, port), timeout_s)


@dataclass(frozen=True, slots=True)
class Internet:
    """The functions that reach the Internet. Tests bring their own; rules about addresses stay."""

    resolve: Resolve = resolve_name
    connect: Callable[[str, int, float], socket.socket] = _connect  # address, port, timeout_s
    tls: Callable[[], ssl.SSLContext] = ssl.create_default_context


INTERNET = Internet()


class TooMuch(OSError):
    """Says that more bytes came than are taken."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an exchange may take in all, and who may call it off."""

    ends: float  # by `time.monotonic`
    check: Check

    def left_s(self, most_s: float = _CONNECT_S) -> float:
        """Returns how long to wait for one thing. Raises `TimeoutError`, or what `check` raises."""
        self.check()
        left_s = self.ends - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the time for the whole exchange is over")
        return min(left_s, most_s)

    def wait_for(self, work: Callable[[float], T], most_s: float = _CONNECT_S) -> T:
        """Returns what `work` does in the seconds that it is given; nobody else can interrupt it.

        It has a thread of its own, which is left to itself if the job is called off meanwhile.
        Raises what it raises: an `OSError`, `ValueError` or `EngineError`.
        """
        answers: queue.SimpleQueue[tuple[T] | Exception] = queue.SimpleQueue()
        given_s = self.left_s(most_s)

        def run() -> None:
            try:
                answers.put((work(given_s),))
            except (OSError, ValueError, EngineError) as error:
                answers.put(error)

        threading.Thread(target=run, name="reach", daemon=True).start()
        while True:
            with suppress(queue.Empty):
                answer = answers.get(timeout=_ASK_S)
                if isinstance(answer, Exception):
                    raise answer
                return answer[0]
            self.left_s()

    def repeat(self, sock: socket.socket, attempt: Callable[[], T], stall_s: float) -> T:
        """Tries until something went over the socket, with looks at the time in between."""
        ends = time.monotonic() + stall_s
        while True:
            wait_s = min(self.left_s(_ASK_S), ends - time.monotonic())
            if wait_s <= 0:
                raise TimeoutError("nothing goes over the wire")
            sock.settimeout(wait_s)
            with suppress(TimeoutError):
                return attempt()


class Wire(io.RawIOBase):
    """A socket as a file that ends in an error when time or bytes are used up."""

    def __init__(self, sock: socket.socket, patience: Patience, max_bytes: int) -> None:
        """`max_bytes` is the most that may arrive. The socket stays the caller's to close."""
        self._sock, self._patience, self._left = sock, patience, max_bytes
        self._stall_s = _STALL_S
        self.file: io.BufferedReader = io.BufferedReader(self, PIECE)

    def limit(self, ends: float) -> None:
        """Has everything end at `ends`, if that is before the time that was given."""
        self._patience = Patience(min(ends, self._patience.ends), self._patience.check)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore
        size = self._repeat(partial(self._sock.recv_into, buffer))
        self._left -= size
        if self._left < 0:
            raise TooMuch("more bytes came than are taken")
        return size

    def send(self, data: bytes) -> None:
        """Sends all of it. Raises `OSError`, `TimeoutError` among them, or what `check` raises."""
        left = memoryview(data)
        while left:
            left = left[self._repeat(partial(self._sock.send, left)) :]

    def has_said(self, wait_s: float) -> bool:
        """Tells whether the other side speaks, or hangs up, within `wait_s`. It is read later."""
        if not wait_s:
            ready = select.poll()
            ready.register(self._sock, select.POLLIN)
            if not ready.poll(0):
                return False
        self._stall_s = max(wait_s, _AT_ONCE_S)  # what is ready may be no more than TLS's own
        try:
            self.file.peek(1)
        except TimeoutError:
            return False
        finally:
            self._stall_s = _STALL_S
        return True

    def _repeat(self, attempt: Callable[[], int]) -> int:
        return self._patience.repeat(self._sock, attempt, self._stall_s)


def dial(
    target: Target, addresses: Sequence[str], network: Internet, patience: Patience
) -> socket.socket:
    """Connects to the first of the addresses that answers, in TLS where `target` says so.

    Raises `OSError`, `TimeoutError` and certificates that are refused among them.
    """
    sock = _first(addresses, target.port, network, patience)
    if target.scheme == "http":
        return sock
    try:
        tls = network.tls().wrap_socket(
            sock, server_hostname=target.host, do_handshake_on_connect=False
        )
    except BaseException:
        sock.close()
        raise
    try:
        patience.repeat(tls, tls.do_handshake, _STALL_S)
    except BaseException:
        tls.close()
        raise
    return tls


def _first(
    addresses: Sequence[str], port: int, network: Internet, patience: Patience
) -> socket.socket:
    """Connects to the first address that answers. Raises what the last one raised."""
    *others, last = addresses
    for address in others:
        with suppress(OSError):
            return patience.wait_for(partial(network.connect, address, port))
    return patience.wait_for(partial(network.connect, last, port))
