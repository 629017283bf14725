"""Media as clients name them: what the text says it is, whatever field it came in."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import BadRequest
from engine.jobs.job import Given
from engine.jobs.medium import read_medium
from tests.support.job_bodies import job, refused

DATA = "data:image/png;base64,iVBORw0KGgo="
QUICK = settings(max_examples=200, deadline=None)


@pytest.mark.parametrize("field", ["image_url", "image_path", "image_base64"])
@pytest.mark.parametrize(
    ("written", "kind", "value"),
    [
        (DATA, "base64", DATA),
        (f" \n{DATA}\n", "base64", DATA),
        (DATA.replace("data:", "DATA:"), "base64", DATA.replace("data:", "DATA:")),
        (f'"{DATA}"', "base64", DATA),
        (f"\ufeff{DATA}", "base64", DATA),
        ("https://a.com/b.png", "url", "https://a.com/b.png"),
        ("\thttps://a.com/b.png \n", "url", "https://a.com/b.png"),
        ('"https://a.com/b.png"', "url", "https://a.com/b.png"),
        ("'https://a.com/b.png'", "url", "https://a.com/b.png"),
        ("<https://a.com/b.png>", "url", "https://a.com/b.png"),
        ('" https://a.com/b.png "', "url", "https://a.com/b.png"),
        ("HTTPS://a.com/b.png", "url", "HTTPS://a.com/b.png"),
        ("http://a.com/b.png", "url", "http://a.com/b.png"),
    ],
)
def test_a_text_that_says_what_it_is_is_taken_as_that_in_any_field(field, written, kind, value):
    assert job(**{"image_url": None, field: written}).image == Given(field, kind, value)


@pytest.mark.parametrize("field", ["image_url", "image_path"])
@pytest.mark.parametrize(
    "written", ["file:///ComfyUI/input/a%20b.png", "file://localhost/ComfyUI/input/a b.png",
                "file:/ComfyUI/input/a b.png", "FILE:///ComfyUI/input/a b.png [input]"],
)  # fmt: skip
def test_a_file_address_is_the_name_of_a_file(field, written):
    read = job(**{"image_url": None, field: written}).image
    assert read == Given(field, "path", "/ComfyUI/input/a b.png")


@pytest.mark.parametrize(
    ("written", "name"),
    [("ref.png [input]", "ref.png"), ("ref.png[input]", "ref.png"),
     ("ref.png  [Input] ", "ref.png"),
     ("clipspace/mask 1.png [input]", "clipspace/mask 1.png"), ("[input].png", "[input].png"),
     ("a [input] b.png", "a [input] b.png"), ('"ref.png [input]"', "ref.png")],
)  # fmt: skip
def test_a_name_with_comfyuis_folder_of_inputs_behind_it_is_the_name(written, name):
    assert job(image_url=None, image_path=written).image.value == name


@pytest.mark.parametrize(
    ("field", "written", "sentence"),
    [
        ("image_path", "a.png [output]", "names a file in ComfyUI's output folder, which is not"),
        ("image_path", "a.png [temp]", "names a file in ComfyUI's temp folder, which is not here;"),
        ("video_path", "a.mp4 [output]", "video_path names a file in ComfyUI's output folder"),
        ("image_url", "s3://bucket/a.png", "a store that needs its keys (s3:); send a signed"),
        ("image_path", "gs://bucket/a.png", "a store that needs its keys (gs:); send a signed"),
        ("image_url", "blob:https://a.com/0b5c", "that one program knows (blob:); send the file"),
        ("image_base64", "blob:https://a.com/0b5c", "that one program knows (blob:)"),
        ("image_url", "file://nas/share/a.png", "a file of another machine; send an https"),
        ("image_url", base64.b64encode(bytes(range(256))).decode(), "but looks like base64;"),
        ("video_url", "A" * 10**6, "video_url is no address but looks like base64; send that in"),
    ],
)  # fmt: skip
def test_what_cannot_be_fetched_from_here_is_refused_with_what_to_send(field, written, sentence):
    assert sentence in refused(**{"image_url": None, field: written})


def test_a_field_of_blanks_or_of_blanks_in_quotes_is_not_given():
    for blank in ("", " \n\t", None):
        assert job(image_path=blank, image_base64=blank).image.field == "image_url"
    assert job(image_url="  ", image_path="a.png").image == Given("image_path", "path", "a.png")


def test_nested_media_and_skeletons_are_read_the_same_way():
    made = job(image_url=None, images={"reference_image": f"\n{DATA}"}, pose_video_url=DATA)
    assert made.image == Given("images.reference_image", "base64", DATA)
    assert made.motion == Given("pose_video_url", "base64", DATA)


@QUICK
@given(st.sampled_from(["url", "path", "base64"]), st.text(st.characters(codec=None), max_size=60))
def test_any_text_is_a_medium_or_refused_in_a_sentence(kind, text):
    try:
        read = read_medium("image_url", kind, text)
    except BadRequest as error:
        assert str(error).isprintable()
        assert len(str(error)) < 200
    else:
        assert read.kind in ("url", "path", "base64")
