"""Jobs as clients write them, and what is asked of every refusal of one."""

from pathlib import Path

import pytest

from engine.config import KINDS, Defaults
from engine.errors import BadRequest
from engine.jobs.parse import parse_job
from engine.jobs.served import PREVIEW, Served

DANCE = Defaults(video=Path("dance.mp4"))
PICTURE = "https://example.com/person.jpg"


def job(defaults=DANCE, **fields):
    return parse_job({"input": {"image_url": PICTURE, **fields}}, defaults)


def settings_of(defaults=DANCE, /, **fields):
    """The settings of such a job."""
    return job(defaults, **fields).settings


def refusal(given, defaults=DANCE, served=PREVIEW):
    """Returns the sentence, after a look at what must be true of every refusal."""
    with pytest.raises(BadRequest) as raised:
        parse_job(given, defaults, served)
    said = str(raised.value)
    assert said.endswith(".")
    assert said.isprintable()
    assert len(said) < 320
    return said


def refused(defaults=DANCE, **fields):
    return refusal({"input": {"image_url": PICTURE, **fields}}, defaults)


SCAIL2 = Served(KINDS["scail2"], KINDS["scail2"].modes)
MASK = {"mask_url": "https://example.com/mask.mp4"}


def scail2_job(served=SCAIL2, defaults=DANCE, /, **fields):
    """A job for a worker of SCAIL-2."""
    return parse_job({"input": {"image_url": PICTURE, **fields}}, defaults, served)


def scail2_refused(served=SCAIL2, /, **fields):
    """Returns the sentence of its refusal."""
    return refusal({"input": {"image_url": PICTURE, **fields}}, DANCE, served)
