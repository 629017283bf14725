"""Reads how the owner of this machine set the service up: where it listens, and what it keeps."""

import ipaddress
import math
import os
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import models_dir, state_dir
from engine.errors import BadRequest, OutputError
from engine.worker.endpoint import Endpoint
from engine.worker.joblog import Redactor

TOKEN, HOSTS = "SCAIL_TOKEN", "SCAIL_HOSTS"
PRIVATE = 0o700

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TOKEN_CHARS = 16
_MOST_TOKEN_CHARS = 1024
_FOLDERS = ("jobs", "results", "uploads", "previews", "examples")


@dataclass(frozen=True, slots=True)
class House:
    """The set-up of the service."""

    host: str
    port: int
    names: frozenset[str]  # by which a browser may call this machine, in small letters
    takes_numeric: bool  # whether any numeric address is such a name
    token: str | None = field(repr=False)
    folder: Path  # of what it keeps
    inputs: tuple[Path, ...]  # folders whose files jobs may name; none: no paths are taken
    keep_s: float = 7 * 24 * 3600.0  # for results and the history
    keep_bytes: int = 10 * 10**9  # of all results together
    keep_upload_s: float = 6 * 3600.0  # from its last use
    upload_bytes: int = 5 * 10**9  # of all uploads together
    free_bytes: int = 512 * 10**6  # that the disk must have before something is taken
    most_waiting: int = 64
    waiting_bytes: int = 256 * 2**20  # of the bodies of jobs that wait
    redact: Redactor = field(default=Redactor(), repr=False)


def read_house(host: str, port: int) -> House:
    """Reads the environment. Raises `BadRequest` for a host that needs a token and has none."""
    token = os.environ.get(TOKEN) or None
    if token is not None and not (
        _TOKEN_CHARS <= len(token) <= _MOST_TOKEN_CHARS and token.isascii() and token.isprintable()
    ):
        raise BadRequest(
            f"{TOKEN} is no token: {_TOKEN_CHARS} to {_MOST_TOKEN_CHARS} printable ASCII "
            'characters are expected. Make one with python -c "import secrets; '
            'print(secrets.token_urlsafe(32))".'
        )
    beyond = not is_loopback(host)
    if beyond and token is None:
        raise BadRequest(
            f"--host {host} can be reached from other machines, so that a token is needed. Set "
            f"{TOKEN} to a secret of {_TOKEN_CHARS} characters or more, or leave --host out."
        )
    named = [name for name in os.environ.get(HOSTS, "").split(",") if name.strip()]
    own = [host, socket.gethostname()] if beyond else []
    inputs = os.environ.get("SCAIL_INPUTS", "").split(":")
    return House(
        host=host,
        port=port,
        names=frozenset(name.strip().lower() for name in [*_LOOPBACK, *own, *named]),
        takes_numeric=beyond,
        token=token,
        folder=state_dir() / "serve",
        inputs=tuple(Path(root) for root in inputs if root),
        keep_s=_amount("SCAIL_KEEP_HOURS", 7 * 24) * 3600,
        keep_bytes=int(_amount("SCAIL_KEEP_GB", 10) * 1e9),
        redact=Redactor.of(os.environ),
    )


def is_loopback(host: str) -> bool:
    """Tells whether nobody but this machine reaches a host that a service listens on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def endpoint_of(house: House, package: Path, models: Path | None, examples: Path) -> Endpoint:
    """Makes the set-up of the workers in the service: nothing of theirs leaves this machine."""
    temporary = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    return Endpoint(
        package=package,
        models=models or models_dir(),
        state=state_dir(),
        scratch=temporary / f"scail-serve-{os.getuid()}",
        inputs=(house.folder / "uploads", examples, *house.inputs),
        allows_cpu=os.environ.get("SCAIL_ALLOW_CPU") == "1",
        on_runpod=False,
        bucket=None,
        redact=house.redact,
    )


def make_folders(folder: Path) -> None:
    """Makes the folders of the service, for this user alone. Raises `OutputError`."""
    try:
        for one in (folder, *(folder / name for name in _FOLDERS)):
            one.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            one.chmod(PRIVATE)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot hold jobs and results: {error.strerror}. Set SCAIL_STATE to a "
            "folder of yours."
        ) from error


def _amount(variable: str, usual: float) -> float:
    given = os.environ.get(variable)
    if not given:
        return usual
    try:
        amount = float(given)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise BadRequest(f"{variable} is {given!r}; a number above 0 is expected.")
    return amount
