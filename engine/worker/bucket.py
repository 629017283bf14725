"""Reads where an S3 bucket is asked: what is asked later is built from what was checked here.

A name is a plain one, since an ARN or a path would make it another host or another object. A job's
own bucket must be on the public Internet; the operator's may be anywhere.
"""

import math
import re
import time
from functools import partial
from typing import Literal, cast
from urllib.parse import urlsplit

from engine.errors import BadRequest
from engine.flow import Check
from engine.jobs.addresses import Resolve, Target, is_ip, parse_address, public_addresses
from engine.jobs.addresses import resolve_name as resolver
from engine.jobs.job import Bucket
from engine.jobs.wire import Internet, Patience

_URL, _NAME = "s3Config.endpointUrl", "s3Config.bucketName"
_OWN_URL, _OWN_NAME = "BUCKET_ENDPOINT_URL", "BUCKET_NAME"
_PORTS = {"http": 80, "https": 443}
_KEY_CHARS = 1024
_PLAIN = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_OLD = re.compile(r"[A-Za-z0-9._-]{1,255}")  # of old buckets, and of others than AWS
_SEGMENT = re.compile(r"[A-Za-z0-9._~-]+")  # of the path before the bucket, as some have it


def place_of(bucket: Bucket) -> Target:
    """Returns where the bucket is, its name at the end of the path. Raises `BadRequest`.

    Without a name it is called after month and year, as the platform's own uploads do.
    """
    own = bucket.is_operators
    url, name = bucket.endpoint_url.strip(), bucket.bucket_name
    field, name_field = (_OWN_URL, _OWN_NAME) if own else (_URL, _NAME)
    _check_keys(bucket)
    if name is None:
        name = time.strftime("%m-%y")
    elif not _is_plain(name, _OLD if own else _PLAIN):
        raise BadRequest(
            f"{name_field} is no plain name of a bucket; 3 to 63 small letters, digits, hyphens "
            "and single dots are expected."
        )
    target = _anywhere(url, field) if own else parse_address(url, field)
    segments = [part for part in target.path.split("/") if part]
    if re.search("[?#]", url) or not all(
        _SEGMENT.fullmatch(part) and part.strip(".") for part in segments
    ):
        raise BadRequest(f"{field} has more than a host and a plain path; send it without.")
    path = "".join(f"/{part}" for part in (*segments, name))
    return Target(target.scheme, target.host, target.port, path)


def addresses_of(place: Target, bucket: Bucket, network: Internet, timeout_s: float) -> list[str]:
    """Looks up the IP addresses to connect to; a job's must all be public.

    Raises `OSError`, and what `public_addresses` raises.
    """
    if not bucket.is_operators:
        return public_addresses(place, _URL, network.resolve, timeout_s)
    if is_ip(place.host):
        return [place.host]
    return list(network.resolve(place.host, place.port, timeout_s))


def check_bucket(bucket: Bucket, check: Check, resolve: Resolve = resolver) -> None:
    """Requires a job's own bucket to be one, and on the public Internet.

    The upload asks for the addresses again, and checks those. Raises an `EngineError`, or what
    `check` raises.
    """
    patience = Patience(math.inf, check)  # a single lookup, which has a limit of its own
    patience.wait_for(partial(public_addresses, place_of(bucket), _URL, resolve))


def _is_plain(name: str, form: re.Pattern[str]) -> bool:
    return bool(form.fullmatch(name)) and ".." not in name and name != "." and not is_ip(name)


def _check_keys(bucket: Bucket) -> None:
    fields = ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
    if not bucket.is_operators:
        fields = ("s3Config.accessId", "s3Config.accessSecret")
    for field, key in zip(fields, (bucket.access_key, bucket.secret_key)):
        if not (key.isascii() and key.isprintable() and len(key) <= _KEY_CHARS):
            raise BadRequest(f"{field} is no key: letters, digits and signs are expected.")


def _anywhere(url: str, field: str) -> Target:
    """Parses an address of the operator, which may be inside the worker's network."""
    wrong = BadRequest(f"{field} is no http or https address of a host, without a user name.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # the cause would quote the address
        raise wrong from None
    if not re.fullmatch(r"[\w.:-]+", host, re.ASCII) or parts.scheme not in _PORTS:
        raise wrong
    if "@" in parts.netloc:
        raise wrong
    scheme = cast(Literal["http", "https"], parts.scheme)
    return Target(scheme, host, port or _PORTS[scheme], parts.path)
