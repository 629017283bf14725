"""Media in base64 and in input folders: what arrives, and what else is tried."""

import base64
import os
import tracemalloc
from functools import partial
from urllib.parse import quote

import pytest

from engine.errors import BadMedia, BadRequest, OutputError
from engine.jobs.fetch import Wanted, fetch_base64, fetch_path
from tests.support.strangers import LARGE, MP4, PNG, SMALL, picture, refusal


@pytest.fixture
def wanted(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    return Wanted("image_url", "picture", folder, SMALL)


def test_a_folder_that_cannot_be_written_to_is_not_the_medias_fault(tmp_path):
    wanted = Wanted("image_base64", "picture", tmp_path / "gone", SMALL)
    with pytest.raises(OutputError, match="image_base64 cannot be stored here: No such file"):
        fetch_base64(base64.b64encode(PNG).decode(), wanted)


@pytest.mark.parametrize("before", ["", "data:image/png;base64,", "DATA:;Base64,",
                                    "data:image/png;charset=x;name=a.png;base64,"])  # fmt: skip
@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_base64_arrives_with_and_without_prefix_and_line_breaks(wanted, before, encode):
    path = fetch_base64(before + encode(PNG).decode(), wanted)
    assert (path.name, path.read_bytes()) == ("image_url.png", PNG)


@pytest.mark.parametrize(
    "written",
    [" data:image/png;base64,{}", "\r\n\tdata:image/png;base64,{}", "\nDATA:image/png;BASE64,{}",
     "data:image/png;charset=utf-8;base64,{}", "data: image/png; base64, {}", "{}  \n", "\n{}",
     "data:image/png;name=" + "a" * 200 + ".png;base64,{}", " \v\f{}\v"],
)  # fmt: skip
def test_base64_is_taken_however_it_was_pasted(wanted, written):
    assert fetch_base64(written.format(GOOD), wanted).read_bytes() == PNG


@pytest.mark.parametrize(
    "encoded",
    [lambda: GOOD.rstrip("="), lambda: base64.urlsafe_b64encode(PNG).decode(),
     lambda: base64.urlsafe_b64encode(PNG).decode().rstrip("="), lambda: GOOD[:-1],
     lambda: "data:image/png;base64," + quote(GOOD, safe=""),
     lambda: "\r\n".join(GOOD[n : n + 76] for n in range(0, len(GOOD), 76)),
     lambda: " ".join(GOOD[n : n + 17] for n in range(0, len(GOOD), 17))],
)  # fmt: skip
def test_base64_is_taken_in_either_alphabet_with_or_without_padding(wanted, encoded):
    assert fetch_base64(encoded(), wanted).read_bytes() == PNG


def test_base64_of_exactly_the_largest_size_passes(wanted):
    content = PNG + bytes(100_000 - len(PNG))
    assert fetch_base64(base64.b64encode(content).decode(), wanted).read_bytes() == content
    (wanted.folder / "image_url.png").unlink()
    text = base64.b64encode(content + b"a").decode()
    assert refusal(BadMedia, wanted, lambda: fetch_base64(text, wanted)) == LARGE


GOOD = base64.b64encode(PNG).decode()
assert GOOD.endswith("==")
assert "+" in GOOD or "/" in GOOD


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "image_url is nothing; base64 is expected, as a string."), (7, "of the type int"),
        (True, "of the type bool"), ([GOOD], "of the type list"), ({}, "of the type dict"),
        (GOOD.encode(), "of the type bytes"), (float("inf"), "of the type float"),
        ("", "is empty"), (" \n", "is empty"), ("====", "not base64"), ("A", "not base64"),
        (GOOD[:-3], "not base64"), (GOOD[:-7], "not base64"), (GOOD + "=", "not base64"),
        (GOOD + "!", "not base64"), ("!" + GOOD, "not base64"), (GOOD + GOOD, "not base64"),
        (GOOD.replace("+", "-"), "not base64"), ("\0" + GOOD, "not"),
        (GOOD + "====", "not base64"),
        (GOOD[:-4] + "====", "not base64"), (GOOD[:40] + "=" + GOOD[41:], "not base64"),
        ("\u0410" + GOOD[1:], "beyond ASCII"),
        ("\ud800" + GOOD, "beyond ASCII"), ("data:", "begins with"), ("data:," + GOOD, "begins"),
        ("data:image/png," + GOOD, "begins with"), ("data:image/png;base64" + GOOD, "begins with"),
        ("data:" + "a" * 500 + ";base64," + GOOD, "begins with"), ("data:;base64,", "is empty"),
        ("https://example.com/secret.png", "not base64"), ("/etc/passwd", "a file of another kind"),
        (base64.b64encode(MP4).decode(), "image_url is a video"),
        (base64.b64encode(b"secret" * 99).decode(), "a file of another kind"),
    ],
)  # fmt: skip
def test_what_is_no_base64_of_a_picture_is_refused(wanted, text, sentence):
    said = refusal((BadRequest, BadMedia), wanted, lambda: fetch_base64(text, wanted))
    assert sentence in said


@pytest.mark.parametrize("letter", ["A", "=", " ", "\u0410"])
def test_a_hundred_megabytes_of_base64_are_refused_by_their_length(wanted, letter):
    text = letter + "A" + letter * (100 * 2**20)
    tracemalloc.start()
    assert refusal(BadMedia, wanted, lambda: fetch_base64(text, wanted)) == LARGE
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20  # nothing was copied or decoded


@pytest.fixture
def roots(tmp_path):
    """Two input folders, a link to the first, and things outside."""
    for name in ("inputs/deep", "more", "inputs-too"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "inputs")
    for name in ("inputs/a.png", "inputs/deep/b.png", "more/c.png", "outside.png",
                 "inputs-too/a.png"):  # fmt: skip
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "inputs" / "inner.png").symlink_to("deep/b.png")
    (tmp_path / "inputs" / "escape.png").symlink_to("../outside.png")
    (tmp_path / "inputs" / "folder").symlink_to("..")
    (tmp_path / "inputs" / "loop.png").symlink_to("loop.png")
    (tmp_path / "inputs" / "self.png").symlink_to("/proc/self/environ")
    (tmp_path / "inputs" / "text.png").write_text("secret")
    (tmp_path / "inputs" / "large.png").write_bytes(PNG + bytes(100_000))
    (tmp_path / "inputs" / "empty.png").touch()
    os.mkfifo(tmp_path / "inputs" / "pipe.png")
    return [tmp_path / "alias", tmp_path / "more", tmp_path / "none"]


@pytest.mark.parametrize(
    "name",
    ["{}/inputs/a.png", "{}/alias/a.png", "a.png", "c.png", "deep/b.png", "{}/alias/inner.png",
     "deep/../a.png", "{}/inputs/folder/inputs/a.png", "./a.png"],
)  # fmt: skip
def test_a_file_below_an_input_folder_is_copied(wanted, roots, tmp_path, name):
    path = fetch_path(name.format(tmp_path), wanted, roots)
    assert path == wanted.folder / "image_url.png"
    assert path.read_bytes() == PNG
    assert not path.is_symlink()


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "/proc/self/environ", "/dev/zero", "/", "{}/outside.png", "../outside.png",
     "deep/../../outside.png", "{}/inputs/../outside.png", "escape.png", "folder/outside.png",
     "self.png", "loop.png", "none.png", "{}/inputs-too/a.png", "../inputs-too/a.png", "a.png\0",
     "a\ud800.png", "x" * 300, "../" * 9 + "etc/passwd", "./" * 2**20, "file:///etc/passwd",
     "~/a.png", "$HOME/a.png", "a.png/../../outside.png", "{}", "{}/job", "..", "*.png"],
)  # fmt: skip
def test_every_other_place_is_refused_in_one_sentence_there_or_not(wanted, roots, tmp_path, name):
    call = partial(fetch_path, name.format(tmp_path), wanted, roots)
    assert refusal(BadRequest, wanted, call) == (
        "image_url names no file in an input folder of this worker; put the file there, or send it "
        "as an address or in base64."
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (None, "is nothing"), (3, "of the type int"), (["a.png"], "of the type list"),
        (b"a.png", "of the type bytes"), ("", "is empty"), ("  ", "is empty"),
        ("pipe.png", "is a folder, a device or a pipe"), (".", "is a folder"), ("deep", "a folder"),
        ("text.png", "another kind"), ("large.png", LARGE), ("empty.png", "image_url is empty"),
    ],
)  # fmt: skip
def test_what_is_no_picture_in_an_input_folder_is_refused(wanted, roots, name, sentence):
    call = partial(fetch_path, name, wanted, roots)
    assert sentence in refusal((BadRequest, BadMedia), wanted, call)


def test_without_input_folders_no_path_is_taken(wanted, roots, tmp_path):
    call = partial(fetch_path, f"{tmp_path}/inputs/a.png", wanted, [])
    assert "names no file in an input folder" in refusal(BadRequest, wanted, call)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [(MP4, "mp4"), (b"\0\0\0\x14ftypqt  " + bytes(40), "mov"), (bytes(4) + b"moov" + MP4, "mov"),
     (b"\x1aE\xdf\xa3" + bytes(40), "mkv"), (picture("GIF"), "gif")],
)  # fmt: skip
def test_a_video_is_named_by_its_content(tmp_path, content, suffix):
    wanted = Wanted("videos.dance_video", "video", tmp_path, SMALL)
    path = fetch_base64(base64.b64encode(content).decode(), wanted)
    assert path == tmp_path / f"videos.dance_video.{suffix}"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "AVIF", "PNG"])
def test_pictures_of_every_kind_that_is_taken_are_known_by_their_content(wanted, kind):
    assert fetch_base64(base64.b64encode(picture(kind)).decode(), wanted).stem == "image_url"


def test_a_video_in_another_container_than_those_taken_is_refused(tmp_path):
    wanted = Wanted("video_url", "video", tmp_path / "job", SMALL)
    wanted.folder.mkdir()
    for content, found in (
        (b"RIFF" + bytes(4) + b"AVI " + bytes(40), "an AVI video"), (PNG, "a picture"),
        (b"#EXTM3U\n/etc/passwd\n", "a file of another kind"), (b"ffconcat version 1.0", "a file"),
    ):  # fmt: skip
        text = base64.b64encode(content).decode()
        said = refusal(BadMedia, wanted, partial(fetch_base64, text, wanted))
        assert said.startswith(f"video_url is {found}")
