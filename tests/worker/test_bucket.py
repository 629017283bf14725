"""Where a bucket is asked: plain names, plain addresses, and for jobs the public Internet alone."""

import re
import threading
import time

import pytest

from engine.config import Defaults
from engine.errors import BadRequest, Cancelled, Unavailable
from engine.flow import go_on
from engine.jobs.job import Bucket
from engine.worker.bucket import check_bucket, place_of
from tests.support.workers import endpoint

SECRET = "a-secret-that-nobody-may-see"
PUBLIC = "93.184.215.14"


def jobs(url="https://s3.example.com", name=None, key="key", secret=SECRET):
    return Bucket(url, key, secret, name)


def own(url, name=None):
    return Bucket(url, "key", SECRET, name, is_operators=True)


def public(*_):
    return [PUBLIC]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9000", "http://169.254.169.254/latest", "https://inside.internal",
        "https://s3.example.com:8443", "file:///etc/passwd", "https://me:pw@s3.example.com",
        "https://s3.example.com/?x=y", "https://s3.example.com#x", "https://s3.example.com/a/../b",
        "https://s3.example.com/%2e%2e", "https://s3.example.com/a b", "https://s3.example.com/.",
        "https://s3.example.com/\r\nHost: x", "https://s3.example.com\\@evil.example", "s3", "",
        "https://s3.example.com/a?", "https://", "https://[::1]", "https://0x7f.1",
        "//s3.example.com",
        "https://s3.example.com@127.0.0.1", "https://s3.exa\u217fple.com", "https://\ud800.com",
    ],
)  # fmt: skip
def test_a_jobs_own_bucket_is_asked_at_a_plain_public_address_alone(url):
    with pytest.raises(BadRequest, match=r"^s3Config\.endpointUrl.*\.$") as told:
        check_bucket(jobs(url), go_on, public)
    assert len(str(told.value)) < 250
    assert "pw" not in str(told.value).split()


def test_a_jobs_own_bucket_on_the_internet_is_taken():
    check_bucket(jobs(), go_on, public)
    with pytest.raises(BadRequest, match="not on the public Internet"):
        check_bucket(jobs(), go_on, lambda *_: [PUBLIC, "10.0.0.1"])


def test_a_lookup_without_an_answer_can_be_called_off():
    asked, answer = [], threading.Event()

    def check():
        asked.append(1)
        if len(asked) == 3:
            raise Cancelled("The job was called off.")

    try:
        with pytest.raises(Cancelled):
            check_bucket(jobs(), check, lambda *_: [PUBLIC] if answer.wait(60) else [])
    finally:
        answer.set()


@pytest.mark.parametrize(
    "name",
    [
        "arn:aws:s3:us-east-1:123456789012:accesspoint/mine",
        "arn:aws:s3-outposts:us-east-1:1:outpost/op-1/bucket/b", "..", ".", "../other", "a/b", "a",
        "clips/", "clips?x", "clips#", "Clips", "a_b", "a..b", "-clips", "clips-", ".clips",
        "127.0.0.1", "clips\r\n", "clips\n", "%2e%2e", "cl ips", "clips\0", "klips\u0131",
        "\ud800ab", "clips@x", "a" * 64, "s3://clips", "clips:80",
    ],
)  # fmt: skip
def test_a_name_that_is_more_than_a_name_is_refused_and_not_repeated(name):
    with pytest.raises(BadRequest, match=r"^s3Config\.bucketName is no plain name") as told:
        check_bucket(jobs(name=name), go_on, public)
    assert len(name) < 4 or name not in str(told.value)


@pytest.mark.parametrize("name", ["clips", "my.clips-2026", "11-26", "a" * 63, "123"])
def test_a_plain_name_ends_the_path(name):
    assert place_of(jobs("https://x.supabase.co/storage/v1/s3/", name)).path == (
        f"/storage/v1/s3/{name}"
    )
    assert place_of(jobs(name=name)).url == f"https://s3.example.com/{name}"


def test_without_a_name_the_bucket_is_called_after_the_month():
    path = place_of(jobs()).path
    assert path in (time.strftime("/%m-%y"), path)
    assert re.fullmatch(r"/\d\d-\d\d", path)


@pytest.mark.parametrize("key", ["a\nb", "k\u00e9y", "\ud800", "x" * 2000, "a\0"])
@pytest.mark.parametrize("field", ["accessId", "accessSecret"])
def test_a_key_that_is_none_is_refused_and_not_repeated(key, field):
    given = {"accessId": {"key": key}, "accessSecret": {"secret": key}}[field]
    with pytest.raises(BadRequest, match=f"^s3Config.{field} is no key") as told:
        check_bucket(jobs(**given), go_on, public)
    assert key not in str(told.value)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000/my_Clips"),
        ("http://minio:9000/", "http://minio:9000/my_Clips"),
        ("https://s3.eu-central-1.amazonaws.com", "https://s3.eu-central-1.amazonaws.com/my_Clips"),
        ("http://[::1]:9000/base/", "http://[::1]:9000/base/my_Clips"),
    ],
)
def test_an_operators_bucket_may_be_anywhere(url, asked):
    assert place_of(own(url, "my_Clips")).url == asked


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("not an address", "clips"), ("http://", "clips"), ("ftp://127.0.0.1/", "clips"),
        ("http://me:pw@minio", "clips"), ("http://minio/?a", "clips"), ("http://minio:x", "clips"),
        ("http://minio", ".."), ("http://minio", "a/b"), ("http://minio", "arn:aws:s3:::b"),
    ],
)  # fmt: skip
def test_an_endpoint_whose_bucket_cannot_be_asked_says_which_setting_is_wrong(tmp_path, url, name):
    wrong = endpoint(tmp_path, bucket=own(url, name))
    with pytest.raises(Unavailable, match=r"^BUCKET_(ENDPOINT_URL|NAME) .*\.$"):
        wrong.check()
    endpoint(tmp_path, bucket=own("http://minio:9000", "clips")).check()


def test_a_bucket_of_a_job_is_never_the_operators():
    from engine.jobs.parse import parse_job

    config = {"endpointUrl": "http://127.0.0.1", "accessId": "a", "accessSecret": "b"}
    body = {"input": {"action": "health"}, "s3Config": config | {"is_operators": True}}
    assert parse_job(body, Defaults()).bucket == Bucket("http://127.0.0.1", "a", "b")
