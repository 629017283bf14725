"""A web server on the loopback interface that behaves as badly as it is told to.

The engine's rules for addresses stay whole in tests: `network` is an Internet in which made-up
names have public addresses, and in which every connection, wherever it was meant to go, ends here.
"""

import base64
import contextlib
import socket
import ssl
import tempfile
import threading
from pathlib import Path

from engine.jobs.wire import Internet

NAME, ADDRESS = "media.example.com", "93.184.215.14"

# The identity of NAME, signed by itself until 2126. Nobody trusts it but these tests.
_CERTIFICATE = (
    "MIIBrTCCAVOgAwIBAgIUC61Khy47SOh9VNOZM2heLf5zBBUwCgYIKoZIzj0EAwIwHDEaMBgGA1UEAwwRbWVkaWEu"
    "ZXhhbXBsZS5jb20wIBcNMjYxMTIzMTczMjQyWhgPMjEyNjEwMzAxNzMyNDJaMBwxGjAYBgNVBAMMEW1lZGlhLmV4"
    "YW1wbGUuY29tMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEuHkrl2EICcLMyy263daMnLLLoRPl8tto7KDD7Yip"
    "vFVBBG9TRwdeGEUDE7Qt23Ox9rVPN5/5bjwrUGUmLJEGhqNxMG8wHQYDVR0OBBYEFDYyUCp5bEWcdctdwE3kS/zr"
    "5Vg/MB8GA1UdIwQYMBaAFDYyUCp5bEWcdctdwE3kS/zr5Vg/MA8GA1UdEwEB/wQFMAMBAf8wHAYDVR0RBBUwE4IR"
    "bWVkaWEuZXhhbXBsZS5jb20wCgYIKoZIzj0EAwIDSAAwRQIgQ8uUyVE3dTYNCppqE60tfl2bJRpnKhes0IjiZvn5"
    "yCACIQDfYXxolnkWJqiAQv9FlEX+cPpP2FwjtFXcf9UpmR/86g=="
)
_KEY = (
    "MHcCAQEEICCt54O9XHdEfn0Xa5bGtPO7uEq0m+qPIUcpwz/qFwdRoAoGCCqGSM49AwEHoUQDQgAEuHkrl2EICcLM"
    "yy263daMnLLLoRPl8tto7KDD7YipvFVBBG9TRwdeGEUDE7Qt23Ox9rVPN5/5bjwrUGUmLJEGhg=="
)


def reply(body=b"", status="200 OK", head="", length=None):
    """Makes an answer, a function of the connection. `length` None tells the truth, "" nothing."""
    told = f"Content-Length: {len(body) if length is None else length}\r\n" if length != "" else ""
    return lambda sock: sock.sendall(f"HTTP/1.1 {status}\r\n{told}{head}\r\n".encode() + body)


def redirect(to, status="302 Found"):
    return reply(status=status, head=f"Location: {to}\r\n")


def chunked(raw):
    return reply(raw, head="Transfer-Encoding: chunked\r\n", length="")


def first_then_again(first, again=b"", pause_s=0.0):
    """Makes an answer of `first`, then of `again` until nobody listens; if it is empty, silence."""

    def answer(sock):
        sock.sendall(first)
        stop = threading.Event()
        while not stop.wait(pause_s):
            if again:
                sock.sendall(again)
            elif sock.recv(1) == b"":
                return

    return answer


class Server:
    """Answers by path, or by "*", in a thread a connection. `requests` are the heads that came."""

    def __init__(self, answers, tls=False):
        self.requests, self.dialled, self.server_names = [], [], []
        self._answers, self._tls = answers, _context(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if self._tls is not None:
            self._tls.sni_callback = lambda _, name, __: self.server_names.append(name)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()

    def network(self, names=None, trusted=True):
        """Makes an Internet that ends here.

        `names` maps a name to a list of addresses for each time that it is asked for.
        """
        left = {NAME: [[ADDRESS]]} if names is None else {name: [*a] for name, a in names.items()}

        def resolve(host, port, timeout_s):
            if not left.get(host):
                raise socket.gaierror(-2, "Name or service not known")
            return left[host].pop(0) if len(left[host]) > 1 else left[host][0]

        def connect(address, port, timeout_s):
            self.dialled.append((address, port))
            return socket.create_connection(("127.0.0.1", self.port), timeout_s)

        tls = (lambda: _context(ssl.PROTOCOL_TLS_CLIENT)) if trusted else ssl.create_default_context
        return Internet(resolve, connect, tls)

    def _listen(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[sock], daemon=True).start()

    def _serve(self, sock):
        with sock, contextlib.suppress(OSError):  # the other side has gone, as it should
            sock.settimeout(10)
            talk = sock if self._tls is None else self._tls.wrap_socket(sock, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head and (piece := talk.recv(4096)):
                head += piece
            if head:
                self.requests.append(head.decode("latin-1"))
                path = head.split()[1].decode("latin-1").partition("?")[0]
                other = self._answers.get("*", reply(b"none", "404 Not Found"))
                self._answers.get(path, other)(talk)
            with contextlib.suppress(OSError):
                talk.shutdown(socket.SHUT_RDWR)


def _context(protocol):
    context = ssl.SSLContext(protocol)
    if protocol == ssl.PROTOCOL_TLS_CLIENT:
        context.load_verify_locations(cadata=base64.b64decode(_CERTIFICATE))
        return context
    pem = "".join(
        f"-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n"
        for kind, text in (("EC PRIVATE KEY", _KEY), ("CERTIFICATE", _CERTIFICATE))
    )
    with tempfile.TemporaryDirectory() as folder:  # the only way into `load_cert_chain`
        path = Path(folder, "identity.pem")
        path.write_text(pem)
        context.load_cert_chain(path)
    return context
