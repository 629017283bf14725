"""A clip into a reply: within the limits of the route, whole where there is a bucket."""

import base64
import urllib.error
import urllib.request

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from engine.errors import Cancelled, OutputError, ResultTooLarge
from engine.jobs.job import Bucket
from engine.media.ffmpeg import list_streams
from engine.media.mp4 import encode_mp4
from engine.media.sound import find_sound
from engine.media.video import probe_video
from engine.worker.delivery import (
    BESIDE_BYTES,
    RUN_BYTES,
    RUNSYNC_BYTES,
    clip_limit,
    deliver,
    fit,
)
from engine.worker.endpoint import region_of
from engine.worker.upload import upload
from tests.support.clips import clip, run_ffmpeg, tone

SECRET = "a-secret-that-nobody-may-see"


def nothing():
    """A check that lets the job go on."""


def own(url, name=None):
    """Makes the bucket of an operator, who may have it on this machine."""
    return Bucket(url, "key", SECRET, name, is_operators=True)


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3):
    given = {"aws_access_key_id": "key", "aws_secret_access_key": SECRET}
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1", **given)
    client.create_bucket(Bucket="clips")
    return own(s3, "clips")


def noisy(path, frames=40, side=256, sound=None):
    """Writes a clip of about 3 MB, far more than its size needs."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randint(0, 256, (frames, side // 4, side // 4, 3), generator=generator)
    shown = rough.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)
    track = None if sound is None else find_sound(sound)
    encode_mp4([shown], 16.0, path, audio=track, comment="SCAIL, seed 7", crf=1)
    return path


def padded(path, nbytes):
    """Writes a whole MP4 of exactly this size: players skip a `free` box."""
    made = clip(path)
    missing = nbytes - path.stat().st_size
    with path.open("ab") as file:
        file.write(missing.to_bytes(4, "big") + b"free" + bytes(missing - 8))
    return made


def test_limits_are_those_of_the_route_and_leave_room_for_the_rest():
    assert clip_limit("sync-79164ff4") > 2 * clip_limit("79164ff4") > 14_000_000
    for job_id, limit in (("a", RUN_BYTES), ("sync-a", RUNSYNC_BYTES)):
        packed = len(base64.b64encode(bytes(clip_limit(job_id))))
        assert limit - BESIDE_BYTES - 4 <= packed <= limit - BESIDE_BYTES


@pytest.mark.parametrize(("job_id", "more"), [("a", 0), ("sync-a", 0), ("sync-a", -8_000_000)])
def test_a_clip_up_to_the_limit_is_sent_as_it_is(tmp_path, job_id, more):
    made = padded(tmp_path / "clip.mp4", clip_limit(job_id) + more)
    sent = deliver(made, job_id, "base64", None, nothing)
    assert (sent.key, sent.warnings, sent.nbytes) == ("video", (), clip_limit(job_id) + more)
    assert base64.b64decode(sent.value, validate=True) == made.read_bytes()


def test_a_byte_more_is_encoded_again_and_said(tmp_path):
    made = padded(tmp_path / "clip.mp4", clip_limit("a") + 1)
    sent = deliver(made, "a", "base64", None, nothing)
    (tmp_path / "sent.mp4").write_bytes(base64.b64decode(sent.value))
    assert probe_video(tmp_path / "sent.mp4").frames == 20
    assert sent.nbytes < clip_limit("a")
    assert len(sent.warnings) == 1
    assert "encoded again" in sent.warnings[0]


@pytest.mark.parametrize("share", [0.6, 0.2, 0.08])
def test_what_is_encoded_again_keeps_all_but_its_quality(tmp_path, share):
    sound = tone(tmp_path / "sound.m4a", 4)
    made = noisy(tmp_path / "clip.mp4", sound=sound)
    limit = int(made.stat().st_size * share)
    smaller = fit(made, limit, nothing)
    assert limit * 0.5 < smaller.stat().st_size <= limit
    before, after = probe_video(made), probe_video(smaller)
    assert (after.frames, after.rate, after.width, after.height, after.has_audio) == (
        before.frames, before.rate, before.width, before.height, True,
    )  # fmt: skip
    streams, _ = list_streams(["-i", str(smaller), "-map", "0", "-c", "copy"], 30)
    assert [(stream.media, stream.codec) for stream in streams] == [
        ("video", "h264"), ("audio", "aac"),
    ]  # fmt: skip
    run_ffmpeg("-i", smaller, "-f", "ffmetadata", tmp_path / "facts.txt")
    assert "comment=SCAIL, seed 7" in (tmp_path / "facts.txt").read_text("utf-8")
    assert b"moov" in smaller.read_bytes()[:4096]  # plays before it is there


def test_colours_mean_the_same_after_encoding_again(tmp_path):
    made = noisy(tmp_path / "clip.mp4", frames=8)
    smaller = fit(made, made.stat().st_size // 2, nothing)
    colours = b"\0\x0bcolrnclx\0\x01\0\x01\0\x01\0"[2:]
    assert colours in made.read_bytes()
    assert colours in smaller.read_bytes()


def test_a_clip_that_fits_in_no_way_is_an_error_and_not_lost(tmp_path):
    made = noisy(tmp_path / "clip.mp4", frames=12)
    with pytest.raises(ResultTooLarge, match=r"cannot be encoded in the 0\.0 MB .*s3Config"):
        fit(made, 1000, nothing)


def test_a_job_can_be_called_off_before_it_is_encoded_again(tmp_path):
    def stop():
        raise Cancelled("off")

    with pytest.raises(Cancelled):
        fit(clip(tmp_path / "clip.mp4"), 1000, stop)


def test_a_job_can_be_called_off_while_it_is_encoded_again(tmp_path):
    made = noisy(tmp_path / "clip.mp4")

    def stop():
        if any(tmp_path.glob("passes*")):  # what the first pass writes
            raise Cancelled("off")

    with pytest.raises(Cancelled):
        fit(made, made.stat().st_size // 2, stop)
    assert not (tmp_path / "smaller.mp4").exists()


def test_a_bucket_takes_what_was_to_be_an_address(tmp_path, bucket):
    made = clip(tmp_path / "clip.mp4")
    sent = deliver(made, "job/../1", "url", bucket, nothing)
    assert (sent.key, sent.warnings) == ("video_url", ())
    with urllib.request.urlopen(sent.value, timeout=10) as answer:
        assert answer.read() == made.read_bytes()
        assert answer.headers["Content-Type"] == "video/mp4"
    assert "/clips/job____1/" in sent.value
    assert SECRET not in sent.value
    assert "X-Amz-Expires=604800" in sent.value


def test_names_in_a_bucket_cannot_be_guessed(tmp_path, bucket):
    made = clip(tmp_path / "clip.mp4")
    first, second = (upload(made, bucket, "job", nothing).partition("?")[0] for _ in range(2))
    assert first != second
    assert len(first.rpartition("/")[2]) == 16 + len(".mp4")


def test_a_clip_over_the_limit_goes_whole_into_a_bucket(tmp_path, bucket):
    made = padded(tmp_path / "clip.mp4", clip_limit("a") + 1)
    sent = deliver(made, "a", "base64", bucket, nothing)
    assert (sent.key, sent.nbytes) == ("video_url", clip_limit("a") + 1)
    assert "is in the bucket" in sent.warnings[0]


def test_a_clip_within_the_limit_stays_out_of_the_bucket(tmp_path, bucket):
    assert deliver(clip(tmp_path / "clip.mp4"), "a", "base64", bucket, nothing).key == "video"


def test_a_bucket_that_refuses_does_not_lose_the_clip(tmp_path, s3):
    made = clip(tmp_path / "clip.mp4")
    sent = deliver(made, "a", "url", own(s3, "no-such"), nothing)
    assert sent.key == "video"
    assert base64.b64decode(sent.value) == made.read_bytes()
    assert sent.warnings == (
        "The bucket did not take the clip (NoSuchBucket). The clip is in the reply instead.",
    )


def test_a_large_clip_and_a_broken_bucket_still_end_in_a_reply(tmp_path, s3):
    made = padded(tmp_path / "clip.mp4", clip_limit("a") + 1)
    sent = deliver(made, "a", "url", own(s3, "no-such"), nothing)
    assert (sent.key, len(sent.warnings)) == ("video", 2)


def test_without_a_name_the_bucket_is_called_after_the_month(tmp_path, s3):
    with pytest.raises(OutputError, match="NoSuchBucket"):
        upload(clip(tmp_path / "clip.mp4"), own(s3), "job", nothing)


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("https://s3.eu-central-1.amazonaws.com", "eu-central-1"),
        ("https://my-bucket.s3.us-west-2.amazonaws.com", "us-west-2"),
        ("https://s3-ap-southeast-1.amazonaws.com", "ap-southeast-1"),
        ("https://s3.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("https://abc.r2.cloudflarestorage.com", "us-east-1"),
        ("http://minio:9000", "us-east-1"),
    ],
)
def test_the_region_is_read_from_the_address(url, region):
    assert region_of(url) == region


def test_an_address_that_was_signed_for_another_clip_does_not_open_this_one(tmp_path, bucket):
    url = upload(clip(tmp_path / "clip.mp4"), bucket, "job", nothing)
    other = url.replace("/job/", "/else/")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(other, timeout=10)
