"""Jobs as clients write them, and what is asked of every refusal of one."""

from pathlib import Path

import pytest

from engine.config import Defaults
from engine.errors import BadRequest
from engine.jobs.parse import parse_job

DANCE = Defaults(video=Path("dance.mp4"))
PICTURE = "https://example.com/person.jpg"


def job(defaults=DANCE, **fields):
    return parse_job({"input": {"image_url": PICTURE, **fields}}, defaults)


def settings_of(defaults=DANCE, /, **fields):
    """The settings of such a job."""
    return job(defaults, **fields).settings


def refusal(given, defaults=DANCE):
    """Returns the sentence, after a look at what must be true of every refusal."""
    with pytest.raises(BadRequest) as raised:
        parse_job(given, defaults)
    said = str(raised.value)
    assert said.endswith(".")
    assert said.isprintable()
    assert len(said) < 320
    return said


def refused(defaults=DANCE, **fields):
    return refusal({"input": {"image_url": PICTURE, **fields}}, defaults)
