"""Files that strangers send, and what is asked of every refusal of one."""

import dataclasses
import io

import pytest
from PIL import Image

from engine.config import LIMITS

SMALL = dataclasses.replace(LIMITS, max_image_bytes=100_000, max_video_bytes=100_000)
LARGE = "image_url is too large; at most 0.1 MiB are taken."


def picture(kind="PNG"):
    file = io.BytesIO()
    Image.radial_gradient("L").resize((96, 64)).save(file, kind)
    return file.getvalue()


PNG = picture()
PNG += bytes((1 - len(PNG)) % 3)  # so that its base64 ends in padding
MP4 = b"\0\0\0\x20ftypisom" + bytes(90)


def refusal(error, wanted, call):
    """Returns the sentence, after a look at what must be true of every refusal."""
    with pytest.raises(error) as raised:
        call()
    said = str(raised.value)
    assert "secret" not in said
    assert str(wanted.folder.parent) not in said
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 300
    assert list(wanted.folder.iterdir()) == []
    return said
