"""Puts a finished clip into an S3 bucket, however badly the other side behaves.

botocore signs what is asked for, and nothing else of it is used: asking is ours, over the bounded
`wire` and at an address that was checked. No redirect is followed, an answer is read as far as its
reason goes, and a job can be called off in between.
"""

import os
import re
import secrets
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import BadStatusLine, HTTPException, HTTPMessage, parse_headers
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from engine.errors import BadMedia, BadRequest, OutputError
from engine.flow import Check
from engine.jobs.addresses import Target
from engine.jobs.job import Bucket
from engine.jobs.wire import INTERNET, Internet, Patience, Wire, dial
from engine.worker.bucket import addresses_of, place_of
from engine.worker.endpoint import region_of

UPLOAD_S = 600.0  # the limit for one clip, with all attempts
_URL_S = 7 * 24 * 3600  # how long the address of a clip opens it

_ATTEMPTS = 3
_PAUSE_S = 0.3  # before the second attempt; twice that before the third
_ANSWER_S = 60.0  # from the last byte of a clip to the answer
_REASON_S = 5.0  # for what follows the head of an answer
_CONTINUE_S = 1.0  # for a bucket that would rather refuse before the clip is sent
_PIECE = 1 << 18
_ANSWER_BYTES = 1 << 18
_LINE_BYTES = 1 << 12
_ID_CHARS = 64  # of a job's id that stand in the name of its clip
_TAKEN = (200, 201, 204)
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # another attempt may go better
_CONTINUE = 100
_EXPECTS_NOTHING = 417  # of a server that does not know `Expect`
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])( .*)?\r?\n", re.DOTALL)
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
_REGION = re.compile(r"[a-z]{2,12}(?:-[a-z0-9]{1,12}){0,4}")
_TOLD_REGION = re.compile(rb"<Region>([a-z0-9-]{2,60})</Region>")


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    code: str = ""  # why not, as the bucket puts it in a word; "" where it does not
    region: str = ""  # where it says that it is; "" where it does not


def upload(
    clip: Path,
    bucket: Bucket,
    job_id: str,
    check: Check,
    network: Internet = INTERNET,
    timeout_s: float = UPLOAD_S,
) -> str:
    """Puts the clip into the bucket, and returns an address that opens it for a week.

    Raises what `check` raises, and `OutputError`, in which nothing of the credentials is said.
    """
    patience = Patience(time.monotonic() + timeout_s, check)
    # Raised without causes: their messages quote addresses.
    try:
        with _opened(clip) as file:
            return _put(file, bucket, job_id, network, patience)
    except TimeoutError:
        raise _refused("it takes too long") from None
    except ssl.SSLCertVerificationError:
        raise _refused("its certificate is refused") from None
    except (BadRequest, BadMedia) as error:
        raise _refused(str(error).rstrip(".")) from None


def _put(clip: BinaryIO, bucket: Bucket, job_id: str, network: Internet, patience: Patience) -> str:
    """Asks until the bucket takes the clip, or will not. Raises as `upload` does, and `OSError`."""
    region, attempts, moved, expects = region_of(bucket.endpoint_url), 1, False, True
    place = place_of(bucket)
    url = f"{place.url}/{_name(job_id)}"
    while True:
        head = _head(place, _signed("PUT", url, bucket, region), _size(clip), expects)
        answer = _attempt(head, _pieces(clip), place, bucket, network, patience)
        if answer.status in _TAKEN:
            return _signed("GET", url, bucket, region)
        if not moved and answer.region not in ("", region):
            region, moved = answer.region, True  # asked at the same address all the same
        elif expects and answer.status == _EXPECTS_NOTHING:
            expects = False
        elif answer.status in _BUSY and attempts < _ATTEMPTS:
            _pause(attempts * _PAUSE_S, patience)
            attempts += 1
        else:
            raise _refused(answer.code or f"it answers {answer.status}")


@contextmanager
def _opened(clip: Path) -> Iterator[BinaryIO]:
    """Opens the clip once, for all attempts: a file that is gone is no fault of the bucket."""
    try:
        file = clip.open("rb")
    except OSError as error:
        raise _unread(error) from error
    with file:
        yield file


def _size(clip: BinaryIO) -> int:
    return os.fstat(clip.fileno()).st_size


def _pieces(clip: BinaryIO) -> Iterator[bytes]:
    try:
        clip.seek(0)
        while piece := clip.read(_PIECE):
            yield piece
    except OSError as error:
        raise _unread(error) from error


def _unread(error: OSError) -> OutputError:
    return OutputError(f"The clip cannot be read: {error.strerror}.")


def _refused(reason: str) -> OutputError:
    return OutputError(f"The bucket did not take the clip ({reason}).")


def _name(job_id: str) -> str:
    """Makes a name that begins with the job's id and that nobody can guess."""
    job = re.sub(r"[^A-Za-z0-9_-]", "_", job_id[:_ID_CHARS])
    return f"{job or '_'}/{secrets.token_hex(8)}.mp4"


def _signed(method: str, url: str, bucket: Bucket, region: str) -> str:
    """Signs a request in its address; what the clip holds is not part of it."""
    # Imported here: jobs without a bucket need not wait for it.
    from botocore.auth import S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    keys = Credentials(bucket.access_key, bucket.secret_key)
    request = AWSRequest(method=method, url=url)
    S3SigV4QueryAuth(keys, "s3", region, expires=_URL_S).add_auth(request)
    return str(request.url)


def _pause(seconds: float, patience: Patience) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(min(patience.left_s(), 0.1))


def _attempt(
    head: bytes, pieces: Iterator[bytes], place: Target, bucket: Bucket, network: Internet,
    patience: Patience,
) -> _Answer:  # fmt: skip
    """Asks once. A connection that fails is an answer that another attempt may mend."""
    try:
        addresses = patience.wait_for(partial(addresses_of, place, bucket, network))
        with closing(dial(place, addresses, network, patience)) as sock:
            return _exchange(Wire(sock, patience, _ANSWER_BYTES), head, pieces)
    except (TimeoutError, ssl.SSLCertVerificationError):
        raise
    except (OSError, HTTPException, ValueError) as error:
        return _Answer(_BUSY[0], type(error).__name__)


def _head(place: Target, signed: str, size: int, expects: bool) -> bytes:
    parts = urlsplit(signed)
    expect = "Expect: 100-continue\r\n" if expects else ""
    return (
        f"PUT {parts.path}?{parts.query} HTTP/1.1\r\nHost: {place.authority}\r\n"
        f"User-Agent: scail-engine\r\nContent-Type: video/mp4\r\nContent-Length: {size}\r\n"
        f"{expect}Connection: close\r\n\r\n"
    ).encode("ascii")


def _exchange(wire: Wire, head: bytes, pieces: Iterator[bytes]) -> _Answer:
    """Sends head and clip, and stops in the midst if the other side has answered by then."""
    try:
        wire.send(head)
        wait_s = _CONTINUE_S
        for piece in pieces:
            if wire.has_said(wait_s):
                status, headers = _next_answer(wire)
                if status != _CONTINUE:
                    return _read(wire, status, headers)
            wait_s = 0.0
            wire.send(piece)
    except (BrokenPipeError, ConnectionResetError):
        with suppress(OSError, HTTPException):  # it may have said why before it hung up
            return _last_answer(wire)
        raise
    return _last_answer(wire)


def _last_answer(wire: Wire) -> _Answer:
    wire.limit(time.monotonic() + _ANSWER_S)
    status, headers = _next_answer(wire)
    while status < 200:
        status, headers = _next_answer(wire)
    return _read(wire, status, headers)


def _next_answer(wire: Wire) -> tuple[int, HTTPMessage]:
    line = _STATUS.fullmatch(wire.file.readline(_LINE_BYTES))
    if line is None:
        raise BadStatusLine("no answer in HTTP")
    return int(line[1]), parse_headers(wire.file)


def _read(wire: Wire, status: int, headers: HTTPMessage) -> _Answer:
    """Reads as much of an answer as tells why the clip is not taken."""
    if status in _TAKEN:
        return _Answer(status)
    wire.limit(time.monotonic() + _REASON_S)
    told = bytearray()
    with suppress(OSError):  # the status alone will do
        while b"</Error>" not in told and (piece := wire.file.read1(_LINE_BYTES)):
            told += piece
    code, region = _CODE.search(told), headers.get("x-amz-bucket-region") or ""
    if found := _TOLD_REGION.search(told):
        region = region or found[1].decode()
    return _Answer(
        status,
        code[1].decode() if code else "",
        region if _REGION.fullmatch(region) else "",
    )
