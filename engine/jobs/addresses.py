"""Checks the addresses that jobs name: http or https, usual ports, public hosts alone.

An address comes from a stranger, and the worker stands inside somebody's network: what it can
reach there (metadata services, neighbours, itself) must stay out of reach; see
docs/reference/runpod.md F.9. An address is taken apart once, here; what is asked later is built
from the parts that were checked, so no second parser can read it otherwise. The tables are ours and
not `is_global`, whose answers differ between releases of Python.
"""

import queue
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from typing import Literal
from urllib.parse import SplitResult, quote, urlsplit

from engine.errors import BadMedia, BadRequest

Resolve = Callable[[str, int, float], Sequence[str]]  # host, port, timeout_s -> addresses

_PORTS = {"http": 80, "https": 443}
_MAX_CHARS = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_MAX_HOST = 253
# Characters of a path or query that are kept as they are; "%" is among them, since what is escaped
# already must not be escaped twice.
_KEPT = "/%:@!$&'()*+,;=-._~?[]|"
# Names with one of these last labels are no Internet names (RFC 6761, 6762, 8375, common use).
_HOME_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "arpa")

# IANA's special-purpose registry, and one address that a cloud puts among the public ones.
_CLOSED_4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # Azure's host service
    )
)  # fmt: skip
# All IPv6 addresses that are given out; mapped, NAT64 and local forms lie outside.
_OPEN_6 = IPv6Network("2000::/3")
_CLOSED_6 = tuple(
    IPv6Network(block)
    for block in (
        "2001::/23",  # protocols: Teredo, benchmarks, ORCHID
        "2001:db8::/32", "3fff::/20",  # documentation
        "2002::/16",  # 6to4: holds any IPv4 address
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A checked address, in parts."""

    scheme: Literal["http", "https"]
    host: str  # a lower-case ASCII name without final dot, or an IP address without brackets
    port: int
    path: str  # with the query, percent-encoded ASCII

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole address, to join a redirect to. It holds the query, so it is never shown."""
        return f"{self.scheme}://{self.authority}{self.path}"


def parse_address(text: object, field: str) -> Target:
    """Parses an address of a job and checks it as far as that goes without asking anybody.

    `field` is the name of the address in the job. Raises `BadRequest`.
    """
    if not isinstance(text, str):
        raise BadRequest(f"{field} is {_type_name(text)}; an http or https address is expected.")
    text = text.strip(" \t\r\n")
    if not text:
        raise BadRequest(f"{field} is empty; an http or https address is expected.")
    if len(text) > _MAX_CHARS:
        raise BadRequest(f"{field} has {len(text)} characters; at most {_MAX_CHARS} are expected.")
    if _CONTROL.search(text):
        raise BadRequest(f"{field} has a control character or backslash in it; percent-encode it.")
    try:
        parts = urlsplit(text)
        scheme, port = _scheme(parts, field), parts.port
    except ValueError:
        # The cause would quote the address, and a log that shows causes would keep its secrets.
        raise BadRequest(f"{field} is not a well-formed address.") from None
    if "@" in parts.netloc:
        raise BadRequest(f"{field} has a user name in it; send an address without one.")
    if port is None:
        port = _PORTS[scheme]
    if port not in _PORTS.values():
        raise BadRequest(f"{field} names port {port}; only 80 and 443 are asked.")
    host = _host(parts, field)
    path = parts.path or "/"
    if parts.query:
        path += f"?{parts.query}"
    try:
        return Target(scheme, host, port, quote(path, safe=_KEPT))
    except UnicodeEncodeError:  # half of a surrogate pair
        raise BadRequest(f"{field} is not a well-formed address.") from None


def is_public(address: str) -> bool:
    """Tells whether an IP address, as a resolver writes it, belongs to the public Internet."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return not any(ip in block for block in _CLOSED_4)
    return ip.scope_id is None and ip in _OPEN_6 and not any(ip in block for block in _CLOSED_6)


def public_addresses(target: Target, field: str, resolve: Resolve, timeout_s: float) -> list[str]:
    """Looks up the IP addresses of `target`, all of which must be public.

    A single one that is not condemns the host: otherwise a name could be tried again until that
    address comes up. Raises `BadRequest` for such a host and `BadMedia` if it has no address.
    """
    if is_ip(target.host):
        found = [target.host]
    else:
        try:
            found = list(dict.fromkeys(resolve(target.host, target.port, timeout_s)))
        except (OSError, UnicodeError) as error:
            raise BadMedia(f"{field}: the host {target.host} cannot be found.") from error
        if not found:
            raise BadMedia(f"{field}: the host {target.host} cannot be found.")
    if not all(is_public(address) for address in found):
        raise BadRequest(
            f"{field}: the host {target.host} is not on the public Internet; nothing else is asked."
        )
    return found


def is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def resolve_name(
    host: str, port: int, timeout_s: float, look_up: Callable[..., Sequence] = socket.getaddrinfo
) -> list[str]:
    """Asks this machine's resolver. Raises `OSError`, `TimeoutError` among them."""
    answers: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = look_up(host, port, type=socket.SOCK_STREAM)
            answers.put([str(entry[4][0]) for entry in found])
        except (OSError, UnicodeError) as error:
            answers.put(error)

    # getaddrinfo knows no time limit: a thread that is late is left to itself.
    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty as error:
        raise TimeoutError(f"no answer in {timeout_s:.0f} s") from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _scheme(parts: SplitResult, field: str) -> Literal["http", "https"]:
    if parts.scheme == "http":
        return "http"
    if parts.scheme == "https":
        return "https"
    raise BadRequest(f"{field} is not an http or https address; no other kind is asked.")


def _host(parts: SplitResult, field: str) -> str:
    """Returns the host in lower case: a name with a dot in it, or a usually spelled IP address."""
    if not parts.netloc.isascii():
        raise BadRequest(f"{field} has a host beyond ASCII; write it in its xn-- form.")
    host = (parts.hostname or "").removesuffix(".")
    if not host:
        raise BadRequest(f"{field} names no host.")
    if ":" in host or "[" in parts.netloc:
        return _canonical(IPv6Address, host, field)
    labels = host.split(".")
    # 127.1, 0x7f.0.0.1, 0177.0.0.1 and 2130706433 are all this machine to some resolvers.
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        return _canonical(IPv4Address, host, field)
    if len(host) > _MAX_HOST or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadRequest(f"{field} has a host that is not written as host names are.")
    if len(labels) < 2 or labels[-1] in _HOME_NAMES:
        raise BadRequest(
            f"{field}: the host {host} is not on the public Internet; nothing else is asked."
        )
    return host


def _canonical(form: type[IPv4Address | IPv6Address], host: str, field: str) -> str:
    """Returns an IP address as it is usually spelled.

    Refuses short, octal and hexadecimal numbers, and the zone of a network card.
    """
    try:
        if "%" not in host:
            return str(form(host))
    except AddressValueError:
        pass
    raise BadRequest(f"{field} has a host that is not written as IP addresses are.")


def _type_name(value: object) -> str:
    return "missing" if value is None else f"of the type {type(value).__name__}"
